"""The gripper suite as `lapa demos` and `lapa evaluate` see it."""

from envs.gripper import FAMILIES
from envs.gripper.env import GripperEnv

TASKS = tuple(FAMILIES)
DEFAULT_TASKS = TASKS
GROUPS: dict[str, tuple[str, ...]] = {}
UNDERSTOOD = frozenset(("split", "variant", "action_noise_m"))
STATE_NAMES = ("x", "y", "z", "opening")
ACTION_NAMES = ("dx", "dy", "dz", "opening")
HAS_EXPERT = True


def make_env(task: str, image_size: int, split: str = "train", variant: str = "default") -> GripperEnv:
    """An environment of one family."""
    return GripperEnv(task, image_size=image_size, split=split, variant=variant)
