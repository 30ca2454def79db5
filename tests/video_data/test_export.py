"""Kept clips as a LeRobotDataset: it loads, and every frame is the right one, copied or encoded."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from lapa.data import open_frames
from lapa.schema import ClipFilters, IngestConfig
from tests.video_data.encode import write_clip as write_noise
from video_data.ingest import run

SIZE = (64, 48)


def write_clip(path: Path, start: int, num_frames: int = 12, fps: int = 10, size=SIZE, **encoder: str) -> None:
    """Grey frames, each 6 levels brighter than the one before, from `start` on; half of the picture is darker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "10", "bf": "2"} | encoder
        for step in range(num_frames):
            pixels = np.full((size[1], size[0], 3), start + 6 * step, np.uint8)
            pixels[:, : size[0] // 2] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def ingest(videos: Path, output: Path, **options) -> Path:
    cfg = {"image_size": 32, "export": "lerobot", "filters": ClipFilters(min_frames=4)} | options
    run(IngestConfig(path=str(videos), output_dir=str(output), **cfg))
    return output / "lerobot"


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    for module in ("ingest", "export"):
        monkeypatch.setattr(
            f"video_data.{module}.run_in_order", lambda _, function, calls, __: (function(*call) for call in calls)
        )


def brightness(root: Path) -> list[list[int]]:
    """Of every frame that LeRobotDataset reads, an episode at a time: the mean of the picture's right half."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(root.name, root=root, video_backend="pyav")
    episodes: list[list[int]] = [[] for _ in range(dataset.meta.total_episodes)]
    for row in range(len(dataset)):
        item = dataset[row]
        picture = item["observation.images.top"]
        episodes[int(item["episode_index"])].append(
            round(float(picture[..., picture.shape[2] // 2 + 4 :].mean()) * 255)
        )
    return episodes


def close(found: list[int], expected: list[int]) -> bool:
    return len(found) == len(expected) and np.abs(np.subtract(found, expected)).max() <= 2


def levels(start: int, num_frames: int = 12) -> list[int]:
    return [start + 6 * step for step in range(num_frames)]


def test_whole_clips_are_copied_packet_by_packet(tmp_path):
    """With B-frames, whose packets are not in the order of their pictures."""
    for index, start in enumerate((20, 60, 100)):
        write_clip(tmp_path / "videos" / f"{index}.mp4", start)
        (tmp_path / "videos" / f"{index}.txt").write_text(f"task {index % 2}")
    root = ingest(tmp_path / "videos", tmp_path / "store")
    for found, start in zip(brightness(root), (20, 60, 100), strict=True):
        assert close(found, levels(start))
    (video,) = root.rglob("*.mp4")
    packets = [packet for file in sorted((tmp_path / "videos").glob("*.mp4")) for packet in packets_of(file)]
    assert packets_of(video) == packets
    info = json.loads((root / "meta" / "info.json").read_text())
    assert (info["fps"], info["total_episodes"], info["total_frames"], info["total_tasks"]) == (10, 3, 36, 2)


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_odd_clips_are_encoded_to_the_size_and_rate_of_most(tmp_path):
    videos = tmp_path / "videos"
    for name, start in (("a", 20), ("b", 60)):
        write_clip(videos / f"{name}.mp4", start)
    write_clip(videos / "large.mp4", 100, size=(128, 96))
    write_clip(videos / "slow.mp4", 140, num_frames=6, fps=5)
    write_clip(videos / "other_parameters.mp4", 20, level="5.1")
    (tmp_path / "clips.csv").write_text(
        "path,caption,start,end\n"
        + "".join(f"videos/{name}.mp4,,,\n" for name in ("a", "b", "large", "slow", "other_parameters"))
        + "videos/b.mp4,,0.3,0.8\n"
    )
    root = ingest(tmp_path / "clips.csv", tmp_path / "store", layout="table")
    rows = [json.loads(line) for line in (tmp_path / "store" / "manifest.jsonl").read_text().splitlines()]
    expected = {
        ("a.mp4", None): levels(20),
        ("b.mp4", None): levels(60),
        ("b.mp4", 0.3): levels(60)[3:8],
        ("large.mp4", None): levels(100),
        ("slow.mp4", None): np.repeat(levels(140, 6), 2).tolist(),
        ("other_parameters.mp4", None): levels(20),
    }
    for row, found in zip(rows, brightness(root), strict=True):
        assert close(found, expected[Path(row["video"]).name, row["start_s"]]), (row["id"], found)


def test_a_keyframe_interval_encodes_every_clip(tmp_path):
    write_clip(tmp_path / "videos" / "a.mp4", 20)
    write_clip(tmp_path / "videos" / "b.mp4", 60)
    root = ingest(tmp_path / "videos", tmp_path / "store", export_keyframe_interval=4)
    (video,) = root.rglob("*.mp4")
    with av.open(str(video)) as container:
        keyframes = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keyframes[0] and keyframes[12] and all(any(keyframes[i : i + 4]) for i in range(21))
    assert all(close(found, levels(start)) for found, start in zip(brightness(root), (20, 60), strict=True))


def test_the_data_set_decodes_to_the_frames_and_captions_of_the_store(tmp_path):
    for index, start in enumerate((20, 60)):
        write_clip(tmp_path / "videos" / f"{index}.mp4", start, size=(64, 64))
        (tmp_path / "videos" / f"{index}.txt").write_text(f"task {index}")
    root = ingest(tmp_path / "videos", tmp_path / "store")
    store = open_frames(tmp_path / "store", 32)
    again = open_frames(root, 32, cache_dir=str(tmp_path / "cache"))
    assert again.episode_offsets.tolist() == store.episode_offsets.tolist()
    assert again.instructions == store.instructions == ["task 0", "task 1"]
    assert np.abs(again.frames.astype(int) - store.frames).mean() < 2


def test_clips_of_a_codec_that_mp4_cannot_hold_are_encoded(tmp_path):
    for index, seed in enumerate((0, 1)):
        write_noise(tmp_path / "videos" / f"{index}.webm", codec="libvpx", seed=seed)
    root = ingest(tmp_path / "videos", tmp_path / "store")
    (video,) = root.rglob("*.mp4")
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 24


def test_an_export_is_not_taken_for_one_with_other_options(tmp_path):
    write_clip(tmp_path / "videos" / "a.mp4", 20)
    ingest(tmp_path / "videos", tmp_path / "store", export_keyframe_interval=4)
    ingest(tmp_path / "videos", tmp_path / "store", export_keyframe_interval=4)
    with pytest.raises(ValueError, match=r"'export_keyframe_interval': 4.*expected .*: 2.*delete it"):
        ingest(tmp_path / "videos", tmp_path / "store", export_keyframe_interval=2)


def start_and_kill(cfg: IngestConfig, clips_a_shard: int, after_shards: int, pause_s: float) -> bool:
    """Export in a process of its own and kill it; whether it was still at work."""
    code = (
        "from lapa.schema import *\nfrom video_data import export, ingest\n"
        f"export.CLIPS_A_SHARD = {clips_a_shard}\ningest.run({cfg!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    shards, written = Path(cfg.output_dir) / ".lerobot-shards", Path(cfg.output_dir) / "lerobot"
    while process.poll() is None and sum(1 for _ in shards.glob("*/clips.json")) < after_shards:
        time.sleep(0.002)
    time.sleep(pause_s)
    at_work = not written.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return at_work


def test_an_export_that_is_killed_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("video_data.export.CLIPS_A_SHARD", 3)
    for index in range(24):
        # Every third is encoded anew, the others are copied.
        write_clip(tmp_path / "videos" / f"{index:02}.mp4", 20 + index, size=(320, 240) if index % 3 else (400, 240))
        (tmp_path / "videos" / f"{index:02}.txt").write_text(f"task {index % 5}")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ingest(tmp_path / "videos", undisturbed)
    ingest(tmp_path / "videos", killed, export="none")

    cfg = IngestConfig(
        path=str(tmp_path / "videos"),
        output_dir=str(killed),
        image_size=32,
        export="lerobot",
        filters=ClipFilters(min_frames=4),
        num_workers=1,
    )
    moments = random.Random(0)
    for after_shards in (1, 5):
        assert start_and_kill(cfg, 3, after_shards, moments.uniform(0, 0.02)), "the export ended: give it more clips"
        assert (killed / ".lerobot-shards" / "0" / "clips.json").is_file()
    # What a kill while the tables are written leaves behind.
    (killed / ".lerobot.partial" / "data").mkdir(parents=True)
    (killed / ".lerobot.partial" / "episodes.jsonl").write_text('{"episode_ind')

    ingest(tmp_path / "videos", killed)

    files = sorted(file.relative_to(undisturbed) for file in undisturbed.rglob("*"))
    assert files == sorted(file.relative_to(killed) for file in killed.rglob("*"))
    for file in files:
        if (undisturbed / file).is_file():
            assert (killed / file).read_bytes() == (undisturbed / file).read_bytes(), file
