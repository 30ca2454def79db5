"""Pick: lift a block off the table."""

import numpy as np

from envs.gripper.arena import BLOCK_SIZE
from envs.gripper.expert import CLOSED, grasp, move
from envs.gripper.scene import Scene

LIFT = 0.05


class Pick:
    episode_length = 60
    min_blocks = 1
    num_plates = 0
    hold_steps = 3

    def begin(self, scene: Scene) -> dict[str, str]:
        return {"block": scene.blocks[0].name}

    def is_success(self, scene: Scene) -> bool:
        return bool(scene.is_held(0) and scene.positions[0, 2] > BLOCK_SIZE / 2 + LIFT)

    def expert_action(self, scene: Scene) -> np.ndarray:
        if scene.is_held(0):
            height = BLOCK_SIZE / 2 + LIFT + 0.02
            return move(np.array([0, 0, height - scene.positions[0, 2]]), CLOSED)
        return grasp(scene, 0)
