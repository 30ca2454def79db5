"""gym-pusht's PushT with float32 observations, an instruction and an episode length."""

import gym_pusht.envs.pusht
import numpy as np
from gymnasium import spaces

from envs.adapted_env import AdaptedEnv
from envs.pusht_suite import INSTRUCTION, TASKS

NUM_STEPS = 300
TABLE_SIZE = 512.0  # gym-pusht's unit of length is the pixel of a 512 x 512 table


class PushTEnv(AdaptedEnv):
    """A disc pushes a T onto its target.

    Observation: {"pixels": (image_size, image_size, 3) uint8, "agent_pos": (2,) float32, where the disc is}.
    Action: (2,) float32, where the disc shall go. Both in pixels of the 512 x 512 table. 10 Hz.
    Success: the T covers 95% of the target.

    Args:
        image_size: frame height and width in pixels.
        observe_pixels: False leaves out "pixels" and renders only in render().
    """

    robot_type = "pusht"

    def __init__(self, image_size: int = 96, observe_pixels: bool = True) -> None:
        self._simulation = gym_pusht.envs.pusht.PushTEnv(
            obs_type="environment_state_agent_pos", observation_width=image_size, observation_height=image_size
        )
        super().__init__(
            TASKS[0],
            INSTRUCTION,
            image_size,
            observe_pixels,
            self._simulation.metadata["render_fps"],
            NUM_STEPS,
            spaces.Box(-TABLE_SIZE, 2 * TABLE_SIZE, (2,), np.float32),
            spaces.Box(0.0, TABLE_SIZE, (2,), np.float32),
        )

    def _begin(self, seed: int) -> None:
        self._simulation.reset(seed=seed)

    def _advance(self, action: np.ndarray) -> bool:
        return self._simulation.step(action)[-1]["is_success"]

    def _state(self) -> np.ndarray:
        return np.array(self._simulation.agent.position)

    def render(self) -> np.ndarray:
        """The table from above, (image_size, image_size, 3) uint8."""
        return self._simulation._render()
