"""Separate blocks: two blocks start in touch; push one away from the other."""

import numpy as np

from envs.blocks import BLOCK_RADIUS
from envs.experts import push_towards, unit
from envs.scene import Scene

APART = 2 * BLOCK_RADIUS + 0.08


class SeparateBlocks:
    episode_length = 40
    min_blocks = 2
    starts_together = True

    def __init__(self) -> None:
        self.mover = 0

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        # The expert pushes the one nearer the middle, which has room to leave.
        self.mover = int(np.argmin(np.linalg.norm(scene.blocks_xy[:2], axis=1)))
        return {"block": scene.blocks[0].name, "target": scene.blocks[1].name}

    def is_success(self, scene: Scene) -> bool:
        return bool(np.linalg.norm(scene.blocks_xy[0] - scene.blocks_xy[1]) > APART)

    def expert_action(self, scene: Scene) -> np.ndarray:
        position = scene.blocks_xy[self.mover]
        away = position - scene.blocks_xy[1 - self.mover]
        gap = float(np.linalg.norm(away)) - 2 * BLOCK_RADIUS
        away = unit(away)
        across = np.array([-away[1], away[0]])
        if np.dot(across, position) > 0:
            across = -across
        # The tip does not fit between touching blocks, so the push starts sideways.
        straight = float(np.clip(gap / 0.06, 0.35, 1.0))
        direction = straight * away + np.sqrt(1 - straight**2) * across
        return push_towards(scene, self.mover, position + 0.12 * direction)
