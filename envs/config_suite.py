"""What the suites have in common as LeRobot environments: `--env.type=<suite> --env.task=<task>,<task>`.

lerobot-eval keeps neither seeds nor intervals; `lapa evaluate` does, and is what results should be quoted from.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from envs.named_camera import make_env
from envs.suites import ENV_OPTIONS, choose_tasks, load_suite


@dataclass
class SuiteConfig(EnvConfig):
    """task: tasks or groups of them, separated by commas; null: those that the suite's name alone means."""

    suite: ClassVar[str]

    image_size: int = 64
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/top": f"{OBS_IMAGES}.top"}
    )

    def __post_init__(self) -> None:
        suite = load_suite(self.suite)
        self.tasks()  # refuses unknown ones
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (len(suite.ACTION_NAMES),)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (len(suite.STATE_NAMES),)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
        }

    def tasks(self) -> tuple[str, ...]:
        """The tasks that `task` means."""
        return choose_tasks(self.suite, self.task or "")

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(self)} & set(ENV_OPTIONS)
        return {"image_size": self.image_size} | {name: getattr(self, name) for name in sorted(names)}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """{suite: {index of the task: n_envs environments}}."""
        mode = AutoresetMode.SAME_STEP
        made: dict[int, VectorEnv] = {}
        for index, task in enumerate(self.tasks()):
            makers = [partial(make_env, self.suite, task, self.gym_kwargs)] * n_envs
            if use_async_envs and n_envs > 1:
                made[index] = AsyncVectorEnv(makers, autoreset_mode=mode, context="forkserver")
            else:
                made[index] = SyncVectorEnv(makers, autoreset_mode=mode)
        return {self.suite: made}
