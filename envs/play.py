"""Play: an expert that dawdles on its way to a goal which nobody is told.

Stretches of purposeful motion alternate with idling, with straying towards a random point of the table, and with going
back the way it came. What it did is right in the end; how it got there leaves something to cut.
"""

from collections.abc import Callable

import numpy as np

from envs.arena import TIP_RANGE
from envs.experts import limited

LENGTH_RATIO = 3  # control steps that play may take, as a multiple of the task's own
# A stretch of each kind lasts a number of control steps drawn from its range, both ends included.
PURPOSEFUL_STEPS = (2, 6)
IDLE_STEPS, STRAY_STEPS, RETREAT_STEPS = (2, 5), (3, 6), (2, 4)
PAUSES = ("idle", "stray", "retreat")


class Dawdler:
    """Actions of one episode of play. Call it once a control step, with the tip's position and the expert's action."""

    def __init__(self, rng: np.random.Generator, max_step: float) -> None:
        self.rng, self.max_step = rng, max_step
        self._way: list[np.ndarray] = []
        self._pause: Callable[[np.ndarray], np.ndarray] | None = None
        self._steps_left = self._draw(PURPOSEFUL_STEPS)

    def __call__(self, tip_xy: np.ndarray, expert_action: np.ndarray) -> np.ndarray:
        """A displacement (2,) in metres."""
        if self._steps_left == 0:
            self._begin_stretch()
        self._steps_left -= 1
        if self._pause is None:
            self._way.append(tip_xy.copy())
            return expert_action
        return self._pause(tip_xy)

    def _begin_stretch(self) -> None:
        """Pauses and purposeful motion take turns."""
        if self._pause is not None:
            self._pause, self._steps_left = None, self._draw(PURPOSEFUL_STEPS)
            return
        kind = PAUSES[self.rng.integers(len(PAUSES))]
        if kind == "idle":
            self._pause, self._steps_left = (lambda tip_xy: np.zeros(2)), self._draw(IDLE_STEPS)
        elif kind == "stray":
            point = self.rng.uniform(-TIP_RANGE, TIP_RANGE, 2)
            self._pause = lambda tip_xy: limited(point - tip_xy, self.max_step)
            self._steps_left = self._draw(STRAY_STEPS)
        else:
            self._pause, self._steps_left = self._retreat, self._draw(RETREAT_STEPS)

    def _retreat(self, tip_xy: np.ndarray) -> np.ndarray:
        """Towards where the purposeful stretches came from, the latest point first."""
        while len(self._way) > 1 and np.linalg.norm(self._way[-1] - tip_xy) < self.max_step / 2:
            self._way.pop()
        return limited(self._way[-1] - tip_xy, self.max_step)

    def _draw(self, steps: tuple[int, int]) -> int:
        return int(self.rng.integers(steps[0], steps[1] + 1))
