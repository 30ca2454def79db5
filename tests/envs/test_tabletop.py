import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import FAMILIES
from envs.arena import MAX_STEP, TIP_RANGE
from envs.tabletop import TabletopEnv
from envs.variants import VARIANTS


def play(env, seed, actions):
    """Everything an episode shows, as one list of arrays."""
    observation, info = env.reset(seed=seed)
    seen = [observation["pixels"], observation["agent_pos"], info["instruction"]]
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen += [observation["pixels"], observation["agent_pos"], reward, terminated, truncated, env.data.qpos.copy()]
    return seen


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("env_id", FAMILIES.values())
def test_every_id_passes_gymnasiums_checker(env_id):
    check_env(gymnasium.make(env_id).unwrapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_and_actions_give_identical_states_and_frames(family):
    actions = np.random.default_rng(0).uniform(-MAX_STEP, MAX_STEP, (12, 2))
    first, second = TabletopEnv(family), TabletopEnv(family)
    expected = play(first, 7, actions)
    play(second, 8, actions)  # leaves nothing behind
    assert same(expected, play(second, 7, actions))
    assert not same(expected, play(second, 9, actions))


def test_rendering_changes_nothing_in_the_physics():
    actions = np.random.default_rng(0).uniform(-MAX_STEP, MAX_STEP, (12, 2))
    seeing, blind = TabletopEnv("block_to_block"), TabletopEnv("block_to_block", observe_pixels=False)
    seeing.reset(seed=3), blind.reset(seed=3)
    for action in actions:
        seeing.step(action), blind.step(action)
    np.testing.assert_array_equal(seeing.data.qpos, blind.data.qpos)


def test_environments_that_take_turns_do_not_disturb_each_others_frames():
    alone, first, second = (TabletopEnv("reach") for _ in range(3))
    expected, _ = alone.reset(seed=1)
    first.reset(seed=1), second.reset(seed=2)
    np.testing.assert_array_equal(first.render(), expected["pixels"])


@pytest.mark.parametrize("variant", ["default", "slow", "fast"])
def test_free_tip_moves_by_the_action_times_the_gain(variant):
    env = TabletopEnv("reach", num_blocks=1, variant=variant, observe_pixels=False)
    env.reset(seed=3)
    for action in ([0.02, 0.0], [0.0, 0.02], [-0.01, 0.005], [0.0, 0.0]):
        before = env.scene.tip_xy
        env.step(np.array(action))
        moved = env.scene.tip_xy - before
        np.testing.assert_allclose(moved, np.array(action) * env.variant.action_gain, atol=1.2e-3)


def test_actions_are_clipped_to_the_step_and_to_the_workspace():
    env = TabletopEnv("reach", num_blocks=1, observe_pixels=False)
    env.reset(seed=3)
    *_, info = env.step(np.array([-1.0, 0.0]))
    np.testing.assert_allclose(info["executed_action"], [-MAX_STEP, 0.0], atol=1e-6)
    for _ in range(40):
        *_, info = env.step(np.array([-1.0, 0.0]))
    assert env.scene.tip_xy[0] >= -TIP_RANGE - 1e-3
    np.testing.assert_allclose(info["executed_action"], [0.0, 0.0], atol=1e-3)


def test_blocks_are_pushed_and_then_stop():
    env = TabletopEnv("block_to_block", num_blocks=2, observe_pixels=False)
    env.reset(seed=0)
    start = env.scene.blocks_xy
    for _ in range(25):
        env.step(env.expert_action())
        if np.linalg.norm(env.scene.blocks_xy[0] - start[0]) > 0.03:
            break
    else:
        pytest.fail("the expert never pushed the block")
    env.step(np.zeros(2))
    settled = env.scene.blocks_xy
    env.step(np.zeros(2))
    np.testing.assert_allclose(env.scene.blocks_xy, settled, atol=1e-3)


def test_number_of_blocks_is_fixed_or_drawn_from_a_range():
    env = TabletopEnv("reach", num_blocks=(2, 5), observe_pixels=False)
    drawn = set()
    for seed in range(60):
        env.reset(seed=seed)
        drawn.add(len(env.scene.blocks))
        assert len(set(env.scene.blocks)) == len(env.scene.blocks)
    assert drawn == {2, 3, 4, 5}


def test_episode_is_truncated_at_its_length():
    env = TabletopEnv("reach", episode_length=3, observe_pixels=False)
    env.reset(seed=0)
    assert [env.step(np.zeros(2))[3] for _ in range(3)] == [False, False, True]


def test_attributes_that_lerobot_reads():
    env = gymnasium.make("tabletop/Reach-v0", image_size=96)
    _, info = env.reset(seed=0)
    assert env.unwrapped.task_description == info["instruction"]
    assert env.unwrapped.task == "reach"
    assert env.get_wrapper_attr("_max_episode_steps") == 30
    assert env.metadata["render_fps"] == 10
    assert env.render().shape == (96, 96, 3)


def test_vectorised_environments_step_together():
    envs = gymnasium.make_vec("tabletop/Reach-v0", num_envs=3, vectorization_mode="sync")
    observation, _ = envs.reset(seed=0)
    assert observation["pixels"].shape == (3, 64, 64, 3)
    observation, *_, info = envs.step(np.zeros((3, 2), np.float32))
    assert observation["agent_pos"].shape == (3, 2)
    assert info["is_success"].shape == (3,)


def test_variants_look_different_but_start_alike():
    looks, starts = [], []
    for variant in VARIANTS:
        env = TabletopEnv("reach", variant=variant)
        observation, _ = env.reset(seed=5)
        looks.append(observation["pixels"].astype(float))
        starts.append(env.scene.blocks_xy)
    for name, look, start in list(zip(VARIANTS, looks, starts, strict=True))[1:]:
        np.testing.assert_array_equal(start, starts[0])
        if name not in ("slow", "fast"):  # these differ in action gain alone
            assert np.abs(look - looks[0]).mean() > 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "fly"}, "family is 'fly'"),
        ({"num_blocks": 9}, "num_blocks is 9"),
        ({"family": "block_to_block", "num_blocks": 1}, "expected 2 to 8"),
        ({"split": "test"}, "split is 'test'"),
        ({"variant": "moon"}, "variant is 'moon'"),
        ({"image_size": 4}, "image_size is 4"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TabletopEnv(**{"family": "reach", **options})


def test_wrong_action_is_refused():
    env = TabletopEnv("reach", observe_pixels=False)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 2 finite displacements"):
        env.step(np.array([np.nan, 0.0]))
