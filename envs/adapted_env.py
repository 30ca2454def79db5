"""What the environments around published benchmarks share: spaces, checks, and the end of an episode."""

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class AdaptedEnv(gymnasium.Env):
    """A SuiteEnv (envs/suites.py) of a simulator that a subclass begins, advances and draws.

    Reward: 1 on the step that succeeds, else 0; success ends the episode, the step limit truncates it.

    Args:
        task, instruction: names and sentence of the episodes.
        image_size: frame height and width in pixels, at least 16.
        observe_pixels: False leaves out "pixels" and renders only in render().
        control_hz: actions per second.
        num_steps: until truncation.
        state_space, action_space: float32 boxes, (S,) and (A,).

    Raises:
        ValueError: for an image_size that is too small.
    """

    action_space: spaces.Box
    observation_space: spaces.Dict
    robot_type: str

    def __init__(
        self,
        task: str,
        instruction: str,
        image_size: int,
        observe_pixels: bool,
        control_hz: int,
        num_steps: int,
        state_space: spaces.Box,
        action_space: spaces.Box,
    ) -> None:
        if image_size < 16:
            raise ValueError(f"image_size is {image_size}, expected at least 16 pixels")
        self.task, self.instruction = task, instruction
        self.image_size, self.observe_pixels = image_size, observe_pixels
        self.render_mode = "rgb_array"
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": control_hz}
        self._max_episode_steps = num_steps
        self._num_steps = 0
        self.action_space = action_space
        observation_spaces: dict[str, spaces.Space] = {"agent_pos": state_space}
        if observe_pixels:
            observation_spaces["pixels"] = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(observation_spaces)

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Set up the episode of this seed, below 2**31."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> bool:
        """Carry out an action (A,) float64 within the bounds; True on success."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """What the robot knows of itself (S,)."""

    @abstractmethod
    def render(self) -> np.ndarray:
        """The camera's frame, (image_size, image_size, 3) uint8."""

    @property
    def task_description(self) -> str:
        """The instruction, under LeRobot's name."""
        return self.instruction

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._num_steps = 0
        return self._observation(), {"is_success": False, "instruction": self.instruction}

    def step(self, action: np.ndarray):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action is {action}, expected {self.action_space.shape[0]} finite numbers")
        action = np.clip(action, self.action_space.low.astype(np.float64), self.action_space.high.astype(np.float64))
        success = bool(self._advance(action))
        self._num_steps += 1
        info = {
            "is_success": success,
            "instruction": self.instruction,
            "executed_action": action.astype(np.float32),
        }
        truncated = not success and self._num_steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, info

    def _observation(self) -> dict[str, np.ndarray]:
        observation = {"agent_pos": self._state().astype(np.float32)}
        if self.observe_pixels:
            observation["pixels"] = self.render()
        return observation
