"""The environment: a gripper of four degrees of freedom at 10 Hz picks, places and stacks, as an instruction says."""

from typing import Any

import numpy as np
from gymnasium import spaces

from envs.arena import CONTROL_HZ
from envs.block_env import BlockEnv
from envs.blocks import COLOURS, Block
from envs.gripper.arena import (
    BLOCK_SIZE,
    MAX_BLOCKS,
    MAX_OPENING,
    MAX_PLATES,
    MAX_STEP,
    NUM_SUBSTEPS,
    SHAPES,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    arena_xml,
    look_variant,
)
from envs.gripper.scene import Scene
from envs.gripper.tasks import make_task
from envs.instructions import write_instruction
from envs.rendering import mujoco
from envs.variants import Variant

ALL_BLOCKS = tuple(Block(colour, shape) for colour in COLOURS for shape in SHAPES)
# As in envs.blocks: never on the table in the train split, though each of their words is.
HELD_OUT_BLOCKS = (Block("red", "cylinder"), Block("yellow", "cube"))
TRAIN_BLOCKS = tuple(block for block in ALL_BLOCKS if block not in HELD_OUT_BLOCKS)

SPAWN_RANGE = 0.16  # of blocks and plates, in x and y
GAP = 0.105  # between the centres of two blocks or plates at the start: the open fingers fit in
START_Z = (0.12, 0.18)
ACTION_LOW = np.array([-MAX_STEP, -MAX_STEP, -MAX_STEP, 0.0])
ACTION_HIGH = np.array([MAX_STEP, MAX_STEP, MAX_STEP, MAX_OPENING])
MAX_TURN = 0.3  # of a block about the vertical, radians; the closing fingers turn it straight


class GripperEnv(BlockEnv):
    """One family of tasks of the gripper.

    Observation: {"pixels": (image_size, image_size, 3) uint8, "agent_pos": (4,) float32: x, y, z of the point between
    the finger pads, and the opening between them, metres}.
    Action: (4,) float32, metres: the displacement in x, y and z, each within +-0.03, and the opening that the fingers
    shall have, 0 to 0.08. Larger ones are clipped. Fingers that meet a block hold it with GRIP_FORCE_N each.
    Reward: 1 on the step that succeeds, else 0; success ends the episode, the step limit truncates it.
    info: is_success, instruction, and after a step executed_action, the action after clipping to the workspace.

    Args:
        family: one of envs.gripper.FAMILIES.
        image_size: frame height and width in pixels, at least 16.
        num_blocks: blocks on the table, or the lowest and highest number to draw from.
        split: "train", or "unseen" (held-out blocks and phrasings), or "unseen_blocks", "unseen_phrases".
        variant: one of envs.gripper.arena.VARIANTS, or a Variant, of which light, table and palette count.
        episode_length: control steps until truncation; None takes the task's own.
        observe_pixels: False leaves out "pixels" and renders only in render().

    Raises:
        ValueError: for values outside what is listed here.
    """

    def __init__(
        self,
        family: str,
        image_size: int = 64,
        num_blocks: int | tuple[int, int] = (2, 4),
        split: str = "train",
        variant: str | Variant = "default",
        episode_length: int | None = None,
        observe_pixels: bool = True,
        render_mode: str | None = "rgb_array",
    ) -> None:
        variant = look_variant(variant)
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
            max_episode_steps=episode_length or self._task.episode_length,
            action_space=spaces.Box(ACTION_LOW.astype(np.float32), ACTION_HIGH.astype(np.float32), dtype=np.float32),
            state_dim=4,
        )
        slots = range(MAX_BLOCKS)
        self._body_ids = np.array([self.model.body(f"block{slot}").id for slot in slots])
        self._geom_ids = [{shape: self.model.geom(f"block{slot}_{shape}").id for shape in SHAPES} for slot in slots]
        self._plate_ids = [self.model.geom(f"plate{slot}").id for slot in range(MAX_PLATES)]
        self._finger_ids = [self.model.geom(name).id for name in ("left", "right")]
        # Addresses in qpos: x, y, z and the two fingers come first, then a pose of seven numbers a block.
        self._poses = self.data.qpos[5:].reshape(MAX_BLOCKS, 7)
        self._plate_colours: tuple[str, ...] = ()
        self._num_good_steps = 0

    @property
    def robot_type(self) -> str:
        """The body's name in data sets."""
        return f"gripper_{self.variant.name}"

    @property
    def agent_pos(self) -> np.ndarray:
        """x, y, z and opening (4,), metres."""
        position = self.data.qpos[:5]
        return np.array([*position[:3], position[3] + position[4]])

    @property
    def scene(self) -> Scene:
        """The true state."""
        num_blocks = len(self._blocks)
        x, y, z, opening = self.agent_pos
        velocities = self.data.qvel[5:].reshape(MAX_BLOCKS, 6)
        return Scene(
            np.array([x, y, z]),
            opening,
            self._poses[:num_blocks, :3].copy(),
            np.linalg.norm(velocities[:num_blocks, :3], axis=1),
            self._touched()[:num_blocks],
            self._blocks,
            self.model.geom_pos[self._plate_ids[: len(self._plate_colours)], :2].copy(),
            self._plate_colours,
        )

    def expert_action(self) -> np.ndarray:
        """What the family's scripted expert would do now, (4,) float32 metres, from the true state."""
        return self._task.expert_action(self.scene).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._draw_scene()
        self.instruction = write_instruction(self.family, self._task.begin(self.scene), self.split, self.np_random)
        self._num_steps = self._num_good_steps = 0
        return self._observation(), {"is_success": False, "instruction": self.instruction}

    def step(self, action: np.ndarray):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action}, expected 3 finite displacements and an opening in metres")
        executed = np.clip(action, ACTION_LOW, ACTION_HIGH)
        position = self.data.qpos[:3]
        executed[:3] = np.clip(position + executed[:3], WORKSPACE_LOW, WORKSPACE_HIGH) - position
        self.data.ctrl[:3] = executed[:3] * CONTROL_HZ
        self.data.ctrl[3] = executed[3]
        mujoco.mj_step(self.model, self.data, NUM_SUBSTEPS)
        self._num_steps += 1
        self._num_good_steps = self._num_good_steps + 1 if self._task.is_success(self.scene) else 0
        success = self._num_good_steps >= self._task.hold_steps
        info = {
            "is_success": success,
            "instruction": self.instruction,
            "executed_action": executed.astype(np.float32),
        }
        truncated = not success and self._num_steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, info

    def _touched(self) -> np.ndarray:
        """(MAX_BLOCKS, 2) bool: which finger touches which block."""
        touched = np.zeros((MAX_BLOCKS, 2), bool)
        pairs = self.data.contact.geom
        for side, finger in enumerate(self._finger_ids):
            others = pairs[(pairs == finger).any(1)].sum(1) - finger
            touched[:, side] = np.isin(self._body_ids, self.model.geom_bodyid[others])
        return touched

    def _draw_scene(self) -> None:
        """Blocks, plates and the gripper anew; the slots left over neither show nor collide nor fall."""
        rng = self.np_random
        num_blocks = int(rng.integers(self.num_blocks[0], self.num_blocks[1] + 1))
        unseen = self.split in ("unseen", "unseen_blocks")
        candidates, known = (HELD_OUT_BLOCKS, ALL_BLOCKS) if unseen else (TRAIN_BLOCKS, TRAIN_BLOCKS)
        first = candidates[rng.integers(len(candidates))]
        others = [block for block in known if block != first]
        drawn = rng.choice(len(others), num_blocks - 1, replace=False)
        self._blocks = (first, *(others[i] for i in drawn))
        num_plates = self._task.num_plates
        self._plate_colours = tuple(COLOURS[i] for i in rng.choice(len(COLOURS), num_plates, replace=False))

        places: list[np.ndarray] = []
        while len(places) < num_blocks + num_plates:
            point = rng.uniform(-SPAWN_RANGE, SPAWN_RANGE, 2)
            if all(np.linalg.norm(point - other) > GAP for other in places):
                places.append(point)

        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:2] = rng.uniform(-SPAWN_RANGE, SPAWN_RANGE, 2)
        self.data.qpos[2] = rng.uniform(*START_Z)
        self.data.qpos[3:5] = MAX_OPENING / 2
        self.data.ctrl[3] = MAX_OPENING
        turns = rng.uniform(-MAX_TURN, MAX_TURN, MAX_BLOCKS)
        for slot in range(MAX_BLOCKS):
            present = slot < num_blocks
            self.model.body_gravcomp[self._body_ids[slot]] = not present
            for shape, geom in self._geom_ids[slot].items():
                shown = present and self._blocks[slot].shape == shape
                self.model.geom_contype[geom] = self.model.geom_conaffinity[geom] = shown
                self.model.geom_rgba[geom, 3] = shown
                if shown:
                    self.model.geom_rgba[geom, :3] = self.variant.block_rgb[self._blocks[slot].colour]
            xy = places[slot] if present else np.zeros(2)
            self._poses[slot] = (*xy, BLOCK_SIZE / 2, np.cos(turns[slot] / 2), 0, 0, np.sin(turns[slot] / 2))
        for slot, geom in enumerate(self._plate_ids):
            shown = slot < num_plates
            self.model.geom_rgba[geom, 3] = shown
            if shown:
                self.model.geom_rgba[geom, :3] = self.variant.block_rgb[self._plate_colours[slot]]
                self.model.geom_pos[geom, :2] = places[num_blocks + slot]
        mujoco.mj_forward(self.model, self.data)
