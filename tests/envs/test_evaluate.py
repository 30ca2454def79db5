import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import av
import numpy as np
import pytest

from envs import evaluate
from envs.captioned_video import write_captioned_video
from envs.policy_folder import PolicyFolder, refuse_foreign_code
from envs.tabletop import TabletopEnv
from lapa.schema import EvaluateConfig, Runtime


def config(folder, **changed):
    values = {
        "policy": "in memory",
        "output_dir": str(folder),
        "families": ["reach", "block_to_relative"],
        "num_episodes": 5,
        "seed": 1000,
        "image_size": 32,
        "num_blocks_min": 2,
        "num_blocks_max": 4,
        "num_envs": 3,
        "num_videos": 1,
        "runtime": Runtime(device="cpu", num_threads=1),
    }
    return EvaluateConfig(**values | changed)


class StandStill:
    def __init__(self):
        self.batches = []

    def reset(self):
        self.batches.append([])

    def act(self, frames, states, instructions):
        assert frames.dtype == np.uint8 and frames.shape[1:] == (32, 32, 3)
        self.batches[-1].append(len(frames))
        return np.zeros((len(frames), 2), np.float32)


class Expert(StandStill):
    """Acts on the true state, through the environments that evaluation makes."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.task_envs = None
        roll_out = evaluate.roll_out_batch

        def watched(policy, task_envs, indices):
            self.task_envs = task_envs
            return roll_out(policy, task_envs, indices)

        monkeypatch.setattr(evaluate, "roll_out_batch", watched)

    def act(self, frames, states, instructions):
        return np.stack([self.task_envs.get(slot).expert_action() for slot in range(len(frames))])


def read(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_expert_succeeds_and_standing_still_fails_on_the_same_starts(tmp_path, monkeypatch):
    still = evaluate.evaluate(StandStill(), config(tmp_path / "still"))
    expert = evaluate.evaluate(Expert(monkeypatch), config(tmp_path / "expert"))
    assert still["success_rate"] == 0.0
    assert expert["success_rate"] == expert["success_reach"] == 1.0
    assert expert["success_low"] < 1.0
    pairs = list(zip(read(tmp_path / "still"), read(tmp_path / "expert"), strict=True))
    assert len(pairs) == 10
    for a, b in pairs:
        assert (a["family"], a["seed"], a["instruction"]) == (b["family"], b["seed"], b["instruction"])
        assert a["steps"] > b["steps"] > 0
        assert (a["return"], b["return"]) == (0.0, 1.0)
    results = json.loads((tmp_path / "expert" / "results.json").read_text())
    assert results["families"]["reach"]["num_successes"] == 5


def test_batches_run_in_lockstep_with_one_reset_each(tmp_path):
    policy = StandStill()
    evaluate.evaluate(policy, config(tmp_path, families=["reach"]))
    assert [set(sizes) for sizes in policy.batches] == [{3}, {2}]
    assert [len(sizes) for sizes in policy.batches] == [30, 30]


def test_killed_evaluation_goes_on_and_ends_the_same(tmp_path):
    evaluate.evaluate(StandStill(), config(tmp_path / "whole"))
    expected = read(tmp_path / "whole")
    cut = tmp_path / "cut"
    cut.mkdir()
    lines = [json.dumps(episode) + "\n" for episode in expected]
    (cut / "episodes.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    policy = StandStill()
    evaluate.evaluate(policy, config(cut))
    assert read(cut) == expected
    assert len(policy.batches) == 3  # the first batch of reach was kept, its second done again


def test_failure_of_one_simulation_is_that_episodes_alone(tmp_path, monkeypatch):
    step = TabletopEnv.step
    broken = []

    def sometimes(env, action):
        if not broken and env._num_steps == 4:
            broken.append(env)
            raise RuntimeError("physics diverged")
        return step(env, action)

    monkeypatch.setattr(TabletopEnv, "step", sometimes)
    results = evaluate.evaluate(StandStill(), config(tmp_path, families=["reach"]))
    assert (results["num_episodes"], results["num_errors"]) == (5, 1)
    errors = [episode.get("error") for episode in read(tmp_path)]
    assert errors == ["RuntimeError: physics diverged", None, None, None, None]


def test_policy_with_wrong_actions_is_refused(tmp_path):
    policy = StandStill()
    policy.act = lambda frames, states, instructions: np.zeros((len(frames), 7))
    with pytest.raises(ValueError, match="expected"):
        evaluate.evaluate(policy, config(tmp_path))


def test_videos_show_the_first_episodes_with_their_caption(tmp_path):
    evaluate.evaluate(StandStill(), config(tmp_path))
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["block_to_relative_000_failure.mp4", "reach_000_failure.mp4"]
    with av.open(str(tmp_path / "videos" / "reach_000_failure.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 31
    assert frames[0].width == 256 and frames[0].height > 256


def test_long_captions_are_wrapped(tmp_path):
    frames = [np.zeros((64, 64, 3), np.uint8)]
    heights = []
    for words in (2, 40):
        write_captioned_video(tmp_path / f"{words}.mp4", frames, "push " * words, 10)
        with av.open(str(tmp_path / f"{words}.mp4")) as container:
            heights.append(container.streams.video[0].height)
    assert heights[1] > heights[0] + 40


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763), (10, 10, 0.722, 1.0)]
)
def test_wilson_interval_matches_published_values(successes, trials, low, high):
    np.testing.assert_allclose(evaluate.wilson_interval(successes, trials), (low, high), atol=1e-3)


@pytest.fixture(scope="module")
def act_folder(tmp_path_factory):
    """A tiny, untrained policy of LeRobot's own, saved as lerobot-train saves it."""
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    config = ACTConfig(
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_decoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
        chunk_size=6,
        n_action_steps=3,
        device="cpu",
    )
    vector = {"mean": torch.zeros(2), "std": torch.full((2,), 0.01)}
    image = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    statistics = {"observation.images.top": image, "observation.state": vector, "action": vector}
    folder = tmp_path_factory.mktemp("act")
    ACTPolicy(config).save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=statistics):
        processor.save_pretrained(folder)
    return folder


def test_any_lerobot_policy_folder_can_be_evaluated(act_folder, tmp_path):
    cfg = config(tmp_path / "a", policy=str(act_folder), families=["reach"], num_episodes=2)
    results = evaluate.run(cfg)
    assert results["num_episodes"] == 2 and results["num_errors"] == 0
    evaluate.run(replace(cfg, output_dir=str(tmp_path / "b")))
    assert read(tmp_path / "a") == read(tmp_path / "b")


class Wanders(StandStill):
    """Draws from torch's global generator, as a policy with a diffusion head does."""

    def act(self, frames, states, instructions):
        import torch

        return (0.02 * torch.randn(len(frames), 2)).numpy()


def test_workers_find_what_one_process_does(tmp_path, monkeypatch):
    # A thread for a process: a spawned one takes half a minute to import what a policy needs.
    monkeypatch.setattr(evaluate, "worker_pool", lambda num_workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(evaluate, "PolicyFolder", lambda *arguments: Wanders())
    monkeypatch.setattr(evaluate, "set_num_threads", lambda num_threads: None)
    for num_workers in (1, 2):
        evaluate.run(config(tmp_path / str(num_workers), num_workers=num_workers))
    evaluate.policy_of_worker.cache_clear()
    assert len(read(tmp_path / "1")) == 10
    assert read(tmp_path / "1") == read(tmp_path / "2")
    assert len(list((tmp_path / "2" / "videos").iterdir())) == 2


def test_wrong_policy_is_told_by_the_workers_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "worker_pool", lambda num_workers: ThreadPoolExecutor(1))
    with pytest.raises(ValueError, match="is no LeRobot policy"):
        evaluate.run(config(tmp_path / "out", policy=str(tmp_path), num_workers=2))


def test_policy_that_wants_another_state_is_refused(act_folder):
    policy = PolicyFolder(act_folder, "cpu", 32)
    with pytest.raises(ValueError, match=r"wants states of shape \(2,\), this suite has \(4,\)"):
        policy.act(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 4), np.float32), ["push"])


def test_policy_of_another_image_size_is_refused(act_folder):
    with pytest.raises(ValueError, match="set image_size=32"):
        PolicyFolder(act_folder, "cpu", 64)


@pytest.mark.parametrize("config", [None, '{"model": "a quantizer"}'])
def test_folder_without_a_policy_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"is no LeRobot policy.*lapa finetune"):
        PolicyFolder(tmp_path, "cpu", 64)


def test_processor_file_cannot_bring_its_own_code(tmp_path):
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": [{"registry_name": "x"}, {"class": "os.system"}]}')
    with pytest.raises(ValueError, match=r"asks for 'os.system'"):
        refuse_foreign_code(tmp_path)
