"""LeRobot imports this module at start-up, by its name's prefix: it registers policies, environments and robots."""

from envs.config_gripper import GripperConfig
from envs.config_metaworld import MetaWorldConfig
from envs.config_simulated_gripper import SimulatedGripperConfig
from envs.config_simulated_tabletop import SimulatedTabletopConfig
from envs.config_tabletop import TabletopConfig
from policies.lapa.configuration_lapa import LapaConfig
from policies.serving.config_safe_robot import SafeRobotConfig
from policies.unipi.configuration_unipi import UnipiConfig

__all__ = [
    "GripperConfig",
    "LapaConfig",
    "MetaWorldConfig",
    "SafeRobotConfig",
    "SimulatedGripperConfig",
    "SimulatedTabletopConfig",
    "TabletopConfig",
    "UnipiConfig",
]
