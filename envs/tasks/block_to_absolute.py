"""Block to absolute location: push a block to one of nine places on the table."""

import numpy as np

from envs.experts import push_towards
from envs.scene import Scene

EDGE = 0.19  # how far from the middle of the table the places at its sides are, metres
PLACES = {
    "center": (0.0, 0.0),
    "left": (-EDGE, 0.0),
    "right": (EDGE, 0.0),
    "top": (0.0, EDGE),
    "bottom": (0.0, -EDGE),
    "top left": (-EDGE, EDGE),
    "top right": (EDGE, EDGE),
    "bottom left": (-EDGE, -EDGE),
    "bottom right": (EDGE, -EDGE),
}
ARRIVED = 0.05
FAR_ENOUGH = 0.14


class BlockToAbsolute:
    episode_length = 60
    min_blocks = 1
    starts_together = False

    def __init__(self) -> None:
        self.goal: np.ndarray = np.zeros(2)

    def begin(self, scene: Scene, rng: np.random.Generator) -> dict[str, str] | None:
        place = list(PLACES)[rng.integers(len(PLACES))]
        self.goal = np.array(PLACES[place])
        away = np.linalg.norm(scene.blocks_xy - self.goal, axis=1)
        # The place itself must be free of other blocks.
        if away[0] < FAR_ENOUGH or (away[1:] < 0.09).any():
            return None
        return {"block": scene.blocks[0].name, "place": place}

    def is_success(self, scene: Scene) -> bool:
        return bool(np.linalg.norm(scene.blocks_xy[0] - self.goal) < ARRIVED)

    def expert_action(self, scene: Scene) -> np.ndarray:
        return push_towards(scene, 0, self.goal)
