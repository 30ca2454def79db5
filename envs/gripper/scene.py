"""The privileged state that the gripper's tasks and experts read."""

from dataclasses import dataclass

import numpy as np

from envs.blocks import Block


@dataclass
class Scene:
    """Metres: x to the right, y away from the viewer, z up from the table.

    By convention block 0 is what the instruction is about, block 1 or plate 0 its target, where there is one.
    """

    gripper: np.ndarray  # (3,), between the finger pads
    opening: float  # between the fingers
    positions: np.ndarray  # (num_blocks, 3), the blocks' centres
    speeds: np.ndarray  # (num_blocks,) metres a second
    touched: np.ndarray  # (num_blocks, 2) bool: by the left and by the right finger
    blocks: tuple[Block, ...]
    plates_xy: np.ndarray  # (num_plates, 2)
    plate_colours: tuple[str, ...]

    def is_held(self, block: int) -> bool:
        return bool(self.touched[block].all())

    def is_released(self, block: int) -> bool:
        """Touched by neither finger, and at rest."""
        return bool(not self.touched[block].any() and self.speeds[block] < 0.02)
