"""Place: put a block on one of two plates, and let go of it."""

import numpy as np

from envs.gripper.arena import BLOCK_SIZE, PLATE_RADIUS
from envs.gripper.expert import put
from envs.gripper.scene import Scene


class Place:
    episode_length = 100
    min_blocks = 1
    num_plates = 2
    hold_steps = 2

    def begin(self, scene: Scene) -> dict[str, str]:
        return {"block": scene.blocks[0].name, "target": f"{scene.plate_colours[0]} plate"}

    def is_success(self, scene: Scene) -> bool:
        away = float(np.linalg.norm(scene.positions[0, :2] - scene.plates_xy[0]))
        return away < PLATE_RADIUS and scene.positions[0, 2] < BLOCK_SIZE and scene.is_released(0)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return put(scene, 0, np.array([*scene.plates_xy[0], BLOCK_SIZE / 2]))
