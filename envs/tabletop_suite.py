"""The tabletop suite as `lapa demos` and `lapa evaluate` see it."""

from envs import FAMILIES
from envs.play import LENGTH_RATIO
from envs.tabletop import TabletopEnv
from envs.tasks import make_task

TASKS = tuple(FAMILIES)
DEFAULT_TASKS = ("reach",)
GROUPS: dict[str, tuple[str, ...]] = {}
UNDERSTOOD = frozenset(("families", "split", "variant", "num_blocks_min", "num_blocks_max", "play", "action_noise_m"))
STATE_NAMES = ("x", "y")
ACTION_NAMES = ("dx", "dy")
HAS_EXPERT = True


def make_env(
    task: str, image_size: int, split: str, variant: str, num_blocks_min: int, num_blocks_max: int, play: bool = False
) -> TabletopEnv:
    """An environment of one family; play gives it the steps to dawdle."""
    return TabletopEnv(
        task,
        image_size=image_size,
        num_blocks=(num_blocks_min, num_blocks_max),
        split=split,
        variant=variant,
        episode_length=LENGTH_RATIO * make_task(task).episode_length if play else None,
    )
