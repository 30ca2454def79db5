"""Stack: put a block on top of another, and let go of it."""

import numpy as np

from envs.gripper.arena import BLOCK_SIZE
from envs.gripper.expert import put
from envs.gripper.scene import Scene


class Stack:
    episode_length = 100
    min_blocks = 2
    num_plates = 0
    hold_steps = 2

    def begin(self, scene: Scene) -> dict[str, str]:
        return {"block": scene.blocks[0].name, "target": scene.blocks[1].name}

    def is_success(self, scene: Scene) -> bool:
        offset = scene.positions[0] - scene.positions[1]
        on_top = abs(offset[2] - BLOCK_SIZE) < 0.005 and np.linalg.norm(offset[:2]) < BLOCK_SIZE / 2
        return bool(on_top and scene.is_released(0))

    def expert_action(self, scene: Scene) -> np.ndarray:
        return put(scene, 0, scene.positions[1] + np.array([0, 0, BLOCK_SIZE]))
