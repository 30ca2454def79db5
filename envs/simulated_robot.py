"""A simulated task as a LeRobot robot: deployment can be tried, and broken on purpose, without hardware.

Time passes by one control step (0.1 s) with each action, whatever the clock says. When an episode ends, by success or
its step limit, the next one begins from the next seed, unless one_scene is set; the log says what each scene asks for.
"""

import logging
from collections import deque
from typing import Any, ClassVar

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from envs.config_simulated_robot import SimulatedRobotConfig
from envs.suites import SuiteEnv, make_env

log = logging.getLogger(__name__)


class SimulatedRobot(Robot):
    """See the module. After `disconnect`, num_episodes and num_successes say what came of it.

    The suite's state is the positions of moved_axes, then of set_axes, and its action the displacements of the ones
    and the positions of the others.
    """

    suite: ClassVar[str]
    moved_axes: ClassVar[tuple[str, ...]]
    set_axes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: SimulatedRobotConfig):
        super().__init__(config)
        self.config = config
        self.num_episodes = self.num_successes = 0
        self._env: SuiteEnv | None = None
        self._history: deque[dict[str, Any]] = deque()
        self._last_frame = np.zeros(0, np.uint8)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.moved_axes + self.set_axes

    @property
    def position_keys(self) -> list[str]:
        return [f"{axis}.pos" for axis in self.axes]

    @property
    def observation_features(self) -> dict[str, Any]:
        size = self.config.image_size
        return {**dict.fromkeys(self.position_keys, float), "top": (size, size, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return {
            **{f"{axis}.vel": float for axis in self.moved_axes},
            **{f"{axis}.pos": float for axis in self.set_axes},
        }

    @property
    def cameras(self) -> dict[str, Any]:
        """Names of the cameras, which LeRobot counts to choose its writers."""
        return {"top": None}

    @property
    def is_connected(self) -> bool:
        return self._env is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def instruction(self) -> str:
        """What the present scene asks for."""
        return self._connected().instruction

    def connect(self, calibrate: bool = True) -> None:
        if self._env is not None:
            raise DeviceAlreadyConnectedError(f"{self} is connected already")
        self._env = make_env(self.suite, self.config.family, self.config.image_size, self.config)
        self._faults = np.random.default_rng(self.config.fault_seed)
        self._begin_episode()

    def disconnect(self) -> None:
        if self._env is not None:
            self._env = None
            log.info("%d episodes ended, %d of them in success", self.num_episodes, self.num_successes)

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        """The observation of `latency_steps` steps ago, with the faults that are asked for."""
        self._connected()
        observation = dict(self._history[0])
        if self._faults.random() < self.config.dropped_frame_share:
            observation["top"] = self._last_frame
        self._last_frame = observation["top"]
        if self._faults.random() < self.config.nan_share:
            observation |= dict.fromkeys(self.position_keys, float("nan"))
        return observation

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Act for one control step; returns the action that was executed."""
        env = self._connected()
        named = dict(zip(self.axes, self.action_features, strict=True))
        missing = [axis for axis, key in named.items() if key not in action and f"{axis}.pos" not in action]
        if missing:
            raise ValueError(
                f"the action {sorted(action)} says nothing of {missing}: expected {list(self.action_features)}"
            )
        position = self._history[-1]
        values = [
            float(action[key] if key in action else action[f"{axis}.pos"] - position[f"{axis}.pos"])
            for axis, key in named.items()
        ]
        seen, _, terminated, truncated, info = env.step(np.array(values, np.float32))
        if (terminated or truncated) and not self.config.one_scene:
            self.num_episodes += 1
            self.num_successes += bool(info["is_success"])
            self._begin_episode()
        else:
            self._history.append(self._named(seen))
        return {key: float(value) for key, value in zip(self.action_features, info["executed_action"], strict=True)}

    def _begin_episode(self) -> None:
        env = self._connected()
        seen, _ = env.reset(seed=self.config.seed + self.num_episodes)
        log.info("episode %d: %s", self.num_episodes, env.instruction)
        self._history = deque([self._named(seen)], maxlen=self.config.latency_steps + 1)
        self._last_frame = self._history[0]["top"]

    def _named(self, seen: dict[str, Any]) -> dict[str, Any]:
        """The environment's observation under the robot's names."""
        state = {key: float(value) for key, value in zip(self.position_keys, seen["agent_pos"], strict=True)}
        return {**state, "top": seen["pixels"]}

    def _connected(self) -> SuiteEnv:
        if self._env is None:
            raise DeviceNotConnectedError(f"{self} is not connected: call connect() first")
        return self._env
