import json

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import demos, evaluate, metaworld_suite
from envs.metaworld_suite import GROUPS, INSTRUCTIONS, TASKS
from lapa.schema import DemosConfig, EvaluateConfig, Runtime

needed = pytest.importorskip(
    "envs.metaworld_env", reason="needs Meta-World: pip install 'lerobot_policy_lapa[metaworld]'"
)
MetaWorldEnv = needed.MetaWorldEnv


def play(env, seed, num_steps):
    """States and frames, where it has frames, of an episode of random actions."""
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=seed)
    seen = list(observation.values())
    for _ in range(num_steps):
        observation, *_ = env.step(rng.uniform(-1, 1, 4))
        seen += [*observation.values(), env._simulation.data.qpos.copy()]
    return seen


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_task_of_meta_world_has_an_instruction_of_its_own():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS)
    assert len(set(INSTRUCTIONS.values())) == 50
    assert GROUPS["mt10"] == tuple(MT10_V3)


def test_environment_passes_gymnasiums_checker():
    check_env(MetaWorldEnv("push-v3", image_size=32))


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_states_whatever_was_before_and_another_seed_others(task):
    first, second = (MetaWorldEnv(task, observe_pixels=False) for _ in range(2))
    expected = play(first, 7, 2)
    play(second, 8, 2)
    assert same(expected, play(second, 7, 2))
    assert not np.array_equal(first._simulation._last_rand_vec, draw_of(second, 9))


def draw_of(env, seed):
    env.reset(seed=seed)
    return env._simulation._last_rand_vec


def test_same_seed_gives_the_same_frames_in_environments_that_take_turns():
    first, second = (MetaWorldEnv("drawer-open-v3", image_size=32) for _ in range(2))
    expected = play(first, 7, 3)
    second.reset(seed=8)
    assert same(expected, play(first, 7, 3))
    assert not np.array_equal(first.render(), second.render())


def test_frame_shows_the_arm_and_the_goal_where_it_is():
    env = MetaWorldEnv("reach-v3", image_size=96)
    frames = []
    for x in (-0.1, 0.1):
        env.reset(seed=0)
        env._simulation._target_pos = np.array([x, 0.8, 0.1])
        frames.append(env.render().astype(int))
    assert frames[0].shape == (96, 96, 3) and 20 < frames[0].mean() < 235
    moved = np.abs(frames[0] - frames[1]).sum(-1) > 60
    assert 4 <= moved.sum() < 200  # the goal's ball alone


@pytest.mark.parametrize("task", GROUPS["mt10"])
def test_expert_solves_the_task_and_success_ends_the_episode(task):
    env = MetaWorldEnv(task, observe_pixels=False)
    _, info = env.reset(seed=1)
    assert not info["is_success"] and info["instruction"] == env.task_description
    for _ in range(env._max_episode_steps):
        _, reward, terminated, truncated, info = env.step(env.expert_action())
        if terminated or truncated:
            break
    assert info["is_success"] and terminated and not truncated and reward == 1.0


def test_standing_still_is_truncated_at_meta_worlds_length():
    env = MetaWorldEnv("push-v3", action_repeat=20, observe_pixels=False)
    assert env.metadata["render_fps"] == 4 and env.metadata["action_repeat"] == 20
    env.reset(seed=0)
    ends = [env.step(np.zeros(4))[2:4] for _ in range(25)]
    assert ends == [(False, False)] * 24 + [(False, True)]


def test_actions_are_clipped_and_bad_ones_refused():
    env = MetaWorldEnv("reach-v3", observe_pixels=False)
    env.reset(seed=0)
    *_, info = env.step(np.array([3.0, -3.0, 0.5, 0.0]))
    np.testing.assert_array_equal(info["executed_action"], np.float32([1, -1, 0.5, 0]))
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(np.zeros(2))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"task": "fly"}, "task is 'fly'"), ({"action_repeat": 3}, "a divisor of 80"), ({"image_size": 8}, "at least 16")],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        MetaWorldEnv(**{"task": "push-v3", **options})


def test_demonstrations_become_a_data_set_with_the_suites_names_and_rate(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cfg = DemosConfig(
        output_dir=str(tmp_path), env="metaworld/reach-v3,drawer-close-v3", num_episodes=2, image_size=32, num_workers=1
    )
    assert demos.run(cfg)["num_episodes"] == 2
    dataset = LeRobotDataset("demos", root=tmp_path / "demos", video_backend="pyav")
    assert dataset.fps == 20 and dataset.meta.robot_type == "sawyer"
    assert dataset.features["action"]["names"] == ["dx", "dy", "dz", "gripper"]
    assert dataset.features["observation.state"]["names"] == ["x", "y", "z", "gripper"]
    assert {dataset[0]["task"], dataset[len(dataset) - 1]["task"]} == {"reach the goal", "close the drawer"}
    assert dataset[0]["action"].abs().max() <= 1


def test_evaluation_groups_by_task_and_clips_to_the_suites_bounds(tmp_path):
    class Lifts:
        def reset(self): ...

        def act(self, frames, states, instructions):
            assert frames.shape == (2, 32, 32, 3) and states.shape == (2, 4)
            assert set(instructions) <= {"reach the goal", "close the drawer"}
            return np.full((2, 4), 5.0, np.float32)

    cfg = EvaluateConfig(
        policy="in memory",
        output_dir=str(tmp_path),
        env="metaworld/reach-v3,drawer-close-v3",
        action_repeat=20,
        num_episodes=2,
        image_size=32,
        num_videos=1,
        runtime=Runtime(device="cpu"),
    )
    results = evaluate.evaluate(Lifts(), cfg)
    assert (results["num_episodes"], results["num_errors"]) == (4, 0)
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [line["family"] for line in lines] == ["reach-v3"] * 2 + ["drawer-close-v3"] * 2
    assert all(line["action_repeat"] == 20 and "split" not in line for line in lines)
    assert len(list((tmp_path / "videos").iterdir())) == 2


def test_options_of_the_tabletop_are_refused(tmp_path):
    cfg = EvaluateConfig(policy="", output_dir=str(tmp_path), env="metaworld/push-v3", split="unseen")
    with pytest.raises(ValueError, match="split is 'unseen', which env=metaworld/push-v3 ignores"):
        evaluate.evaluate(None, cfg)


def test_missing_package_is_told_with_the_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "envs.metaworld_env", None)
    with pytest.raises(ValueError, match=r"pip install 'lerobot_policy_lapa\[metaworld\]'"):
        metaworld_suite.make_env("push-v3", 32)


def test_lerobot_makes_the_tasks_that_are_asked_for():
    from lerobot.envs.factory import make_env, make_env_config
    from lerobot.envs.utils import preprocess_observation

    import lerobot_policy_lapa  # noqa: F401  registers the environments

    config = make_env_config("lapa_metaworld", task="push-v3,reach-v3", image_size=32, action_repeat=8)
    assert config.fps == 10
    envs = make_env(config, n_envs=1)["metaworld"]
    assert list(envs) == [0, 1]
    observation, _ = envs[1].reset(seed=[0])
    batch = preprocess_observation(observation)
    assert batch["observation.images.top"].shape == (1, 3, 32, 32) and batch["observation.state"].shape == (1, 4)
    assert list(envs[1].call("task_description")) == ["reach the goal"]
    for env in envs.values():
        env.close()
