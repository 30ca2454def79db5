import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import pusht_suite


def test_missing_package_is_told_with_the_install_commands(monkeypatch):
    monkeypatch.setitem(sys.modules, "envs.pusht_env", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps gym-pusht"):
        pusht_suite.make_env("push_t", 32)


@pytest.fixture
def env():
    needed = pytest.importorskip(
        "envs.pusht_env",
        reason="needs gym-pusht: pip install 'lerobot_policy_lapa[pusht]' && pip install --no-deps gym-pusht==0.1.8",
    )
    return needed.PushTEnv(48)


def test_environment_passes_gymnasiums_checker(env):
    check_env(env)


def test_same_seed_gives_the_same_frames_whatever_was_before(env):
    seen = []
    for seed in (3, 4, 3):
        observation, info = env.reset(seed=seed)
        assert info["instruction"] == env.task_description
        for action in ((100, 100), (400, 300)):
            observation, *_ = env.step(np.array(action))
        seen.append((observation["pixels"], observation["agent_pos"]))
    np.testing.assert_array_equal(seen[0][0], seen[2][0])
    np.testing.assert_array_equal(seen[0][1], seen[2][1])
    assert not np.array_equal(seen[0][0], seen[1][0])


def test_disc_goes_where_it_is_told_and_a_covered_target_is_success(env):
    env.reset(seed=0)
    for _ in range(20):
        observation, *_, info = env.step(np.array([50.0, 600.0]))
    np.testing.assert_array_equal(info["executed_action"], [50, 512])
    assert not info["is_success"]
    simulation = env._simulation
    simulation.block.angle = simulation.goal_pose[2]
    simulation.block.position = simulation.goal_pose[:2].tolist()
    assert env.step(observation["agent_pos"])[-1]["is_success"]
