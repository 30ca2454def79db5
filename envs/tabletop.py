"""The environment: a tip moved by 2-D displacements at 10 Hz pushes blocks on a table, as an instruction says.

After Language Table (Lynch et al., 2022, "Interactive Language"), in MuJoCo and made for small machines.
"""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.arena import BLOCK_RANGE, CONTACT_DISTANCE, CONTROL_HZ, MAX_STEP, NUM_SUBSTEPS, TIP_RANGE, arena_xml
from envs.block_env import BlockEnv
from envs.blocks import ALL_BLOCKS, BLOCK_RADIUS, HELD_OUT_BLOCKS, MAX_BLOCKS, SHAPES, TRAIN_BLOCKS
from envs.instructions import write_instruction
from envs.rendering import mujoco
from envs.scene import Scene
from envs.tasks import make_task
from envs.variants import Variant, get_variant

SPAWN_RANGE = BLOCK_RANGE - 0.02
BLOCK_GAP = 2 * BLOCK_RADIUS + 0.022  # between the centres of two blocks at the start
TIP_GAP = CONTACT_DISTANCE + 0.022


class TabletopEnv(BlockEnv):
    """One family of tasks on the table.

    Observation: {"pixels": (image_size, image_size, 3) uint8, "agent_pos": (2,) float32, the tip in metres}.
    Action: (2,) float32, the tip's displacement in metres, each within +-0.03; larger ones are clipped.
    Reward: 1 on the step that succeeds, else 0; success ends the episode, the step limit truncates it.
    info: is_success, instruction, and after a step executed_action, the action after clipping to the workspace.

    Args:
        family: one of envs.FAMILIES.
        image_size: frame height and width in pixels, at least 16.
        num_blocks: blocks on the table, or the lowest and highest number to draw from.
        split: "train", or "unseen" (held-out blocks and phrasings), or "unseen_blocks", "unseen_phrases".
        variant: name of a preset in envs.variants, or a Variant.
        episode_length: control steps until truncation; None takes the task's own.
        observe_pixels: False leaves out "pixels" and renders only in render().

    Raises:
        ValueError: for values outside what is listed here.
    """

    def __init__(
        self,
        family: str,
        image_size: int = 64,
        num_blocks: int | tuple[int, int] = (4, 8),
        split: str = "train",
        variant: str | Variant = "default",
        episode_length: int | None = None,
        observe_pixels: bool = True,
        render_mode: str | None = "rgb_array",
    ) -> None:
        variant = get_variant(variant)
        # A body that moves less per step is given more steps.
        slowness = 1 / min(1.0, variant.action_gain)
        self._task = make_task(family)
        super().__init__(
            family,
            self._task,
            arena_xml(variant, image_size),
            variant,
            MAX_BLOCKS,
            num_blocks,
            split,
            image_size,
            observe_pixels,
            render_mode,
            max_episode_steps=episode_length or math.ceil(self._task.episode_length * slowness),
            action_space=spaces.Box(-MAX_STEP, MAX_STEP, (2,), np.float32),
            state_dim=2,
        )
        self._max_step = MAX_STEP * variant.action_gain
        self._disc_ids = [self.model.geom(f"block{slot}").id for slot in range(MAX_BLOCKS)]
        self._drawn_ids = [
            {shape: self.model.geom(f"block{slot}_{shape}").id for shape in SHAPES} for slot in range(MAX_BLOCKS)
        ]

    @property
    def robot_type(self) -> str:
        """The body's name in data sets."""
        return f"tabletop_{self.variant.name}"

    @property
    def agent_pos(self) -> np.ndarray:
        """The tip (2,), metres."""
        return self.data.qpos[:2]

    @property
    def scene(self) -> Scene:
        """The true state: the tip (2,) and the blocks on the table (n, 2), metres."""
        position = self.data.qpos
        blocks_xy = position[2:].reshape(MAX_BLOCKS, 3)[: len(self._blocks), :2]
        return Scene(position[:2].copy(), blocks_xy.copy(), self._blocks, self._max_step)

    def expert_action(self) -> np.ndarray:
        """What the family's scripted expert would do now, (2,) float32 metres, from the true state."""
        action = self._task.expert_action(self.scene) / self.variant.action_gain
        return np.clip(action, -MAX_STEP, MAX_STEP).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        words = None
        while words is None:
            scene = self._draw_scene()
            words = self._task.begin(scene, self.np_random)
        self._place(scene)
        self.instruction = write_instruction(self.family, words, self.split, self.np_random)
        self._num_steps = 0
        return self._observation(), {"is_success": False, "instruction": self.instruction}

    def step(self, action: np.ndarray):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action}, expected 2 finite displacements in metres")
        gain = self.variant.action_gain
        tip = self.data.qpos[:2]
        target = np.clip(tip + gain * np.clip(action, -MAX_STEP, MAX_STEP), -TIP_RANGE, TIP_RANGE)
        displacement = target - tip
        self.data.ctrl[:] = displacement * CONTROL_HZ
        mujoco.mj_step(self.model, self.data, NUM_SUBSTEPS)
        self._num_steps += 1
        success = self._task.is_success(self.scene)
        info = {
            "is_success": success,
            "instruction": self.instruction,
            "executed_action": (displacement / gain).astype(np.float32),
        }
        truncated = not success and self._num_steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, info

    def _draw_scene(self) -> Scene:
        rng = self.np_random
        num_blocks = int(rng.integers(self.num_blocks[0], self.num_blocks[1] + 1))
        if self.split in ("unseen", "unseen_blocks"):
            first = HELD_OUT_BLOCKS[rng.integers(len(HELD_OUT_BLOCKS))]
            others = [block for block in ALL_BLOCKS if block != first]
        else:
            first = TRAIN_BLOCKS[rng.integers(len(TRAIN_BLOCKS))]
            others = [block for block in TRAIN_BLOCKS if block != first]
        drawn = rng.choice(len(others), num_blocks - 1, replace=False)
        blocks = (first, *(others[i] for i in drawn))
        placed: list[np.ndarray] = []
        while len(placed) < num_blocks:
            point = rng.uniform(-SPAWN_RANGE, SPAWN_RANGE, 2)
            neighbours = placed
            if self._task.starts_together and len(placed) == 1:
                angle = rng.uniform(-np.pi, np.pi)
                point = placed[0] + (2 * BLOCK_RADIUS + 0.004) * np.array([np.cos(angle), np.sin(angle)])
                neighbours = []
            on_table = np.abs(point).max() <= SPAWN_RANGE
            if on_table and all(np.linalg.norm(point - other) > BLOCK_GAP for other in neighbours):
                placed.append(point)
        blocks_xy = np.array(placed)
        tip = rng.uniform(-TIP_RANGE, TIP_RANGE, 2)
        while np.linalg.norm(blocks_xy - tip, axis=1).min() < TIP_GAP:
            tip = rng.uniform(-TIP_RANGE, TIP_RANGE, 2)
        return Scene(tip, blocks_xy, blocks, self._max_step)

    def _place(self, scene: Scene) -> None:
        """Put the drawn scene into the simulation; the slots left over neither show nor collide."""
        mujoco.mj_resetData(self.model, self.data)
        self._blocks = scene.blocks
        self.data.qpos[:2] = scene.tip_xy
        poses = self.data.qpos[2:].reshape(MAX_BLOCKS, 3)
        turns = self.np_random.uniform(-np.pi, np.pi, MAX_BLOCKS)
        for slot in range(MAX_BLOCKS):
            present = slot < len(scene.blocks)
            self.model.geom_contype[self._disc_ids[slot]] = present
            self.model.geom_conaffinity[self._disc_ids[slot]] = present
            for shape, geom in self._drawn_ids[slot].items():
                shown = present and scene.blocks[slot].shape == shape
                self.model.geom_rgba[geom, 3] = shown
                if shown:
                    self.model.geom_rgba[geom, :3] = self.variant.block_rgb[scene.blocks[slot].colour]
                    poses[slot] = (*scene.blocks_xy[slot], turns[slot])
        mujoco.mj_forward(self.model, self.data)
