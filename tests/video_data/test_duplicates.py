"""Near duplicates: copies in other encodings are found, other clips of the same scene are not."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from video_data import duplicates
from video_data.clips import ClipRequest
from video_data.decode import ClipRecord, PassOptions, decode
from video_data.ingest import run

SIDE = 160


def scene(seed: int, arm_seed: int, num_frames: int = 30) -> np.ndarray:
    """(T, H, W, 3): a fixed background before which a dark arm wanders."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    background = cv2.resize(noise, (SIDE * 4 // 3, SIDE), interpolation=cv2.INTER_CUBIC)
    steps = np.array([SIDE * 2 / 3, SIDE / 2]) + np.random.default_rng(arm_seed).normal(0, 6, (num_frames, 2)).cumsum(0)
    frames = np.repeat(background[None], num_frames, axis=0)
    for frame, (x, y) in zip(frames, steps, strict=True):
        cv2.circle(frame, (round(x), round(y)), 18, (20, 20, 30), -1)
    return frames


def write(path: Path, frames: np.ndarray, crf: int = 18, scale: float = 1.0, brighter: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = (round(side * scale / 2) * 2 for side in frames.shape[1:3])
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf)}
        for pixels in frames:
            pixels = np.clip(pixels.astype(int) + brighter, 0, 255).astype(np.uint8)
            pixels = cv2.resize(pixels, (stream.width, stream.height), interpolation=cv2.INTER_AREA)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def pictures(path: Path) -> np.ndarray:
    clip = ClipRecord(ClipRequest("a", "a"), path.with_suffix(".u8"))
    decode(path, None, [clip], PassOptions(64, "off", 2.0))
    frames = np.fromfile(clip.part, np.uint8).reshape(-1, 64, 64, 3)
    return frames[duplicates.frame_positions(len(frames))]


def found(index: duplicates.HashIndex, frames: np.ndarray, known: list[np.ndarray]) -> list[int]:
    candidates = index.near(duplicates.perceptual_hash(frames))
    return [number for number, _ in candidates if duplicates.same_pictures(known[number], frames)]


@pytest.mark.parametrize("change", [{"crf": 36}, {"scale": 0.5}, {"brighter": 20}, {}])
def test_a_copy_is_found_among_clips_of_the_same_scene(tmp_path, change):
    known = [pictures(write(tmp_path / f"{i}.mp4", scene(seed=0, arm_seed=i))) for i in range(4)]
    index = duplicates.HashIndex()
    for frames in known:
        index.add(duplicates.perceptual_hash(frames))
    copy = pictures(write(tmp_path / "copy.mp4", scene(seed=0, arm_seed=2), **change))
    assert found(index, copy, known) == [2]
    other = pictures(write(tmp_path / "other.mp4", scene(seed=0, arm_seed=9)))
    assert found(index, other, known) == []


def test_hashes_are_candidates_up_to_the_stated_distance():
    index = duplicates.HashIndex()
    clip_hash = np.zeros(64, np.uint8)
    index.add(clip_hash.tobytes())
    for num_bits, expected in ((0, [(0, 0.0)]), (52, [(0, 6.5)]), (53, [])):
        bits = np.zeros(512, np.uint8)
        bits[:num_bits] = 1
        assert index.near(np.packbits(bits).tobytes()) == expected


def test_only_the_nearest_candidates_are_compared():
    index = duplicates.HashIndex()
    for num_bits in range(40, -1, -1):
        for _ in range(2):
            bits = np.zeros(512, np.uint8)
            bits[:num_bits] = 1
            index.add(np.packbits(bits).tobytes())
    near = index.near(bytes(64))
    assert len(near) == duplicates.MAX_CANDIDATES == 64
    assert near[0] == (80, 0.0) and near[-1][1] == 31 / 8


def test_all_duplicates_of_bridge_are_found_and_no_other_pair(shared_data, tmp_path):
    """The copies there bear the name of the original with a further underscore."""
    import json

    from lapa.schema import IngestConfig

    cfg = {"path": str(shared_data / "video" / "bridge"), "source_column": ""}
    run(IngestConfig(output_dir=str(tmp_path / "marked"), **cfg))
    rows = [json.loads(line) for line in (tmp_path / "marked" / "manifest.jsonl").read_text().splitlines()]
    pairs = {(row["duplicate_of"], row["id"]) for row in rows if row["duplicate_of"]}
    names = {row["id"] for row in rows}
    assert pairs == {(name, name.replace(".mp4", "_.mp4")) for name in names if name.replace(".mp4", "_.mp4") in names}
    assert len(pairs) == 10
    results = run(IngestConfig(output_dir=str(tmp_path / "rejected"), duplicates="reject", **cfg))
    assert (results["num_clips"], results["num_skipped"]) == (20, 10)
