"""The privileged state that tasks and experts read."""

from dataclasses import dataclass

import numpy as np

from envs.blocks import Block


@dataclass
class Scene:
    """Metres in the table's plane, x to the right and y away from the viewer.

    By convention block 0 is what the instruction is about and block 1 its reference, where there is one.
    """

    tip_xy: np.ndarray  # (2,)
    blocks_xy: np.ndarray  # (num_blocks, 2)
    blocks: tuple[Block, ...]
    max_step: float  # how far this body's tip can go in one control step
