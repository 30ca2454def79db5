"""Block to a side of another block: push one block to the left of, right of, above or below another."""

import numpy as np

from envs.arena import BLOCK_RANGE
from envs.blocks import BLOCK_RADIUS
from envs.experts import push_towards
from envs.scene import Scene

SIDES = {"left of": (-1.0, 0.0), "right of": (1.0, 0.0), "above": (0.0, 1.0), "below": (0.0, -1.0)}
OFFSET = 2 * BLOCK_RADIUS + 0.025  # from the other block's centre to the goal, metres
ARRIVED = 0.04
FAR_ENOUGH = 0.14


class BlockToSide:
    episode_length = 60
    min_blocks = 2
    starts_together = False

    def __init__(self) -> None:
        self.offset: np.ndarray = np.zeros(2)

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        side = list(SIDES)[rng.integers(len(SIDES))]
        self.offset = OFFSET * np.array(SIDES[side])
        goal = scene.blocks_xy[1] + self.offset
        away = np.linalg.norm(scene.blocks_xy - goal, axis=1)
        if np.abs(goal).max() > BLOCK_RANGE - 0.02 or away[0] < FAR_ENOUGH or (away[2:] < 0.09).any():
            return None
        return {"block": scene.blocks[0].name, "target": scene.blocks[1].name, "side": side}

    def is_success(self, scene: Scene) -> bool:
        goal = scene.blocks_xy[1] + self.offset
        return bool(np.linalg.norm(scene.blocks_xy[0] - goal) < ARRIVED)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return push_towards(scene, 0, scene.blocks_xy[1] + self.offset)
