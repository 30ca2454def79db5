"""PushT (Chi et al., 2023, arXiv 2303.04137; gym-pusht) as `lapa evaluate` sees it: env=pusht."""

from typing import Any

INSTRUCTION = "Push the T-shaped block onto the T-shaped target."

TASKS = ("push_t",)
DEFAULT_TASKS = TASKS
GROUPS: dict[str, tuple[str, ...]] = {}
UNDERSTOOD: frozenset[str] = frozenset()
STATE_NAMES = ("x", "y")
ACTION_NAMES = ("x", "y")
HAS_EXPERT = False


def make_env(task: str, image_size: int) -> Any:
    """A PushTEnv; ValueError with the install commands where gym-pusht is missing."""
    try:
        from envs.pusht_env import PushTEnv
    except ModuleNotFoundError:
        raise ValueError(
            "env=pusht needs gym-pusht, whose own requirements would bring a second OpenCV: "
            "pip install 'lerobot_policy_lapa[pusht]' && pip install --no-deps gym-pusht==0.1.8"
        ) from None
    return PushTEnv(image_size)
