"""Options of the simulated tabletop, as `--robot.type=simulated_tabletop --robot.<option>=...`."""

from dataclasses import dataclass

from lerobot.robots.config import RobotConfig

from envs.config_simulated_robot import SimulatedRobotConfig


@RobotConfig.register_subclass("simulated_tabletop")
@dataclass(kw_only=True)
class SimulatedTabletopConfig(SimulatedRobotConfig):
    family: str = "reach"
    split: str = "train"
    variant: str = "default"
    num_blocks_min: int = 4
    num_blocks_max: int = 8
