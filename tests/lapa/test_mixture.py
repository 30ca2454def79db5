import json

import numpy as np
import pytest

from lapa.data import FramePairs, action_chunks, frame_gap, read_store
from lapa.mixture import open_mixture
from lapa.schema import MixturePart
from lapa.stage import input_digests
from tests.lapa.latent_vla.conftest import EPISODE_LENGTH, write_store


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data sets, of 10 and of 4 episodes, recorded at 10 and at 20 frames a second."""
    root = tmp_path_factory.mktemp("mixture")
    folders = [write_store(root / "large", num_episodes=10), write_store(root / "small", num_episodes=4, seed=1)]
    meta = json.loads((folders[1] / "store.json").read_text())
    (folders[1] / "store.json").write_text(json.dumps(meta | {"fps": 20.0}))
    return folders


def mixed(folders, weights=(1.0, 3.0)):
    parts = [MixturePart(path=str(path), weight=weight) for path, weight in zip(folders, weights, strict=True)]
    return open_mixture(None, parts, 16, None)


def test_a_data_set_is_drawn_as_often_as_its_weight_says_and_all_its_frames_alike(folders):
    mixture = mixed(folders)
    frames = np.arange(mixture.store.num_frames)
    drawn = mixture.sampler(frames)(np.random.default_rng(0), 20_000)
    from_small = drawn[drawn >= 10 * EPISODE_LENGTH]
    assert len(from_small) / len(drawn) == pytest.approx(0.75, abs=0.02)
    counts = np.bincount(from_small - 10 * EPISODE_LENGTH, minlength=4 * EPISODE_LENGTH)
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()
    assert np.array_equal(drawn, mixture.sampler(frames)(np.random.default_rng(0), 20_000))


def test_a_mixture_of_one_is_that_data_set_and_draws_the_same_frames(folders):
    mixture = open_mixture(None, [MixturePart(path=str(folders[0]), weight=7)], 16, None)
    assert isinstance(mixture.store.frames, np.memmap)
    frames = np.arange(0, mixture.store.num_frames, 2)
    drawn = frames[mixture.sampler(frames)(np.random.default_rng(3), 50)]
    assert np.array_equal(drawn, np.random.default_rng(3).choice(frames, 50))


def test_the_mixed_store_has_every_frame_with_its_instruction_and_actions(folders):
    store, stores = mixed(folders).store, [read_store(folder) for folder in folders]
    numbers = np.array([[0, 59], [60, 83], [61, 5]])
    expected = np.concatenate([part.frames for part in stores])[numbers]
    assert np.array_equal(store.frames[numbers], expected)
    assert store.instructions == stores[0].instructions + stores[1].instructions
    chunks, is_pad = action_chunks(store, 3)
    own, own_pad = action_chunks(stores[1], 3)
    assert np.array_equal(chunks[60:], own) and np.array_equal(is_pad[60:], own_pad)


def test_a_gap_in_seconds_is_another_number_of_frames_in_each_data_set(folders):
    store = mixed(folders).store
    pairs = FramePairs(store, frame_gap(store, 0.1, None), np.arange(store.num_episodes))
    assert set(pairs.gaps[pairs.first_frames < 60]) == {1} and set(pairs.gaps[pairs.first_frames >= 60]) == {2}


def test_some_episodes_of_every_data_set_are_held_out(folders):
    train, held_out = mixed(folders).split(0.25, seed=0)
    assert sorted([*train, *held_out]) == list(range(14))
    assert (held_out >= 10).sum() == 1 and (held_out < 10).sum() == 2


def test_mistakes_are_named(folders):
    a, b = map(str, folders)
    with pytest.raises(ValueError, match=r"data is required: data=\.\.\., or several data sets as mixture="):
        open_mixture(None, [], 16, None)
    with pytest.raises(ValueError, match="choose one of them"):
        open_mixture(a, [MixturePart(path=b)], 16, None)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"small is .*, expected more than 0"):
            open_mixture(None, [MixturePart(path=a), MixturePart(path=b, weight=weight)], 16, None)
    with pytest.raises(ValueError, match=r"large'\] have no embodiment and other data sets of the mixture have"):
        open_mixture(None, [MixturePart(path=a), MixturePart(path=b, embodiment="arm")], 16, None)
    with pytest.raises(ValueError, match=r"embodiment of .*large is '../arm', which names a folder"):
        open_mixture(None, [MixturePart(path=a, embodiment="../arm")], 16, None)
    with pytest.raises(ValueError, match="large has no frame to train on"):
        mixed(folders).sampler(np.arange(60, 84))


def test_a_data_set_of_a_mixture_that_was_made_anew_is_noticed(tmp_path):
    (tmp_path / "stage.json").write_text("{}")
    before = input_digests({"data": {"mixture": [{"path": str(tmp_path), "weight": 1.0}]}})
    (tmp_path / "stage.json").write_text('{"made": "anew"}')
    after = input_digests({"data": {"mixture": [{"path": str(tmp_path), "weight": 1.0}]}})
    assert before.keys() == after.keys() == {"data.mixture.0.path"} and before != after
