import numpy as np
import pytest

from envs import FAMILIES
from envs.tabletop import TabletopEnv


def success_rate(env, num_seeds, choose):
    num_successes = 0
    for seed in range(num_seeds):
        env.reset(seed=seed)
        success = truncated = False
        while not (success or truncated):
            _, _, success, truncated, _ = env.step(choose(env))
        num_successes += success
    return num_successes / num_seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_its_family(family):
    env = TabletopEnv(family, observe_pixels=False)
    assert success_rate(env, 200, lambda env: env.expert_action()) >= 0.95


@pytest.mark.parametrize("variant", ["hand", "slow", "fast"])
def test_expert_solves_other_bodies(variant):
    env = TabletopEnv("block_to_block", variant=variant, observe_pixels=False)
    assert success_rate(env, 40, lambda env: env.expert_action()) >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_random_actions_seldom_succeed(family):
    env = TabletopEnv(family, observe_pixels=False)
    rng = np.random.default_rng(0)
    assert success_rate(env, 60, lambda env: rng.uniform(-0.03, 0.03, 2)) < 0.1


def test_expert_is_a_function_of_the_state():
    env = TabletopEnv("separate_blocks", observe_pixels=False)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.expert_action(), env.expert_action())
