import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.gripper import FAMILIES
from envs.gripper.arena import BLOCK_SIZE, MAX_OPENING, MAX_STEP, VARIANTS, WORKSPACE_HIGH, WORKSPACE_LOW
from envs.gripper.env import HELD_OUT_BLOCKS, GripperEnv
from envs.instructions import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES


def random_actions(num_steps):
    return np.random.default_rng(0).uniform([-MAX_STEP] * 3 + [0], [MAX_STEP] * 3 + [MAX_OPENING], (num_steps, 4))


def episode(env, seed, actions):
    """Everything an episode shows, as one list of arrays."""
    observation, info = env.reset(seed=seed)
    seen = [observation["pixels"], observation["agent_pos"], info["instruction"]]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen += [observation["pixels"], observation["agent_pos"], reward, terminated, truncated, env.data.qpos.copy()]
        seen.append(info["executed_action"])
    return seen


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def grasped(env, seed=0):
    """The environment of that seed, its expert having just closed the fingers on the block."""
    env.reset(seed=seed)
    for _ in range(40):
        if env.scene.is_held(0):
            break
        env.step(env.expert_action())
    return env


@pytest.mark.parametrize("env_id", FAMILIES.values())
def test_every_id_passes_gymnasiums_checker(env_id):
    check_env(gymnasium.make(env_id).unwrapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_and_actions_give_identical_states_and_frames(family):
    actions = random_actions(8)
    first, second = GripperEnv(family), GripperEnv(family)
    expected = episode(first, 7, actions)
    episode(second, 8, actions)  # leaves nothing behind
    assert same(expected, episode(second, 7, actions))
    assert not same(expected, episode(second, 9, actions))


def test_rendering_changes_nothing_in_the_physics():
    seeing, blind = GripperEnv("stack"), GripperEnv("stack", observe_pixels=False)
    for env in (grasped(seeing), grasped(blind)):
        for action in random_actions(6):
            env.step(action)
    np.testing.assert_array_equal(seeing.data.qpos, blind.data.qpos)


def test_free_gripper_moves_by_the_action_and_opens_as_told():
    env = GripperEnv("pick", num_blocks=1, observe_pixels=False)
    env.reset(seed=3)
    for action in ([0.02, 0.0, 0.0, 0.08], [0.0, -0.02, 0.01, 0.04], [-0.01, 0.01, -0.02, 0.0], [0.0, 0.0, 0.0, 0.06]):
        before = env.agent_pos
        env.step(np.array(action))
        np.testing.assert_allclose(env.agent_pos[:3] - before[:3], action[:3], atol=4e-3)
        assert env.agent_pos[3] == pytest.approx(action[3], abs=8e-3)


def test_actions_are_clipped_to_the_step_and_to_the_workspace():
    env = GripperEnv("pick", num_blocks=1, observe_pixels=False)
    env.reset(seed=3)
    *_, info = env.step(np.array([-1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(info["executed_action"], [-MAX_STEP, 0.0, 0.0, MAX_OPENING], atol=1e-6)
    for _ in range(25):
        *_, info = env.step(np.array([-1.0, 1.0, -1.0, 0.08]))
    np.testing.assert_allclose(env.agent_pos[:3], [WORKSPACE_LOW[0], WORKSPACE_HIGH[1], WORKSPACE_LOW[2]], atol=2e-3)
    np.testing.assert_allclose(info["executed_action"][:3], 0, atol=2e-3)


def test_friction_alone_holds_a_block_through_fast_turns_and_letting_go_drops_it():
    for seed in range(3):
        env = grasped(GripperEnv("stack", observe_pixels=False), seed)
        before = env.scene.positions[0] - env.scene.gripper
        for _ in range(3):
            env.step(np.array([0, 0, MAX_STEP, 0]))
        for x, y in [(1, 0), (0, 1), (-1, -1), (0, 1), (1, 0), (-1, -1)] * 3:
            env.step(np.array([x * MAX_STEP, y * MAX_STEP, 0, 0]))
        np.testing.assert_allclose(env.scene.positions[0] - env.scene.gripper, before, atol=4e-3)
        for _ in range(5):
            env.step(np.array([0, 0, 0, MAX_OPENING]))
        assert env.scene.positions[0, 2] < 2 * BLOCK_SIZE
        assert env.scene.is_released(0)


def test_blocks_rest_where_they_were_put_until_touched():
    env = GripperEnv("place", observe_pixels=False)
    env.reset(seed=1)
    before = env.scene.positions
    for _ in range(10):
        env.step(np.array([0, 0, 0, MAX_OPENING]))
    np.testing.assert_allclose(env.scene.positions, before, atol=1e-3)


def test_a_block_on_its_target_counts_only_when_let_go():
    env = grasped(GripperEnv("stack", observe_pixels=False))
    for _ in range(40):
        action = env.expert_action()
        if action[3] > 0:  # in place
            break
        env.step(action)
    for _ in range(4):
        *_, info = env.step(np.zeros(4))
        assert not info["is_success"]
    for _ in range(4):
        *_, info = env.step(np.array([0, 0, 0, MAX_OPENING]))
    assert info["is_success"]


def changed_pixels(env, hide):
    """How many pixels differ once `hide` has been called."""
    shown = env.render().astype(int)
    hide()
    return int((np.abs(env.render().astype(int) - shown).max(-1) > 25).sum())


@pytest.mark.parametrize("seed", range(3))
def test_every_block_plate_and_the_gripper_are_seen(seed):
    env = GripperEnv("place", num_blocks=4)
    env.reset(seed=seed)
    assert env.render().mean() > 60  # a lit table, not darkness
    for slot in range(4):
        assert changed_pixels(env, lambda slot=slot: env._poses[slot].__setitem__(1, 10.0)) > 25
    for geom in env._plate_ids:
        assert changed_pixels(env, lambda geom=geom: env.model.geom_rgba.__setitem__((geom, 3), 0.0)) > 25
    assert changed_pixels(env, lambda: env.data.qpos.__setitem__(1, 10.0)) > 25


def test_height_is_seen():
    env = GripperEnv("pick")
    env.reset(seed=0)
    assert changed_pixels(env, lambda: env.data.qpos.__setitem__(2, env.data.qpos[2] - 0.03)) > 25


def test_variants_look_different_but_start_alike():
    frames, starts = [], []
    for variant in VARIANTS:
        env = GripperEnv("pick", variant=variant)
        frames.append(env.reset(seed=5)[0]["pixels"].astype(float))
        starts.append(env.scene.positions)
        assert env.robot_type == f"gripper_{variant}"
    for frame, start in zip(frames[1:], starts[1:], strict=True):
        np.testing.assert_array_equal(start, starts[0])
        assert np.abs(frame - frames[0]).mean() > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_keep_blocks_and_phrasings_apart(family):
    assert not set(TRAIN_TEMPLATES[family]) & set(HELD_OUT_TEMPLATES[family])
    written = {}
    for split in ("train", "unseen"):
        env = GripperEnv(family, split=split, observe_pixels=False)
        written[split] = set()
        for seed in range(40):
            env.reset(seed=seed)
            written[split].add(env.instruction)
            assert env.scene.blocks[0].name in env.instruction and "{" not in env.instruction
            if split == "train":
                assert not set(env.scene.blocks) & set(HELD_OUT_BLOCKS)
            else:
                assert env.scene.blocks[0] in HELD_OUT_BLOCKS
    assert len(written["train"]) > 12
    assert not written["train"] & written["unseen"]


def test_number_of_blocks_is_drawn_and_no_two_blocks_or_plates_are_alike():
    env = GripperEnv("place", observe_pixels=False)
    drawn = set()
    for seed in range(30):
        env.reset(seed=seed)
        drawn.add(len(env.scene.blocks))
        assert len(set(env.scene.blocks)) == len(env.scene.blocks)
        assert len(set(env.scene.plate_colours)) == 2
    assert drawn == {2, 3, 4}


def test_attributes_that_lerobot_reads():
    env = gymnasium.make("gripper/Stack-v0", image_size=32)
    _, info = env.reset(seed=0)
    assert env.unwrapped.task_description == info["instruction"]
    assert env.unwrapped.task == "stack"
    assert env.get_wrapper_attr("_max_episode_steps") == 100
    assert env.metadata["render_fps"] == 10
    assert env.render().shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "fly"}, "family is 'fly'"),
        ({"num_blocks": 5}, "num_blocks is 5"),
        ({"family": "stack", "num_blocks": 1}, "expected 2 to 4"),
        ({"split": "test"}, "split is 'test'"),
        ({"variant": "hand"}, "variant is 'hand'"),
        ({"image_size": 4}, "image_size is 4"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        GripperEnv(**{"family": "pick", **options})


def test_wrong_action_is_refused():
    env = GripperEnv("pick", observe_pixels=False)
    env.reset(seed=0)
    for wrong in (np.zeros(3), np.array([0, 0, np.nan, 0])):
        with pytest.raises(ValueError, match="expected 3 finite displacements and an opening"):
            env.step(wrong)
