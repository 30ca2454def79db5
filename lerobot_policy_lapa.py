"""LeRobot imports this module at start-up, by its name's prefix: it registers the policy and the environments."""

import envs  # noqa: F401
from policies.lapa.configuration_lapa import LapaConfig

__all__ = ["LapaConfig"]
