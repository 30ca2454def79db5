"""Meta-World in lerobot-eval and lerobot-train: `--env.type=lapa_metaworld --env.task=push-v3,reach-v3`.

LeRobot's own `metaworld` renders at 480 pixels whatever it is told, ignores its episode length, and its default task
has a name that Meta-World does not know.
"""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.envs.configs import EnvConfig

from envs.config_suite import SuiteConfig
from envs.metaworld_suite import ACTION_REPEAT

SIMULATOR_HZ = 80


@EnvConfig.register_subclass("lapa_metaworld")
@dataclass
class MetaWorldConfig(SuiteConfig):
    """The options as in `lapa evaluate`."""

    suite: ClassVar[str] = "metaworld"

    task: str | None = "mt10"
    image_size: int = 96
    action_repeat: int = ACTION_REPEAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fps = SIMULATOR_HZ // self.action_repeat
