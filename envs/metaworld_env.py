"""A Meta-World task as an environment of this package: one camera, proprioception, seeds, and a known control rate."""

import functools
import threading
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.adapted_env import AdaptedEnv
from envs.metaworld_suite import INSTRUCTIONS
from envs.rendering import SUPERSAMPLING, FrameRenderer, mujoco

# After the choice of a rendering backend, which envs.rendering makes.
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # isort: skip
from metaworld.policies import ENV_POLICY_MAP  # isort: skip

# The scripted policies warn of commands that the environment clips, which most of theirs are.
warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", module="metaworld")

SIMULATOR_HZ = 80
CAMERA = "corner2"
# Nearer than Meta-World's own corner2, as LeRobot has it; and upright, which corner2 is not.
CAMERA_POSITION = (0.75, 0.075, 0.7)
HALF_TURN = (0.0, 0.0, 0.0, 1.0)  # about the viewing axis


class MetaWorldEnv(AdaptedEnv):
    """One task of Meta-World with the objects and the goal drawn anew from the seed of each episode.

    Observation: {"pixels": (image_size, image_size, 3) uint8, "agent_pos": (4,) float32}, the hand's x, y, z in metres
    and the gripper's opening in [0, 1]. Where the objects and the goal are, only the pixels tell: Meta-World's goal
    sites (a coloured ball where it has one) are drawn.
    Action: (4,) float32 in [-1, 1]: the hand's displacement, 1 is 1 cm per simulator step, and the gripper's force
    (1 closes).
    Success at any simulator step, by Meta-World's measure, ends the episode; its 500 simulator steps truncate it.

    Args:
        task: one of envs.metaworld_suite.TASKS.
        image_size: frame height and width in pixels.
        action_repeat: simulator steps (of 1/80 s) per action; the control rate 80 / action_repeat must be whole.
        observe_pixels: False leaves out "pixels" and renders only in render().

    Raises:
        ValueError: for values outside what is listed here.
    """

    robot_type = "sawyer"

    def __init__(self, task: str, image_size: int = 96, action_repeat: int = 4, observe_pixels: bool = True) -> None:
        if task not in INSTRUCTIONS:
            raise ValueError(f"task is {task!r}, expected one of {list(INSTRUCTIONS)}")
        if action_repeat < 1 or SIMULATOR_HZ % action_repeat:
            raise ValueError(f"action_repeat is {action_repeat}, expected a divisor of {SIMULATOR_HZ}")
        self._simulation = ALL_V3_ENVIRONMENTS[task]()
        super().__init__(
            task,
            INSTRUCTIONS[task],
            image_size,
            observe_pixels,
            SIMULATOR_HZ // action_repeat,
            self._simulation.max_path_length // action_repeat,
            spaces.Box(np.array([-2, -2, -2, 0], np.float32), np.array([2, 2, 2, 1], np.float32)),
            spaces.Box(-1.0, 1.0, (4,), np.float32),
        )
        self.action_repeat = self.metadata["action_repeat"] = action_repeat
        # What Meta-World's set_task does, with a draw from the episode's seed for one of 50 stored draws.
        self._simulation._set_task_called = True
        self._simulation._freeze_rand_vec = False
        self._simulation.seeded_rand_vec = True
        self._seen: np.ndarray = np.zeros(39)
        self._expert: Any = None
        adapt_rendering(self._simulation.model, image_size)

    def expert_action(self) -> np.ndarray:
        """What Meta-World's scripted policy would do now, (4,) float32, from the true state and goal."""
        seen = self._seen.copy()
        seen[-3:] = self._simulation._get_pos_goal()
        return np.clip(self._expert.get_action(seen), -1, 1).astype(np.float32)

    def _begin(self, seed: int) -> None:
        self._simulation.np_random = np.random.default_rng(seed)
        self._seen, _ = self._simulation.reset()
        make_expert: Any = ENV_POLICY_MAP[self.task]
        self._expert = make_expert()

    def _advance(self, action: np.ndarray) -> bool:
        for _ in range(self.action_repeat):
            self._seen, _, _, _, info = self._simulation.step(action)
            if info["success"]:
                return True
        return False

    def _state(self) -> np.ndarray:
        return self._seen[:4]

    def render(self) -> np.ndarray:
        """The camera's frame, (image_size, image_size, 3) uint8."""
        model, data = self._simulation.model, self._simulation.data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        for site, position in self._simulation._target_site_config:
            self._simulation._set_pos_site(site, position)
        return shared_renderer(self.task, self.image_size).render(model, data)


def adapt_rendering(model: mujoco.MjModel, image_size: int) -> None:
    """Set what makes software rendering fast, and the camera. Must run before a renderer is made."""
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = SUPERSAMPLING * image_size
    camera = model.camera(CAMERA).id
    model.cam_pos[camera] = CAMERA_POSITION
    upright = np.zeros(4)
    mujoco.mju_mulQuat(upright, model.cam_quat[camera], np.array(HALF_TURN))
    model.cam_quat[camera] = upright


@functools.cache
def _renderer_of_thread(task: str, image_size: int, thread: int) -> FrameRenderer:
    model = ALL_V3_ENVIRONMENTS[task]().model
    adapt_rendering(model, image_size)
    return FrameRenderer(model, image_size, CAMERA)


def shared_renderer(task: str, image_size: int) -> FrameRenderer:
    """The calling thread's renderer for a task: a graphics context costs half a second and 50 MB here."""
    return _renderer_of_thread(task, image_size, threading.get_ident())
