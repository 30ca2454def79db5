import csv
import json

import numpy as np
import pytest

from envs import demos, shards
from envs.shards import ShardOptions, make_env, record_episode
from lapa.schema import DemosConfig

FAMILIES = ["reach", "block_to_relative"]


def config(folder, **changed):
    values = {
        "output_dir": str(folder),
        "families": FAMILIES,
        "num_episodes": 6,
        "image_size": 32,
        "num_blocks_min": 2,
        "num_blocks_max": 4,
        "mp4": True,
        "num_workers": 1,
    }
    return DemosConfig(**values | changed)


def options_of(cfg):
    return ShardOptions(
        tuple(cfg.families), cfg.num_episodes, cfg.seed, cfg.split, cfg.image_size, (2, 4), cfg.variant, 0.004, cfg.mp4
    )


def open_dataset(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(folder.name, root=folder, video_backend="pyav")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Six episodes in three shards."""
    folder = tmp_path_factory.mktemp("demos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "EPISODES_PER_SHARD", 2)
        results = demos.run(config(folder))
    return folder, results


def test_data_set_gives_back_the_frames_states_and_actions_of_the_rollout(written):
    folder, results = written
    dataset = open_dataset(folder / "demos")
    assert dataset.num_episodes == results["num_episodes"] == 6
    assert len(dataset) == results["num_frames"]
    position = 0
    for index in range(6):
        episode = record_episode(make_env(options_of(config(folder)), FAMILIES[index % 2]), index, 0.004)
        for step in range(len(episode.frames)):
            item = dataset[position]
            assert item["task"] == episode.instruction
            assert int(item["episode_index"]) == index and int(item["frame_index"]) == step
            np.testing.assert_array_equal(item["observation.state"], episode.states[step])
            np.testing.assert_array_equal(item["action"], episode.actions[step])
            pixels = item["observation.images.top"].permute(1, 2, 0).numpy() * 255
            assert np.square(pixels - episode.frames[step]).mean() < 255**2 * 10**-3.5  # 35 dB
            position += 1


def test_action_moves_the_tip_from_this_state_to_the_next(written):
    table = open_dataset(written[0] / "demos").hf_dataset.with_format("numpy")
    state, action, episode = (np.stack(table[key]) for key in ("observation.state", "action", "episode_index"))
    follows = episode[1:] == episode[:-1]
    moved = (state[1:] - state[:-1])[follows]
    # A push slows the tip; a free one goes where it is told.
    assert np.median(np.abs(moved - action[:-1][follows])) < 5e-4
    assert np.corrcoef(moved.ravel(), action[:-1][follows].ravel())[0, 1] > 0.98


def test_families_are_balanced_and_every_seed_is_kept(written):
    rows = [json.loads(line) for line in (written[0] / "episodes.jsonl").read_text().splitlines()]
    assert [row["family"] for row in rows] == FAMILIES * 3
    assert [row["seed"] % shards.ATTEMPT_STRIDE for row in rows] == list(range(6))


def test_video_data_set_has_instructions_and_no_actions(written):
    dataset = open_dataset(written[0] / "video")
    assert len(dataset) == written[1]["num_frames"]
    item = dataset[0]
    assert "action" not in item and "observation.state" not in item
    assert item["task"] == open_dataset(written[0] / "demos")[0]["task"]


def test_clips_come_with_their_captions(written):
    import av

    with (written[0] / "mp4" / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    num_frames = 0
    for row in rows:
        assert row["caption"]
        with av.open(str(written[0] / "mp4" / row["path"])) as container:
            num_frames += sum(1 for _ in container.decode(video=0))
    assert num_frames == written[1]["num_frames"]


def test_statistics_are_those_of_the_data(written):
    dataset = open_dataset(written[0] / "demos")
    action = np.stack(dataset.hf_dataset.with_format("numpy")["action"])
    np.testing.assert_allclose(dataset.meta.stats["action"]["mean"], action.mean(0), atol=1e-6)
    np.testing.assert_allclose(dataset.meta.stats["action"]["q99"], np.quantile(action, 0.99, axis=0), atol=1e-6)
    image = dataset.meta.stats["observation.images.top"]
    assert np.shape(image["mean"]) == (3, 1, 1)
    assert 0.5 < np.mean(image["mean"]) < 0.9


def test_lerobots_own_tools_accept_the_data_set(written, tmp_path):
    from lerobot.datasets.dataset_tools import add_features, delete_episodes

    dataset = open_dataset(written[0] / "demos")
    labels = np.arange(len(dataset))[:, None].astype(np.int64)
    labelled = add_features(
        dataset,
        {"label": (labels, {"dtype": "int64", "shape": (1,), "names": None})},
        output_dir=tmp_path / "labelled",
        repo_id="labelled",
    )
    assert int(labelled[5]["label"]) == 5
    fewer = delete_episodes(dataset, [0], output_dir=tmp_path / "fewer", repo_id="fewer")
    assert fewer.num_episodes == 5


def test_killed_run_goes_on_and_ends_the_same(written, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "EPISODES_PER_SHARD", 2)
    cfg = config(tmp_path)
    # What a kill leaves behind: a finished shard, and one cut short.
    shards.write_shard(tmp_path / "shards" / "shard-00000", options_of(cfg), 0)
    finished = (tmp_path / "shards" / "shard-00000").stat().st_mtime_ns
    (tmp_path / "shards" / "shard-00001.partial").mkdir()
    (tmp_path / "shards" / "shard-00001.partial" / "frames.mp4").write_bytes(b"cut")
    calls = []
    monkeypatch.setattr(demos, "write_shard", lambda folder, *a: calls.append(a[-1]) or shards.write_shard(folder, *a))
    assert demos.run(cfg) == written[1]
    assert calls == [1, 2] and finished
    name = "data/chunk-000/file-000.parquet"
    assert (tmp_path / "demos" / name).read_bytes() == (written[0] / "demos" / name).read_bytes()
    video = "videos/observation.images.top/chunk-000/file-001.mp4"
    assert (tmp_path / "demos" / video).read_bytes() == (written[0] / "demos" / video).read_bytes()
    assert not (tmp_path / "shards").exists()


def test_finished_run_is_not_repeated_and_other_options_are_refused(written):
    folder, results = written
    assert demos.run(config(folder)) == results
    with pytest.raises(ValueError, match="choose another output_dir"):
        demos.run(config(folder, seed=1))


def test_two_workers_write_what_one_does(tmp_path):
    num_episodes = shards.EPISODES_PER_SHARD + 1
    rows = []
    for num_workers in (1, 2):
        cfg = config(tmp_path / str(num_workers), families=["reach"], num_episodes=num_episodes, video=False, mp4=False)
        cfg.num_workers = num_workers
        demos.run(cfg)
        rows.append((tmp_path / str(num_workers) / "demos/data/chunk-000/file-000.parquet").read_bytes())
    assert rows[0] == rows[1]


def test_unsolved_episodes_are_counted_and_left_out(tmp_path, monkeypatch):
    record = shards.record_episode
    monkeypatch.setattr(
        shards, "record_episode", lambda env, seed, noise, play: None if seed == 1 else record(env, seed, noise, play)
    )
    results = demos.run(config(tmp_path, num_episodes=3, mp4=False))
    assert (results["num_episodes"], results["num_skipped"]) == (2, 1)
    assert open_dataset(tmp_path / "demos").num_episodes == 2


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no task"):
        demos.run(config(tmp_path, families=["fly"]))
