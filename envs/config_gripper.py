"""The gripper suite in lerobot-eval and lerobot-train: `--env.type=gripper --env.task=pick,stack`."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.envs.configs import EnvConfig

from envs.arena import CONTROL_HZ
from envs.config_suite import SuiteConfig


@EnvConfig.register_subclass("gripper")
@dataclass
class GripperConfig(SuiteConfig):
    """The options as in `lapa evaluate`."""

    suite: ClassVar[str] = "gripper"

    task: str | None = "pick"
    fps: int = CONTROL_HZ
    split: str = "train"
    variant: str = "default"
