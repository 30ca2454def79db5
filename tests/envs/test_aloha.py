import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.aloha_suite import TASKS

needed = pytest.importorskip("envs.aloha_env", reason="needs gym-aloha: pip install 'lerobot_policy_lapa[aloha]'")
AlohaEnv = needed.AlohaEnv


def test_environment_passes_gymnasiums_checker_and_shows_the_scene():
    env = AlohaEnv("transfer_cube", image_size=96)
    check_env(env)
    observation, _ = env.reset(seed=0)
    red = (observation["pixels"][..., 0] > 120) & (observation["pixels"][..., 1] < 60)
    assert red.sum() >= 2  # the cube
    assert observation["pixels"].mean() > 20


@pytest.mark.parametrize("task", TASKS)
def test_states_are_those_of_gym_aloha(task, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "off")  # else dm_control shuts EGL down at exit, under our renderers
    dm_mujoco = pytest.importorskip("dm_control.mujoco")
    from gym_aloha.env import AlohaEnv as Original

    frame = np.zeros((480, 640, 3), np.uint8)
    monkeypatch.setattr(dm_mujoco.Physics, "render", lambda *arguments, **options: frame)
    ours, original = AlohaEnv(task, observe_pixels=False), Original(task, obs_type="pixels_agent_pos")
    observation, _ = ours.reset(seed=5)
    expected, _ = original.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(12):
        np.testing.assert_allclose(observation["agent_pos"], expected["agent_pos"], atol=1e-5)
        action = np.clip(
            observation["agent_pos"] + rng.normal(0, 0.1, 14), ours.action_space.low, ours.action_space.high
        )
        observation, *_ = ours.step(action)
        expected, *_ = original.step(action)
    np.testing.assert_allclose(ours.data.qpos, original._env.physics.data.qpos, atol=1e-6)


def test_success_is_told_by_the_contacts():
    env = AlohaEnv("transfer_cube", observe_pixels=False)
    env.reset(seed=0)
    rest = np.concatenate([env.data.ctrl[[0, 1, 2, 3, 4, 5]], [1], env.data.ctrl[[8, 9, 10, 11, 12, 13]], [1]])
    assert not env.step(rest)[-1]["is_success"]
    finger = env.data.geom("vx300s_left/10_left_gripper_finger").xpos
    env.data.qpos[16:19] = finger
    assert env.step(rest)[-1]["is_success"]


def test_episode_is_truncated_at_its_length_and_demos_have_no_expert(tmp_path):
    from envs import demos
    from lapa.schema import DemosConfig

    env = AlohaEnv("insertion", observe_pixels=False)
    assert (env._max_episode_steps, env.metadata["render_fps"]) == (300, 50)
    env._max_episode_steps = 2
    env.reset(seed=0)
    assert [env.step(np.zeros(14))[3] for _ in range(2)] == [False, True]
    with pytest.raises(ValueError, match="env=aloha has no scripted expert"):
        demos.run(DemosConfig(output_dir=str(tmp_path), env="aloha"))
