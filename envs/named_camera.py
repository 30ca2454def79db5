"""The observation that LeRobot expects of a simulator: pixels by camera. Every worker loads this, so no LeRobot."""

from typing import Any

import gymnasium

from envs import FAMILIES


class NamedCamera(gymnasium.ObservationWrapper):
    """`pixels` as {"top": frame}, from which LeRobot makes observation.images.top."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        spaces = dict(env.observation_space.spaces)  # type: ignore[attr-defined]
        self.observation_space = gymnasium.spaces.Dict(
            spaces | {"pixels": gymnasium.spaces.Dict({"top": spaces["pixels"]})}
        )

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return observation | {"pixels": {"top": observation["pixels"]}}


def make_env(family: str, options: dict[str, Any]) -> gymnasium.Env:
    """One environment of a family, as LeRobot wants it."""
    return NamedCamera(gymnasium.make(FAMILIES[family], disable_env_checker=True, **options))
