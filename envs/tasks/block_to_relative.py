"""Block to a relative direction: push a block some way from where it starts."""

import numpy as np

from envs.arena import BLOCK_RANGE
from envs.experts import push_towards
from envs.scene import Scene

DIAGONAL = 0.5**0.5
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, 1.0),
    "down": (0.0, -1.0),
    "up and left": (-DIAGONAL, DIAGONAL),
    "up and right": (DIAGONAL, DIAGONAL),
    "down and left": (-DIAGONAL, -DIAGONAL),
    "down and right": (DIAGONAL, -DIAGONAL),
}
DISTANCE = 0.12
ARRIVED = 0.04


class BlockToRelative:
    episode_length = 40
    min_blocks = 1
    starts_together = False

    def __init__(self) -> None:
        self.goal: np.ndarray = np.zeros(2)

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
        self.goal = scene.blocks_xy[0] + DISTANCE * np.array(DIRECTIONS[direction])
        away = np.linalg.norm(scene.blocks_xy - self.goal, axis=1)
        if np.abs(self.goal).max() > BLOCK_RANGE or (away[1:] < 0.09).any():
            return None
        return {"block": scene.blocks[0].name, "direction": direction}

    def is_success(self, scene: Scene) -> bool:
        return bool(np.linalg.norm(scene.blocks_xy[0] - self.goal) < ARRIVED)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return push_towards(scene, 0, self.goal)
