"""Options of the simulated gripper, as `--robot.type=simulated_gripper --robot.<option>=...`."""

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig

from envs.config_simulated_robot import SimulatedRobotConfig


@RobotConfig.register_subclass("simulated_gripper")
@dataclass(kw_only=True)
class SimulatedGripperConfig(SimulatedRobotConfig):
    family: str = "pick"
    split: str = "train"
    variant: str = "default"
