import json

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from lerobot.envs.factory import make_env, make_env_config

import lerobot_policy_lapa  # noqa: F401  registers the environments
from envs import demos, evaluate
from envs.gripper.env import GripperEnv
from envs.suites import choose
from lapa.application import register_schema, to_dataclass
from lapa.schema import DemosConfig, EvaluateConfig, Runtime


class FromState:
    """Lowers the open gripper: enough to see that states come in and actions go out."""

    def reset(self):
        self.states = []

    def act(self, frames, states, instructions):
        assert frames.shape[1:] == (32, 32, 3)
        self.states.append(states.copy())
        return np.tile(np.float32([0, 0, -0.03, 0.08]), (len(frames), 1))


def test_demonstrations_hold_four_named_states_and_actions_of_every_task(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cfg = DemosConfig(output_dir=str(tmp_path), env="gripper", num_episodes=6, image_size=32, num_workers=1)
    assert demos.run(cfg)["num_episodes"] == 6
    dataset = LeRobotDataset("demos", root=tmp_path / "demos", video_backend="pyav")
    assert dataset.meta.robot_type == "gripper_default" and dataset.fps == 10
    assert dataset.features["action"]["names"] == ["dx", "dy", "dz", "opening"]
    assert dataset.features["observation.state"]["shape"] == (4,)
    actions = np.stack([dataset[i]["action"].numpy() for i in range(len(dataset))])
    assert np.abs(actions[:, :3]).max() <= 0.03 + 1e-6
    assert actions[:, 3].min() == 0 and actions[:, 3].max() > 0.07  # closed and open
    families = [json.loads(line)["family"] for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert families == ["pick", "place", "stack"] * 2


def test_evaluation_runs_the_tasks_that_are_asked_for(tmp_path):
    policy = FromState()
    cfg = EvaluateConfig(
        policy="in memory",
        output_dir=str(tmp_path),
        env="gripper/stack,pick",
        num_episodes=2,
        image_size=32,
        num_envs=2,
        num_videos=1,
        runtime=Runtime(device="cpu", num_threads=1),
    )
    results = evaluate.evaluate(policy, cfg)
    assert (results["num_episodes"], results["num_errors"], results["success_stack"]) == (4, 0, 0.0)
    assert policy.states[0].shape == (2, 4)
    assert policy.states[10][0, 2] < policy.states[0][0, 2] - 0.05
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_numbers_of_blocks_and_families_are_the_tabletops_options():
    assert choose(EvaluateConfig(env="gripper")) == ("gripper", ("pick", "place", "stack"))
    for foreign in ({"num_blocks_max": 4}, {"families": ["pick"]}):
        with pytest.raises(ValueError, match="env=gripper ignores"):
            choose(EvaluateConfig(env="gripper", **foreign))


def test_lerobot_makes_it_and_is_told_of_success():
    (env,) = make_env(make_env_config("gripper", task="stack", image_size=32), n_envs=1)["gripper"].values()
    observation, _ = env.reset(seed=[3])
    assert observation["pixels"]["top"].shape == (1, 32, 32, 3) and observation["agent_pos"].shape == (1, 4)
    for _ in range(100):
        _, _, terminated, truncated, info = env.step(np.stack(env.call("expert_action")))
        if terminated[0] or truncated[0]:
            break
    assert bool(info["final_info"]["is_success"][0])
    env.close()


def test_the_servers_limits_are_the_action_bounds():
    register_schema()
    with initialize_config_module("configs", version_base="1.3"):
        limits = to_dataclass("serve", compose("serve", ["policy=p", "embodiment=gripper"])).embodiment
    bounds = GripperEnv("pick").action_space
    np.testing.assert_allclose([limits.action_low, limits.action_high], [bounds.low, bounds.high], rtol=1e-6)
    # No command within the bounds is slowed, at the rate of control.
    assert (np.array(limits.max_rate) / limits.control_hz >= bounds.high - 1e-6).all()
