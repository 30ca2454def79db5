"""LIBERO (Liu et al., 2023, arXiv 2306.03310; hf-libero) as `lapa evaluate` sees it.

env=libero/libero_goal (ten tasks)    env=libero/libero_goal-3 (one)    (env=libero is libero_spatial)
"""

from typing import Any

# Tasks and longest episode, in control steps, as LeRobot has them.
NUM_TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
NUM_STEPS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}

GROUPS = {name: tuple(f"{name}-{index}" for index in range(number)) for name, number in NUM_TASKS.items()}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
DEFAULT_TASKS = GROUPS["libero_spatial"]
UNDERSTOOD: frozenset[str] = frozenset()
STATE_NAMES = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "finger_left", "finger_right")
ACTION_NAMES = ("dx", "dy", "dz", "drotation_x", "drotation_y", "drotation_z", "gripper")
HAS_EXPERT = False


def make_env(task: str, image_size: int) -> Any:
    """A LiberoEnv; ValueError with what to do where hf-libero or its assets are missing."""
    from envs.libero_env import LiberoEnv

    return LiberoEnv(task, image_size)
