"""One file a family. A task names its goal in words, tells success, and knows what an expert would do."""

from typing import Protocol

import numpy as np

from envs.gripper.scene import Scene
from envs.gripper.tasks.pick import Pick
from envs.gripper.tasks.place import Place
from envs.gripper.tasks.stack import Stack


class Task(Protocol):
    """A family of instructions; it keeps nothing from one step to the next."""

    episode_length: int  # control steps
    min_blocks: int
    num_plates: int
    hold_steps: int  # consecutive control steps for which is_success must be true

    def begin(self, scene: Scene) -> dict[str, str]:
        """The words of the instruction in this scene."""

    def is_success(self, scene: Scene) -> bool: ...

    def expert_action(self, scene: Scene) -> np.ndarray:
        """The expert's action (4,), metres."""


def make_task(family: str) -> Task:
    """A fresh task of the family; ValueError for an unknown one."""
    tasks: dict[str, type[Task]] = {"pick": Pick, "place": Place, "stack": Stack}
    if family not in tasks:
        raise ValueError(f"family is {family!r}, expected one of {sorted(tasks)}")
    return tasks[family]()
