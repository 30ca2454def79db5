import numpy as np
import pytest

from envs.gripper import FAMILIES
from envs.gripper.arena import WORKSPACE_HIGH, WORKSPACE_LOW
from envs.gripper.env import GripperEnv


def success_rate(env, num_seeds, choose, check=lambda env: None):
    num_successes = 0
    for seed in range(num_seeds):
        env.reset(seed=seed)
        success = truncated = False
        while not (success or truncated):
            _, _, success, truncated, _ = env.step(choose(env))
            check(env)
        num_successes += success
    return num_successes / num_seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_its_family_under_the_noise_of_demonstrations(family):
    env = GripperEnv(family, observe_pixels=False)
    rng = np.random.default_rng(0)
    assert success_rate(env, 60, lambda env: env.expert_action() + rng.normal(0, 0.004, 4)) >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_unseen_blocks_without_noise(family):
    env = GripperEnv(family, split="unseen", num_blocks=4, observe_pixels=False)
    assert success_rate(env, 15, lambda env: env.expert_action()) >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_random_actions_seldom_succeed_and_never_break_the_physics(family):
    env = GripperEnv(family, observe_pixels=False)
    rng = np.random.default_rng(0)

    def check(env):
        assert np.isfinite(env.data.qpos).all() and np.isfinite(env.data.qvel).all()
        assert (env.scene.gripper > np.array(WORKSPACE_LOW) - 0.01).all()
        assert (env.scene.gripper < np.array(WORKSPACE_HIGH) + 0.01).all()
        assert env.scene.speeds.max() < 3  # blocks are pushed and dropped, not shot

    low, high = env.action_space.low, env.action_space.high
    assert success_rate(env, 20, lambda env: rng.uniform(low, high), check) < 0.1


def test_expert_starts_again_after_a_lost_block():
    env = GripperEnv("place", observe_pixels=False)
    env.reset(seed=2)
    for _ in range(15):
        env.step(env.expert_action())
    assert env.scene.positions[0, 2] > 0.09
    env.step(np.array([0, 0, 0, 0.08]))  # somebody opens the fingers
    success = truncated = False
    while not (success or truncated):
        _, _, success, truncated, _ = env.step(env.expert_action())
    assert success


def test_expert_is_a_function_of_the_state():
    env = GripperEnv("stack", observe_pixels=False)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.expert_action(), env.expert_action())
