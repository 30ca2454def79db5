"""Options of the safety layer around any LeRobot robot: `--robot.type=lapa_safe --robot.robot='{type: ...}'`."""

from dataclasses import dataclass, field
from typing import Any

import draccus
from lerobot.robots.config import RobotConfig


@RobotConfig.register_subclass("lapa_safe")
@dataclass(kw_only=True)
class SafeRobotConfig(RobotConfig):
    """robot: the options of the robot itself, `type` among them. (A nested configuration would make LeRobot's command
    line list robots within robots without end.) The rest are the fields of `policies.serving.safety.SafetyLimits`, in
    the order of the robot's action_features.
    """

    robot: dict[str, Any]
    action_low: list[float] = field(default_factory=list)
    action_high: list[float] = field(default_factory=list)
    max_rate: list[float] = field(default_factory=list)
    relative: bool = False
    control_hz: float = 10.0
    max_observation_age_s: float = 0.5
    watchdog_s: float = 1.0
    on_limit: str = "clip"

    def inner(self) -> RobotConfig:
        """The configuration of the robot inside; ValueError where LeRobot knows no such type or option."""
        try:
            return draccus.decode(RobotConfig, self.robot)
        except draccus.utils.ParsingError as error:
            raise ValueError(f"robot is {self.robot}, which is no configuration of a robot: {error}") from None
