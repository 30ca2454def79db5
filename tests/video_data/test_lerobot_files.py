"""Statistics of a data set that is never whole in memory are those of all its rows."""

import numpy as np
import pytest

from video_data.lerobot_files import (
    column_statistics,
    overall_statistics,
    pixel_histograms,
    pixel_statistics,
    statistics,
    weighted_statistics,
)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        assert np.allclose(found[name], values, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("counts", [[1], [3, 0, 1, 7], [1, 1, 1, 1, 1], [0, 1000, 1]])
def test_counted_values_have_the_statistics_of_repeated_ones(counts):
    values = np.arange(len(counts)) * 1.5 - 2
    assert_same(weighted_statistics(values, np.array(counts)), statistics(np.repeat(values, counts)[:, None]))


def test_all_episodes_together():
    generator = np.random.default_rng(0)
    lengths, tasks, fps = generator.integers(1, 60, 20), np.arange(20) % 3, 30
    step = np.concatenate([np.arange(length) for length in lengths])
    expected = {
        "timestamp": (step / fps).astype(np.float32),
        "frame_index": step,
        "episode_index": np.repeat(np.arange(20), lengths),
        "index": np.arange(lengths.sum()),
        "task_index": np.repeat(tasks, lengths),
    }
    found = overall_statistics(lengths, tasks, fps)
    for name, of_column in column_statistics(expected).items():
        assert_same(found[name], of_column)


def test_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    found = pixel_statistics(pixel_histograms(pixels))
    expected = statistics(pixels / 255)
    assert_same(found, {name: v if name == "count" else v.reshape(3, 1, 1) for name, v in expected.items()})
