"""Frames scaled in batches come out as each would alone."""

from fractions import Fraction

import av
import numpy as np
import pytest

from video_data.pictures import BATCH, SquareScaler


def picture(seed: int, width: int, height: int, format: str) -> av.VideoFrame:
    """Smooth noise: a coarse grid of colours, enlarged."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(grid, format="rgb24").reformat(width, height, format, interpolation="BICUBIC")
    frame.time_base = Fraction(1, 10)
    return frame


@pytest.mark.parametrize("size", [(320, 180), (97, 131), (254, 254), (90, 70), (640, 480), (63, 80)])
@pytest.mark.parametrize("image_size", [64, 48])
def test_a_frame_does_not_depend_on_its_batch(size, image_size):
    frames = [picture(seed, *size, "yuv420p") for seed in range(BATCH)]
    together, alone = SquareScaler(image_size), SquareScaler(image_size)
    for frame in frames:
        together.add(frame)
    for pixels, frame in zip(together.take(), frames, strict=True):
        alone.add(frame)
        (expected,) = alone.take()
        # Where a side divided by image_size is no binary fraction, weights are rounded by place.
        assert np.abs(pixels.astype(int) - expected).max() <= (0 if image_size == 64 else 1)


def test_frames_of_any_form_keep_their_order():
    forms = [(320, 180, "yuv420p"), (320, 180, "yuv444p"), (180, 320, "yuv420p"), (48, 40, "yuv420p")] * 3
    frames = [picture(seed, *form) for seed, form in enumerate(forms)]
    scaler, alone = SquareScaler(64), SquareScaler(64)
    for frame in frames:
        scaler.add(frame)
    assert len(scaler) == 12
    for pixels, frame in zip(scaler.take(), frames, strict=True):
        alone.add(frame)
        assert np.array_equal(pixels, alone.take()[0])
    assert not len(scaler)
