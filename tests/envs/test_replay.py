import json
from types import SimpleNamespace

import numpy as np
import pytest

from envs import demos, replay
from envs.shards import make_env
from lapa.schema import DemosConfig

TOLERANCE_M = 0.01


def open_dataset(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(folder.name, root=folder, video_backend="pyav")


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Play without noise, so that idle actions are exactly zero."""
    folder = tmp_path_factory.mktemp("play")
    cfg = DemosConfig(
        output_dir=str(folder),
        num_episodes=8,
        seed=3,
        image_size=32,
        num_blocks_min=2,
        num_blocks_max=3,
        action_noise_m=0.0,
        play=True,
        video=False,
        num_workers=1,
    )
    demos.run(cfg)
    return folder


def propose(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tmp_path, play, rows, **changed):
    values = {
        "output_dir": str(tmp_path / "replayed"),
        "data": str(play),
        "proposals": str(propose(tmp_path / "proposals.jsonl", rows)),
        "policy": None,
        "tolerance_m": TOLERANCE_M,
        "rest_m": 0.01,
        "device": "cpu",
    }
    return SimpleNamespace(**{**values, **changed})


def without_idling(actions):
    return actions[np.linalg.norm(actions, axis=1) > 1e-6]


def test_play_is_longer_than_its_purpose_and_does_not_tell_it(play):
    rows = [json.loads(line) for line in (play / "episodes.jsonl").read_text().splitlines()]
    dataset = open_dataset(play / "demos")
    assert all(row["instruction"] for row in rows)
    assert [dataset.meta.episodes[i]["tasks"] for i in range(8)] == [[""]] * 8
    recording = replay.read_recording(play)
    assert sum(len(without_idling(actions)) < len(actions) for actions in recording.actions) >= 2


def test_an_episode_without_candidates_is_recorded_as_it_was(tmp_path, play):
    results = replay.run(config(tmp_path, play, [{"episode": 2, "instruction": "touch it", "candidates": []}]))
    assert results["share_changed"] == 0 and results["mean_frames_after"] == results["mean_frames_before"]
    made, source = open_dataset(tmp_path / "replayed" / "demos"), open_dataset(play / "demos")
    first = int(source.meta.episodes[2]["dataset_from_index"])
    assert len(made) == source.meta.episodes[2]["length"]
    for step in range(len(made)):
        before, after = source[first + step], made[step]
        assert after["task"] == "touch it"
        np.testing.assert_allclose(after["observation.state"], before["observation.state"], atol=1e-5)
        np.testing.assert_allclose(after["action"], before["action"], atol=1e-5)
        difference = after["observation.images.top"] - before["observation.images.top"]
        assert float(difference.square().mean()) < 10**-3.5  # 35 dB, what the encoder costs


def test_the_first_candidate_that_ends_the_same_way_is_taken(tmp_path, play):
    recording = replay.read_recording(play)
    idle = [i for i, actions in enumerate(recording.actions) if len(without_idling(actions)) < len(actions)]
    rows = []
    for episode in idle:
        actions = recording.actions[episode]
        elsewhere = -without_idling(actions)
        candidates = [elsewhere.tolist(), without_idling(actions).tolist()]
        rows.append({"episode": episode, "instruction": "go", "candidates": candidates})
    results = replay.run(config(tmp_path, play, rows))
    fates = [json.loads(line) for line in (tmp_path / "replayed" / "episodes.jsonl").read_text().splitlines()]
    assert results["share_changed"] == 1.0
    for fate in fates:
        assert fate["candidate"] == "1"
        assert fate["deviation_m"] <= TOLERANCE_M < fate["deviations_m"][0]
        assert fate["num_frames"] == len(without_idling(recording.actions[fate["episode"]]))
    assert [fate["episode"] for fate in fates] == idle


def test_a_candidate_is_refused_for_a_block_that_it_leaves_elsewhere(play):
    recording = replay.read_recording(play)
    env = make_env(recording.options, "reach")
    env.reset(seed=recording.episodes[0]["seed"])
    scene = env.scene
    # Into the block and beyond, then back: the tip ends where it began, the block does not.
    way = scene.blocks_xy[0] - scene.tip_xy
    steps = int(np.linalg.norm(way) / 0.02) + 2
    there = np.repeat((way / np.linalg.norm(way) * 0.02)[None], steps, axis=0).astype(np.float32)
    actions = np.concatenate([there, -there, np.zeros((1, 2), np.float32)])
    end, states = replay.end_state(env, recording.episodes[0]["seed"], actions)
    pushed = replay.Recording(recording.options, recording.episodes[:1], [states], [actions])
    proposal = {"episode": 0, "instruction": "go", "candidates": [np.zeros((1, 2)).tolist()]}
    _, fate = replay.carry_out(env, pushed, proposal, TOLERANCE_M)
    assert np.linalg.norm(end[0] - scene.tip_xy) < TOLERANCE_M
    assert np.linalg.norm(end[1:] - scene.blocks_xy, axis=1).max() > TOLERANCE_M
    assert fate["candidate"] == "original" and len(fate["deviations_m"]) == 1


class FiveSteps:
    """A policy that moves for five steps and then rests; it notes what it was told."""

    def reset(self):
        self.step, self.told = 0, set()

    def act(self, frames, states, instructions):
        self.step += 1
        self.told |= set(instructions)
        inward = -np.sign(states) * 0.02
        return inward if self.step <= 5 else np.zeros_like(inward)


def test_a_policy_acts_from_the_episodes_start_until_it_rests(play):
    recording = replay.read_recording(play)
    env, policy = make_env(recording.options, "reach"), FiveSteps()
    episode, fate = replay.act(env, recording, {"episode": 1, "instruction": "go left"}, policy, rest_m=0.005)
    assert len(episode.frames) == len(episode.actions) == 5
    assert policy.told == {"go left"} and episode.instruction == "go left" and fate["candidate"] == "policy"
    np.testing.assert_allclose(episode.states[0], recording.states[1][0], atol=1e-5)


def test_a_killed_replay_goes_on_and_ends_the_same(tmp_path, play, monkeypatch):
    monkeypatch.setattr(replay, "EPISODES_PER_SHARD", 1)
    rows = [{"episode": i, "instruction": f"go {i}", "candidates": []} for i in range(3)]
    whole = replay.run(config(tmp_path, play, rows, output_dir=str(tmp_path / "whole")))
    carry_out, calls = replay.carry_out, []

    def killed(env, recording, proposal, tolerance_m):
        calls.append(proposal["episode"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return carry_out(env, recording, proposal, tolerance_m)

    monkeypatch.setattr(replay, "carry_out", killed)
    cfg = config(tmp_path, play, rows)
    with pytest.raises(KeyboardInterrupt):
        replay.run(cfg)
    assert replay.run(cfg) == whole
    assert calls == [0, 1, 1, 2]
    name = "demos/data/chunk-000/file-000.parquet"
    assert (tmp_path / "replayed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_data_that_do_not_repeat_are_refused(play):
    recording = replay.read_recording(play)
    recording.states[0] = recording.states[0] + np.float32(0.01)
    env = make_env(recording.options, "reach")
    with pytest.raises(ValueError, match="does not repeat"):
        replay.carry_out(env, recording, {"episode": 0, "instruction": "go", "candidates": []}, TOLERANCE_M)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"episode": 8, "instruction": "go", "candidates": []}, "below 8"),
        ({"episode": 0, "instruction": "", "candidates": []}, "an instruction"),
        ({"episode": 0, "instruction": "go"}, "no candidates"),
    ],
)
def test_proposals_that_fit_nothing_are_named(tmp_path, play, row, message):
    with pytest.raises(ValueError, match=message):
        replay.run(config(tmp_path, play, [row]))


def test_data_without_seeds_are_refused(tmp_path, play):
    with pytest.raises(ValueError, match="output_dir of `lapa demos`"):
        replay.run(
            config(tmp_path, play, [{"episode": 0, "instruction": "go", "candidates": []}], data=str(play / "demos"))
        )
