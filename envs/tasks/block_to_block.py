"""Block to block: push one block until it is next to another."""

import numpy as np

from envs.blocks import BLOCK_RADIUS
from envs.experts import push_towards
from envs.scene import Scene

NEXT_TO = 2 * BLOCK_RADIUS + 0.02
FAR_ENOUGH = 0.16


class BlockToBlock:
    episode_length = 60
    min_blocks = 2
    starts_together = False

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        if np.linalg.norm(scene.blocks_xy[0] - scene.blocks_xy[1]) < FAR_ENOUGH:
            return None
        return {"block": scene.blocks[0].name, "target": scene.blocks[1].name}

    def is_success(self, scene: Scene) -> bool:
        return bool(np.linalg.norm(scene.blocks_xy[0] - scene.blocks_xy[1]) < NEXT_TO)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return push_towards(scene, 0, scene.blocks_xy[1], reference=1)
