"""The observation that LeRobot expects of a simulator: pixels by camera. Every worker loads this, so no LeRobot."""

from typing import Any

import gymnasium

from envs.suites import load_suite


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


def make_env(suite: str, task: str, options: dict[str, Any]) -> gymnasium.Env:
    """One environment of a task, as LeRobot wants it."""
    env: Any = load_suite(suite).make_env(task, **options)
    return NamedCamera(env)
