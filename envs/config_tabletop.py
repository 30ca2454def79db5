"""The tabletop suite in lerobot-eval and lerobot-train: `--env.type=tabletop --env.task=reach,separate_blocks`.

lerobot-eval keeps neither seeds nor intervals; `lapa evaluate` does, and is what results should be quoted from.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from envs import FAMILIES
from envs.arena import CONTROL_HZ
from envs.named_camera import make_env


@EnvConfig.register_subclass("tabletop")
@dataclass
class TabletopConfig(EnvConfig):
    """task: families, separated by commas. The rest as in `lapa evaluate`."""

    task: str | None = "reach"
    fps: int = CONTROL_HZ
    image_size: int = 64
    split: str = "train"
    variant: str = "default"
    num_blocks_min: int = 4
    num_blocks_max: int = 8
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels/top": f"{OBS_IMAGES}.top"}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.families()) - set(FAMILIES))
        if unknown:
            raise ValueError(f"task is {self.task!r}, expected some of {list(FAMILIES)}, separated by commas")
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
        }

    def families(self) -> list[str]:
        """The families of `task`."""
        return [name.strip() for name in (self.task or "").split(",")]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "split": self.split,
            "variant": self.variant,
            "num_blocks": (self.num_blocks_min, self.num_blocks_max),
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """{"tabletop": {index of the family: n_envs environments}}."""
        mode = AutoresetMode.SAME_STEP
        made: dict[int, VectorEnv] = {}
        for index, family in enumerate(self.families()):
            makers = [partial(make_env, family, self.gym_kwargs)] * n_envs
            if use_async_envs and n_envs > 1:
                made[index] = AsyncVectorEnv(makers, autoreset_mode=mode, context="forkserver")
            else:
                made[index] = SyncVectorEnv(makers, autoreset_mode=mode)
        return {"tabletop": made}
