"""gym-aloha's scenes without dm_control, which renders three cameras at 640 x 480 for every observation."""

import functools
import threading

import numpy as np
from gym_aloha.constants import (
    ASSETS_DIR,
    DT,
    START_ARM_POSE,
    normalize_puppet_gripper_position,
    unnormalize_puppet_gripper_position,
)
from gym_aloha.utils import sample_box_pose, sample_insertion_pose
from gymnasium import spaces

from envs.adapted_env import AdaptedEnv
from envs.aloha_suite import INSTRUCTIONS
from envs.rendering import SUPERSAMPLING, FrameRenderer, mujoco

NUM_STEPS = 300
CAMERA = "top"
ARM_JOINTS = 6
STATE_LIMIT = 4.0  # radians; grippers stay near [0, 1]


def load_model(task: str, image_size: int) -> mujoco.MjModel:
    """The scene with what makes software rendering fast."""
    model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{task}.xml"))
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = SUPERSAMPLING * image_size
    return model


class AlohaEnv(AdaptedEnv):
    """Two ViperX arms moved to joint positions at 50 Hz.

    Observation: {"pixels": (image_size, image_size, 3) uint8 of the camera above, "agent_pos": (14,) float32}: for the
    left and the right arm six joint angles in radians and the gripper's opening, 0 closed and 1 open.
    Action: (14,) float32, the positions to move to, in the same units, within the limits of the motors.
    The start is that of gym-aloha for the same seed, and so are the motion and the measure of success.

    Args:
        task: transfer_cube or insertion.
        image_size: frame height and width in pixels; a square cut from the middle of gym-aloha's 640 x 480.
        observe_pixels: False leaves out "pixels" and renders only in render().

    Raises:
        ValueError: for values outside what is listed here.
    """

    robot_type = "aloha"

    def __init__(self, task: str, image_size: int = 96, observe_pixels: bool = True) -> None:
        if task not in INSTRUCTIONS:
            raise ValueError(f"task is {task!r}, expected one of {list(INSTRUCTIONS)}")
        self.model = load_model(task, image_size)
        self.data = mujoco.MjData(self.model)
        # Motors 6 and 7 of an arm are its two fingers, which one number moves.
        limits = self.model.actuator_ctrlrange.reshape(2, 8, 2)[:, : ARM_JOINTS + 1].copy()
        limits[:, ARM_JOINTS] = normalize_puppet_gripper_position(limits[:, ARM_JOINTS])
        low, high = limits.reshape(14, 2).T.astype(np.float32)
        super().__init__(
            task,
            INSTRUCTIONS[task],
            image_size,
            observe_pixels,
            round(1 / DT),
            NUM_STEPS,
            spaces.Box(-STATE_LIMIT, STATE_LIMIT, (14,), np.float32),
            spaces.Box(low, high),
        )

    def _begin(self, seed: int) -> None:
        is_cube = self.task == "transfer_cube"
        objects = sample_box_pose(seed) if is_cube else np.concatenate(sample_insertion_pose(seed))
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = START_ARM_POSE
        self.data.ctrl[:] = START_ARM_POSE
        self.data.qpos[-len(objects) :] = objects
        mujoco.mj_forward(self.model, self.data)

    def _advance(self, action: np.ndarray) -> bool:
        for arm in range(2):
            target = action[7 * arm : 7 * arm + 7]
            finger = unnormalize_puppet_gripper_position(target[ARM_JOINTS])
            self.data.ctrl[8 * arm : 8 * arm + 8] = [*target[:ARM_JOINTS], finger, -finger]
        mujoco.mj_step(self.model, self.data, round(DT / self.model.opt.timestep))
        # The contacts of where the step ended.
        mujoco.mj_step1(self.model, self.data)
        contacts = {frozenset((self._name(c.geom1), self._name(c.geom2))) for c in self.data.contact}
        if self.task == "insertion":
            return frozenset(("red_peg", "pin")) in contacts
        held = frozenset(("red_box", "vx300s_left/10_left_gripper_finger")) in contacts
        return held and frozenset(("red_box", "table")) not in contacts

    def _name(self, geom: int) -> str:
        return self.model.geom(geom).name

    def _state(self) -> np.ndarray:
        arms = self.data.qpos[:16].reshape(2, 8)
        grippers = normalize_puppet_gripper_position(arms[:, ARM_JOINTS : ARM_JOINTS + 1])
        return np.concatenate([arms[:, :ARM_JOINTS], grippers], axis=1).ravel()

    def render(self) -> np.ndarray:
        """The camera's frame, (image_size, image_size, 3) uint8."""
        return shared_renderer(self.task, self.image_size).render(self.model, self.data)


@functools.cache
def _renderer_of_thread(task: str, image_size: int, thread: int) -> FrameRenderer:
    return FrameRenderer(load_model(task, image_size), image_size, CAMERA)


def shared_renderer(task: str, image_size: int) -> FrameRenderer:
    """The calling thread's renderer for a task."""
    return _renderer_of_thread(task, image_size, threading.get_ident())
