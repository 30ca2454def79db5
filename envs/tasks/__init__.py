"""One file a family. A task draws a goal, names it in words, tells success, and knows what an expert would do."""

from typing import Protocol

import numpy as np

from envs.scene import Scene
from envs.tasks.block_to_absolute import BlockToAbsolute
from envs.tasks.block_to_block import BlockToBlock
from envs.tasks.block_to_relative import BlockToRelative
from envs.tasks.block_to_side import BlockToSide
from envs.tasks.reach import Reach
from envs.tasks.separate_blocks import SeparateBlocks


class Task(Protocol):
    """A family of instructions. One object serves one environment and holds the present episode's goal."""

    episode_length: int  # control steps
    min_blocks: int
    starts_together: bool  # blocks 0 and 1 touch at the start

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        """Draw a goal in this scene. Returns the words of the instruction, or None to ask for another scene."""

    def is_success(self, scene: Scene) -> bool: ...

    def expert_action(self, scene: Scene) -> np.ndarray:
        """The expert's displacement of the tip (2,), metres."""


def make_task(family: str) -> Task:
    """A fresh task of the family; ValueError for an unknown one."""
    tasks: dict[str, type[Task]] = {
        "reach": Reach,
        "block_to_block": BlockToBlock,
        "block_to_absolute": BlockToAbsolute,
        "block_to_side": BlockToSide,
        "block_to_relative": BlockToRelative,
        "separate_blocks": SeparateBlocks,
    }
    if family not in tasks:
        raise ValueError(f"family is {family!r}, expected one of {sorted(tasks)}")
    return tasks[family]()
