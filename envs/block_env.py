"""What our own suites share, blocks on a table and an instruction: arguments, spaces, the picture."""

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.arena import CONTROL_HZ
from envs.blocks import Block
from envs.instructions import SPLITS
from envs.rendering import mujoco, shared_renderer
from envs.variants import Variant


class BlockEnv(gymnasium.Env):
    """One family of tasks; a subclass draws scenes, moves the body and judges success.

    Args:
        family: the task's name.
        task: has min_blocks and episode_length.
        look: MJCF, of which the model is compiled.
        variant: colours and light, already in the look.
        max_blocks: slots for blocks in the model.
        num_blocks, split, image_size, observe_pixels, render_mode: of the environments' own arguments.
        max_episode_steps: control steps until truncation.
        action_space: float32 box (A,). state_dim: numbers of agent_pos.

    Raises:
        ValueError: for arguments outside of what the environments list.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    action_space: spaces.Box
    observation_space: spaces.Dict

    def __init__(
        self,
        family: str,
        task: Any,
        look: str,
        variant: Variant,
        max_blocks: int,
        num_blocks: int | tuple[int, int],
        split: str,
        image_size: int,
        observe_pixels: bool,
        render_mode: str | None,
        max_episode_steps: int,
        action_space: spaces.Box,
        state_dim: int,
    ) -> None:
        low, high = (num_blocks, num_blocks) if isinstance(num_blocks, int) else num_blocks
        if not task.min_blocks <= low <= high <= max_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}, expected {task.min_blocks} to {max_blocks} for {family}, "
                "as one number or as (lowest, highest)"
            )
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
        if image_size < 16:
            raise ValueError(f"image_size is {image_size}, expected at least 16 pixels")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}, expected 'rgb_array' or None")
        self.family, self.num_blocks, self.split, self.variant = family, (low, high), split, variant
        self.image_size, self.observe_pixels, self.render_mode = image_size, observe_pixels, render_mode
        self._max_episode_steps = max_episode_steps
        self.action_space = action_space
        observation_spaces: dict[str, spaces.Space] = {"agent_pos": spaces.Box(-0.5, 0.5, (state_dim,), np.float32)}
        if observe_pixels:
            observation_spaces["pixels"] = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(observation_spaces)
        self.look = look
        self.model = mujoco.MjModel.from_xml_string(look)
        self.data = mujoco.MjData(self.model)
        self._blocks: tuple[Block, ...] = ()
        self._num_steps = 0
        self.instruction = ""

    @property
    def task(self) -> str:
        """The family's name, by which evaluations group episodes."""
        return self.family

    @property
    def task_description(self) -> str:
        """The instruction of the present episode, which is what a policy is told."""
        return self.instruction

    @property
    @abstractmethod
    def agent_pos(self) -> np.ndarray:
        """The body's state (S,), metres."""

    def render(self) -> np.ndarray:
        """The camera's frame, (image_size, image_size, 3) uint8."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        return shared_renderer(self.look, self.image_size).render(self.model, self.data)

    def _observation(self) -> dict[str, np.ndarray]:
        observation = {"agent_pos": self.agent_pos.astype(np.float32)}
        if self.observe_pixels:
            observation["pixels"] = self.render()
        return observation
