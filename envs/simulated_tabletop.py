"""A tabletop task as a LeRobot robot: deployment can be tried, and broken on purpose, without hardware.

    lerobot-rollout --robot.type=simulated_tabletop --robot.seed=3000000 --policy.path=... --fps=10 --duration=6 \\
        --return_to_initial_position=false --task="move to the red moon"

Time passes by one control step (0.1 s) with each action, whatever the clock says. When an episode ends, by success or
its step limit, the next one begins from the next seed; the log says what each scene asks for.

Observation: x.pos, y.pos (the tip, metres) and top (image_size, image_size, 3) uint8. Action: x.vel, y.vel, the tip's
displacement in one control step, metres; or x.pos, y.pos, a place to move towards, as LeRobot sends when it brings a
robot back to where it began.
"""

import logging
from collections import deque
from typing import Any

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from envs.arena import MAX_STEP
from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.tabletop import TabletopEnv

log = logging.getLogger(__name__)

AXES = ("x", "y")


class SimulatedTabletop(Robot):
    """See the module. After `disconnect`, num_episodes and num_successes say what came of it."""

    config_class = SimulatedTabletopConfig
    name = "simulated_tabletop"

    def __init__(self, config: SimulatedTabletopConfig):
        super().__init__(config)
        self.config = config
        self.num_episodes = self.num_successes = 0
        self._env: TabletopEnv | None = None
        self._history: deque[dict[str, Any]] = deque()
        self._last_frame = np.zeros(0, np.uint8)

    @property
    def observation_features(self) -> dict[str, Any]:
        size = self.config.image_size
        return {**{f"{axis}.pos": float for axis in AXES}, "top": (size, size, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{axis}.vel": float for axis in AXES}

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
        config = self.config
        self._env = TabletopEnv(
            config.family,
            image_size=config.image_size,
            num_blocks=(config.num_blocks_min, config.num_blocks_max),
            split=config.split,
            variant=config.variant,
        )
        self._faults = np.random.default_rng(config.fault_seed)
        self._begin_episode()

    def disconnect(self) -> None:
        if self._env is not None:
            self._env.close()
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
            observation |= {f"{axis}.pos": float("nan") for axis in AXES}
        return observation

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Move for one control step; returns the displacement that was executed."""
        env = self._connected()
        missing = [axis for axis in AXES if f"{axis}.vel" not in action and f"{axis}.pos" not in action]
        if missing:
            known = list(self.action_features)
            raise ValueError(f"the action {sorted(action)} says nothing of {missing}: expected {known}")
        tip = env.scene.tip_xy
        displacement = np.array(
            [
                float(action[f"{axis}.vel"]) if f"{axis}.vel" in action else float(action[f"{axis}.pos"]) - tip[index]
                for index, axis in enumerate(AXES)
            ]
        )
        _, _, terminated, truncated, info = env.step(np.clip(displacement, -MAX_STEP, MAX_STEP))
        if terminated or truncated:
            self.num_episodes += 1
            self.num_successes += bool(info["is_success"])
            self._begin_episode()
        else:
            self._history.append(self._look())
        return {f"{axis}.vel": float(value) for axis, value in zip(AXES, info["executed_action"], strict=True)}

    def _begin_episode(self) -> None:
        env = self._connected()
        env.reset(seed=self.config.seed + self.num_episodes)
        log.info("episode %d: %s", self.num_episodes, env.instruction)
        self._history = deque([self._look()], maxlen=self.config.latency_steps + 1)
        self._last_frame = self._history[0]["top"]

    def _look(self) -> dict[str, Any]:
        env = self._connected()
        return {
            **{f"{axis}.pos": float(v) for axis, v in zip(AXES, env.scene.tip_xy, strict=True)},
            "top": env.render(),
        }

    def _connected(self) -> TabletopEnv:
        if self._env is None:
            raise DeviceNotConnectedError(f"{self} is not connected: call connect() first")
        return self._env
