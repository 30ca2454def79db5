"""Reach: move the tip to a block; a touch is enough."""

import numpy as np

from envs.arena import CONTACT_DISTANCE
from envs.experts import limited
from envs.scene import Scene

REACHED = CONTACT_DISTANCE + 0.01
FAR_ENOUGH = 0.16  # at the start, so that a random walk seldom succeeds


class Reach:
    episode_length = 30
    min_blocks = 1
    starts_together = False

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        if np.linalg.norm(scene.tip_xy - scene.blocks_xy[0]) < FAR_ENOUGH:
            return None
        return {"block": scene.blocks[0].name}

    def is_success(self, scene: Scene) -> bool:
        return bool(np.linalg.norm(scene.tip_xy - scene.blocks_xy[0]) < REACHED)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return limited(scene.blocks_xy[0] - scene.tip_xy, scene.max_step)
