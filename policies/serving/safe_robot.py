"""The safety layer around any LeRobot robot, so that lerobot-rollout and the async client cannot go around it.

    lerobot-rollout --robot.type=lapa_safe --robot.robot='{type: so101_follower, port: /dev/ttyACM0}' \\
        --robot.action_low=[...] --robot.action_high=[...] ...

Every observation is checked and stamped, every action bounded; a stop raises `SafetyStop`, which ends the rollout, and
disconnects the robot, which releases or holds its motors as its own driver does.
"""

import logging
import threading
import time
from typing import Any

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.robots.utils import make_robot_from_config

from policies.serving.config_safe_robot import SafeRobotConfig
from policies.serving.safety import SafetyLayer, SafetyLimits, Watchdog

log = logging.getLogger(__name__)

HOLD_TIMEOUT_S = 0.5  # for a command under way when the robot is to stop


class SafeRobot(Robot):
    """A robot behind `SafetyLayer`. Its features, cameras and calibration are those of the robot inside."""

    config_class = SafeRobotConfig
    name = "lapa_safe"

    def __init__(self, config: SafeRobotConfig):
        super().__init__(config)
        self.config = config
        self.robot = make_robot_from_config(config.inner())
        self.action_names = list(self.robot.action_features)
        self.safety = SafetyLayer(
            SafetyLimits(
                action_low=tuple(config.action_low),
                action_high=tuple(config.action_high),
                max_rate=tuple(config.max_rate),
                relative=config.relative,
                control_hz=config.control_hz,
                max_observation_age_s=config.max_observation_age_s,
                watchdog_s=config.watchdog_s,
                on_limit=config.on_limit,
            )
        )
        if len(config.action_low) != len(self.action_names):
            raise ValueError(
                f"action_low has {len(config.action_low)} numbers, {self.robot.name} takes {len(self.action_names)}: "
                f"{self.action_names}"
            )
        if (
            config.max_rate
            and not config.relative
            and not set(self.action_names) <= set(self.robot.observation_features)
        ):
            raise ValueError(
                f"max_rate of absolute actions counts from where the robot is, and {self.robot.name} does not observe "
                f"all of {self.action_names}: set relative=true if its actions are changes, or leave max_rate out"
            )
        self._watchdog: Watchdog | None = None
        # A command must not overtake the watchdog's stop, nor both use the robot at once.
        self._in_use = threading.Lock()
        self._captured_at_s: float | None = None

    @property
    def observation_features(self) -> dict[str, Any]:
        return self.robot.observation_features

    @property
    def action_features(self) -> dict[str, Any]:
        return self.robot.action_features

    @property
    def cameras(self) -> dict[str, Any]:
        return getattr(self.robot, "cameras", {})

    @property
    def is_connected(self) -> bool:
        return self.robot.is_connected

    @property
    def is_calibrated(self) -> bool:
        return self.robot.is_calibrated

    def connect(self, calibrate: bool = True) -> None:
        self.robot.connect(calibrate)
        self.safety.reset()
        seen = self.robot.get_observation()
        if set(self.action_names) <= set(seen):
            self.safety.reset(np.array([float(seen[name]) for name in self.action_names]))
        self._captured_at_s = None
        self._watchdog = Watchdog(self.safety, self._hold)
        self._watchdog.__enter__()

    def disconnect(self) -> None:
        if self._watchdog is not None:
            self._watchdog.__exit__(None, None, None)
            self._watchdog = None
        with self._in_use:
            if self.robot.is_connected:
                self.robot.disconnect()

    def calibrate(self) -> None:
        self.robot.calibrate()

    def configure(self) -> None:
        self.robot.configure()

    def get_observation(self) -> dict[str, Any]:
        captured_at_s = time.monotonic()
        with self._in_use:
            observation = self.robot.get_observation()
        self.safety.check_observation(observation, captured_at_s)
        self._captured_at_s = captured_at_s
        return observation

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """The bounded action, as it was sent; SafetyStop where it must not act, as on what was seen too long ago."""
        if self._captured_at_s is None:
            raise self.safety.stop("nothing was observed before the action")
        self.safety.check_observation({}, self._captured_at_s)
        missing = [name for name in self.action_names if name not in action]
        if missing:
            raise self.safety.stop(f"the action lacks {missing}")
        with self._in_use:
            command = self.safety.bound(np.array([float(action[name]) for name in self.action_names]))
            return self.robot.send_action(dict(zip(self.action_names, command.tolist(), strict=True)))

    def _hold(self, reason: str) -> None:
        """The watchdog's thread: let go of the robot, since nobody else will."""
        log.error("safety stop: %s", reason)
        # A driver that hangs holds the lock for ever; stopping then goes before order.
        taken = self._in_use.acquire(timeout=HOLD_TIMEOUT_S)
        try:
            if self.robot.is_connected:
                self.robot.disconnect()
        finally:
            if taken:
                self._in_use.release()
