import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lapa.checkpoint import read_json, write_json, write_tensors
from lapa.data import (
    FramePairs,
    FrameStore,
    action_chunks,
    frame_gap,
    open_frames,
    read_store,
    split_episodes,
    to_float,
)

SIZE = 8


@pytest.fixture
def store(tmp_path):
    """Episodes of 5, 9 and 2 frames; every pixel of a frame is its index, its action (index, 1)."""
    lengths = [5, 9, 2]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(offsets[-1])
    folder = tmp_path / "store"
    folder.mkdir()
    np.broadcast_to(index[:, None, None, None], (len(index), SIZE, SIZE, 3)).astype(np.uint8).tofile(
        folder / "frames.u8"
    )
    actions = torch.from_numpy(np.stack([index, np.ones_like(index)], 1)).float()
    write_tensors(folder / "index.safetensors", {"episode_offsets": torch.from_numpy(offsets), "action": actions})
    meta = {"version": 1, "num_frames": len(index), "image_size": SIZE, "fps": 10}
    meta |= {"instructions": ["a", "b", "c"], "sources": ["x", "y", "x"], "skipped": []}
    write_json(folder / "store.json", meta)
    return open_frames(folder, SIZE)


def test_pairs_never_cross_clips_and_are_a_gap_apart(store):
    pairs = FramePairs(store, gap=3, episodes=np.arange(3))
    frames = pairs.frames(np.arange(len(pairs)))[:, :, 0, 0, 0].astype(int)
    assert frames.tolist() == [[0, 3], [1, 4], [5, 8], [6, 9], [7, 10], [8, 11], [9, 12], [10, 13]]
    assert pairs.displacements(np.array([0, 2])).tolist() == [[0 + 1 + 2, 3], [5 + 6 + 7, 3]]


def test_gap_of_zero_frames_or_longer_than_every_clip_is_an_error(store):
    with pytest.raises(ValueError, match="raise frame_gap_s"):
        frame_gap(store, 0.04, None)
    assert frame_gap(store, 0.4, None) == 4 and frame_gap(store, 0.4, 7) == 7
    with pytest.raises(ValueError, match=r"longer than the frame gap"):
        FramePairs(store, gap=20, episodes=np.arange(3))


def test_a_gap_in_seconds_lasts_as_long_in_episodes_of_other_rates(store):
    mixed = replace(store, episode_fps=np.array([10.0, 20.0, 10.0]))
    gap = frame_gap(mixed, 0.2, None)
    assert gap == 2 and json.dumps(gap) == "2"
    pairs = FramePairs(mixed, gap, episodes=np.arange(3))
    frames = pairs.frames(np.arange(len(pairs)))[:, :, 0, 0, 0].astype(int)
    # Two frames are .2 s of the first episode, four of the second; the third is shorter than that.
    assert frames.tolist() == [[0, 2], [1, 3], [2, 4], [5, 9], [6, 10], [7, 11], [8, 12], [9, 13]]
    assert pairs.displacements(np.array([0, 3])).tolist() == [[0 + 1, 2], [5 + 6 + 7 + 8, 4]]
    # Stated in frames, for clips whose clock is not to be trusted, it is the same in all.
    assert set(FramePairs(mixed, frame_gap(mixed, 0.2, 2), np.arange(3)).gaps) == {2}
    with pytest.raises(ValueError, match=r"0 frames at 4.0 frames/s: raise frame_gap_s to at least 0.250"):
        frame_gap(replace(store, episode_fps=np.array([10.0, 4.0, 10.0])), 0.1, None)


def test_the_rates_of_the_clips_are_read_from_the_store(store):
    assert store.episode_fps is None
    meta = read_json(store.folder / "store.json")
    write_json(store.folder / "store.json", meta | {"clip_fps": [10, 10, 10]})
    assert read_store(store.folder).episode_fps is None
    write_json(store.folder / "store.json", meta | {"clip_fps": [10, 15, 10]})
    assert read_store(store.folder).episode_fps.tolist() == [10, 15, 10]


def test_chunks_are_padded_at_the_end_of_their_episode(store):
    chunks, is_pad = action_chunks(store, 3)
    assert chunks[3, :, 0].tolist() == [3, 4, 0] and is_pad[3].tolist() == [False, False, True]
    assert is_pad[4].tolist() == [False, True, True]


def test_split_by_source_or_at_random_is_disjoint(store):
    assert [part.tolist() for part in split_episodes(store, 0.5, 0, ["x"])] == [[1], [0, 2]]
    train, test = split_episodes(store, 0.34, seed=0)
    assert sorted([*train, *test]) == [0, 1, 2] and len(test) == 1
    with pytest.raises(ValueError, match=r"'z'.*it has"):
        split_episodes(store, 0.5, 0, ["z"])


def test_bad_folders_name_the_fix(store, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        open_frames(tmp_path / "absent", SIZE)
    with pytest.raises(ValueError, match="lapa ingest"):
        open_frames(tmp_path, SIZE)
    with pytest.raises(ValueError, match="set image_size=8"):
        open_frames(store.folder, 64)
    with (store.folder / "frames.u8").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="has 100 bytes"):
        open_frames(store.folder, SIZE)


def lerobot_dataset(root, with_images=True, num_episodes=3):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {"action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}}
    if with_images:
        image = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
        features["observation.images.top"] = image
    dataset = LeRobotDataset.create("toy", fps=10, features=features, root=root, video_backend="pyav")
    for episode in range(num_episodes):
        for step in range(6):
            frame = {"action": np.float32([episode, step]), "task": f"task {episode}"}
            if with_images:
                frame["observation.images.top"] = np.full((64, 64, 3), 20 + 60 * episode + 8 * step, np.uint8)
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root


def test_lerobot_dataset_is_decoded_in_order_with_its_actions_and_instructions(tmp_path):
    root = lerobot_dataset(tmp_path / "toy")
    store = open_frames(root, 32, cache_dir=str(tmp_path / "cache"))
    assert store.episode_offsets.tolist() == [0, 6, 12, 18]
    assert store.instructions == ["task 0", "task 1", "task 2"]
    assert store.actions is not None
    assert store.actions[8].tolist() == [1, 2]
    expected = np.array([20 + 60 * e + 8 * s for e in range(3) for s in range(6)])
    assert np.abs(store.frames.mean(axis=(1, 2, 3)) - expected).max() < 4


def test_truncated_video_file_costs_its_episodes_and_is_counted(tmp_path):
    root = lerobot_dataset(tmp_path / "toy")
    (video,) = root.rglob("*.mp4")
    os.truncate(video, video.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"no episode of .* could be decoded"):
        open_frames(root, 32, cache_dir=str(tmp_path / "cache"))


def test_dataset_without_images_says_so(tmp_path):
    root = lerobot_dataset(tmp_path / "toy", with_images=False)
    with pytest.raises(ValueError, match=r"has no images.*observation.images"):
        open_frames(root, 32, cache_dir=str(tmp_path / "cache"))


def test_frames_become_channels_first_floats():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[..., 1] = 255
    tensor = to_float(frames)
    assert tensor.shape == (2, 3, 4, 6) and tensor[:, 1].min() == 1 and tensor[:, 0].max() == 0


@pytest.mark.parametrize("are_positions", [True, False])
def test_the_way_between_frames_is_told_by_positions_and_by_displacements_alike(tmp_path, are_positions):
    """26 joints in 3 episodes: what is commanded is where to be next, or how far to go until then."""
    rng = np.random.default_rng(0)
    offsets = np.array([0, 30, 60, 90])
    steps = rng.normal(0, 0.02, (90, 26))
    places = np.concatenate([rng.normal(0, 0.3, 26) + np.cumsum(steps[a:b], 0) for a, b in pairwise(offsets)])
    following = np.concatenate([np.concatenate([places[a + 1 : b], places[b - 1 : b]]) for a, b in pairwise(offsets)])
    store = FrameStore(
        folder=tmp_path,
        frames=np.zeros((90, 4, 4, 3), np.uint8),
        episode_offsets=offsets,
        fps=30.0,
        instructions=["go"] * 3,
        sources=["robot"] * 3,
        actions=following if are_positions else following - places,
        states=places,
        skipped=[],
    )
    assert store.actions_are_positions is are_positions
    pairs = FramePairs(store, 5, np.arange(3))
    expected = places[pairs.first_frames + 5] - places[pairs.first_frames]
    np.testing.assert_allclose(pairs.displacements(np.arange(len(pairs))), expected, atol=1e-6)


def test_a_data_set_of_an_older_version_is_sent_to_convert(tmp_path):
    (tmp_path / "meta").mkdir()
    write_json(tmp_path / "meta" / "info.json", {"codebase_version": "v2.1"})
    with pytest.raises(ValueError, match="lapa convert"):
        open_frames(tmp_path, SIZE)
