"""Simulated ALOHA (Zhao et al., 2023, arXiv 2304.13705; scenes of gym-aloha) as `lapa evaluate` sees it.

env=aloha/transfer_cube    env=aloha/insertion    (env=aloha is both)
"""

from typing import Any

# The sentences of LeRobot's published data sets.
INSTRUCTIONS = {
    "transfer_cube": "Pick up the cube with the right arm and transfer it to the left arm.",
    "insertion": "Insert the peg into the socket.",
}
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")

TASKS = tuple(INSTRUCTIONS)
DEFAULT_TASKS = TASKS
GROUPS: dict[str, tuple[str, ...]] = {}
UNDERSTOOD: frozenset[str] = frozenset()
STATE_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS)
ACTION_NAMES = STATE_NAMES
HAS_EXPERT = False


def make_env(task: str, image_size: int) -> Any:
    """An AlohaEnv; ValueError with the install command where gym-aloha is missing."""
    try:
        from envs.aloha_env import AlohaEnv
    except ModuleNotFoundError:
        raise ValueError("env=aloha needs the package gym-aloha: pip install 'lerobot_policy_lapa[aloha]'") from None
    return AlohaEnv(task, image_size)
