import numpy as np
import pytest
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import preprocess_observation

import lerobot_policy_lapa  # noqa: F401  registers the environments


def test_lerobot_makes_the_families_that_are_asked_for():
    envs = make_env(make_env_config("tabletop", task="reach,separate_blocks", image_size=32), n_envs=2)
    assert list(envs) == ["tabletop"] and list(envs["tabletop"]) == [0, 1]
    for env in envs["tabletop"].values():
        observation, _ = env.reset(seed=[0, 1])
        batch = preprocess_observation(observation)
        assert batch["observation.images.top"].shape == (2, 3, 32, 32)
        assert batch["observation.state"].shape == (2, 2)
        assert all(isinstance(text, str) and text for text in env.call("task_description"))
        assert env.call("_max_episode_steps")[0] > 0
        env.close()


def test_success_is_told_as_lerobot_eval_reads_it():
    (env,) = make_env(make_env_config("tabletop", image_size=32), n_envs=1)["tabletop"].values()
    env.reset(seed=[3])
    for _ in range(200):
        action = env.call("expert_action")
        _, _, terminated, truncated, info = env.step(np.stack(action))
        if terminated[0] or truncated[0]:
            break
    assert bool(info["final_info"]["is_success"][0])
    env.close()


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"has no task .*juggle.*reach"):
        make_env_config("tabletop", task="juggle")
