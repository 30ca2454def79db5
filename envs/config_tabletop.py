"""The tabletop suite in lerobot-eval and lerobot-train: `--env.type=tabletop --env.task=reach,separate_blocks`."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.envs.configs import EnvConfig

from envs.arena import CONTROL_HZ
from envs.config_suite import SuiteConfig


@EnvConfig.register_subclass("tabletop")
@dataclass
class TabletopConfig(SuiteConfig):
    """The options as in `lapa evaluate`."""

    suite: ClassVar[str] = "tabletop"

    task: str | None = "reach"
    fps: int = CONTROL_HZ
    split: str = "train"
    variant: str = "default"
    num_blocks_min: int = 4
    num_blocks_max: int = 8
