"""Video files to a frame store: the frames, what is skipped and why, and going on after a kill."""

import io
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from lapa.data import read_store
from lapa.schema import Captioner, ClipFilters, IngestConfig
from tests.video_data.encode import images
from video_data.clips import ClipRequest
from video_data.decode import ClipRecord, PassOptions, decode
from video_data.ingest import run
from video_data.pictures import SquareScaler
from video_data.store import StoreWriter

# Which of these a cut clip meets first depends on its container and codec.
CUT = "cut off|damaged|cannot be decoded"


def options(path: Path, output_dir: Path, min_frames: int = 4, **changes) -> IngestConfig:
    filters = ClipFilters(min_frames=min_frames, **changes.pop("filters", {}))
    return IngestConfig(path=str(path), output_dir=str(output_dir), filters=filters, **({"image_size": 16} | changes))


def write_clip(path: Path, num_frames: int = 12, fps: int = 10, size: tuple[int, int] = (48, 32), **muxer: str) -> None:
    """Frames of noise that brightens with time; noise, because flat pictures leave nothing to cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(num_frames)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for step in range(num_frames):
            pixels = noise.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels + np.uint8(150 * step // num_frames), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def manifest(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def decoded(path: Path, part: Path) -> np.ndarray:
    """(T, 16, 16, 3): what one pass makes of a whole file."""
    clip = ClipRecord(ClipRequest(path.name, path.name), part)
    decode(path, None, [clip], PassOptions(16, "codec", 2.0))
    assert clip.reason is None
    return np.fromfile(part, np.uint8).reshape(-1, 16, 16, 3)


@pytest.fixture
def in_process(monkeypatch):
    """Calls the operator here: starting processes takes longer than these tests."""
    for module in ("ingest", "export"):
        monkeypatch.setattr(
            f"video_data.{module}.run_in_order", lambda _, function, calls, __: (function(*call) for call in calls)
        )


def reasons(output: Path) -> dict[str, str]:
    store = json.loads((output / "store.json").read_text())
    return {entry["clip"]: entry["reason"] for entry in store["skipped"]}


def test_every_frame_of_every_clip_is_stored_in_order_of_path(tmp_path):
    videos = tmp_path / "videos"
    write_clip(videos / "b" / "two.avi", num_frames=9)
    write_clip(videos / "a.MP4", num_frames=12)
    (videos / "b" / "two.txt").write_text("pour the\n tea\n")

    results = run(options(videos, tmp_path / "store"))
    store = read_store(tmp_path / "store")

    assert results == {
        "num_clips": 2,
        "num_skipped": 0,
        "num_duplicates": 0,
        "num_frames": 21,
        "num_without_caption": 1,
        "fps": 10.0,
        "num_clips_of_other_fps": 0,
    }
    assert store.episode_offsets.tolist() == [0, 12, 21]
    assert store.instructions == ["", "pour the tea"]
    assert store.sources == ["videos", "b"]
    assert json.loads((tmp_path / "store" / "store.json").read_text())["clips"] == ["a.MP4", "b/two.avi"]
    brightness = store.frames.mean(axis=(1, 2, 3))
    assert (np.diff(brightness[:12]) > 0).all()
    assert (np.diff(brightness[12:]) > 0).all()


def test_captions_and_sources_come_from_the_table(tmp_path, in_process):
    videos = tmp_path / "videos"
    write_clip(videos / "1.mp4")
    write_clip(videos / "2.mp4")
    (videos / "clips.csv").write_text(
        "path,caption,lab\n1.mp4,open the door,north\n./2.mp4,close it,south\n1.mp4,again,west\nlost.mp4,gone,north\n"
    )
    run(options(videos, tmp_path / "store"))
    store = read_store(tmp_path / "store")
    assert store.instructions == ["open the door", "close it"]
    assert store.sources == ["north", "south"]
    found = reasons(tmp_path / "store")
    assert "no such file" in found["lost.mp4"]
    assert "repeats" in found["1.mp4 (clips.csv:4)"]


def test_broken_clips_are_counted_and_never_fatal(tmp_path, in_process):
    videos = tmp_path / "videos"
    write_clip(videos / "good.mp4")
    write_clip(videos / "no_index.mp4")
    cut(videos / "no_index.mp4", 0.9)
    write_clip(videos / "half.mp4", movflags="faststart")
    cut(videos / "half.mp4", 0.7)
    write_clip(videos / "half.mkv")
    cut(videos / "half.mkv", 0.5)
    write_clip(videos / "half.avi")
    cut(videos / "half.avi", 0.5)
    write_clip(videos / "one_frame.mp4", num_frames=1)
    write_clip(videos / "short.mp4", num_frames=3)
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("not a video\n" * 100)
    write_sound(videos / "sound.mp4")

    results = run(options(videos, tmp_path / "store"))

    assert results["num_clips"] == 1
    found = reasons(tmp_path / "store")
    expected = {
        "no_index.mp4": "cannot be decoded",
        "half.mp4": CUT,
        "half.mkv": CUT,
        "half.avi": CUT,
        "one_frame.mp4": "too short: 1 frames",
        "short.mp4": "too short: 3 frames, min_frames is 4",
        "empty.mp4": "empty",
        "text.mp4": "cannot be decoded",
        "sound.mp4": "no video",
    }
    assert found.keys() == expected.keys()
    for clip, reason in expected.items():
        assert re.search(reason, found[clip])


def test_the_most_common_frame_rate_is_the_store_s(tmp_path, in_process):
    for name, fps in (("a", 5), ("b", 15), ("c", 15)):
        write_clip(tmp_path / "videos" / f"{name}.mp4", fps=fps)
    results = run(options(tmp_path / "videos", tmp_path / "store"))
    assert results["fps"] == 15.0
    assert results["num_clips_of_other_fps"] == 1
    assert json.loads((tmp_path / "store" / "store.json").read_text())["clip_fps"] == [5.0, 15.0, 15.0]


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (8, 6)])
def test_frames_are_the_centre_square(tmp_path, size):
    """A white disc in the middle of a black picture stays in the middle, to half a pixel, and round."""
    width, height = size
    rows, columns = np.ogrid[:height, :width]
    radius = min(size) / 4
    disc = (rows - (height - 1) / 2) ** 2 + (columns - (width - 1) / 2) ** 2 < radius**2
    picture = np.repeat(disc[..., None].astype(np.uint8) * 255, 3, axis=2)
    with av.open(str(tmp_path / "disc.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    mass = decoded(tmp_path / "disc.avi", tmp_path / "disc.u8")[0].mean(axis=2)
    rows, columns = np.mgrid[:16, :16]
    assert (rows * mass).sum() / mass.sum() == pytest.approx(7.5, abs=0.55)
    assert (columns * mass).sum() / mass.sum() == pytest.approx(7.5, abs=0.55)
    assert mass.sum(axis=0) == pytest.approx(mass.sum(axis=1), abs=0.05 * mass.sum())


def test_a_rotated_phone_clip_is_stored_upright(tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:8] = 255  # a bright upper edge, which the rotation takes to the right
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    # The track header's matrix, 40 bytes into version 0 of it: a quarter turn clockwise (ISO/IEC 14496-12).
    header = bytearray(path.read_bytes())
    matrix = header.index(b"tkhd") + 4 + 40
    header[matrix : matrix + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    )
    path.write_bytes(header)
    frame = decoded(path, tmp_path / "phone.u8")[0]
    assert frame[:, -3:].min() > 200
    assert frame[:, :8].max() < 50


def start_and_kill(cfg: IngestConfig, after_lines: int, pause_s: float) -> bool:
    """Run the stage in a process of its own and kill it; whether it was still at work."""
    code = f"from lapa.schema import *\nfrom video_data.ingest import run\nrun({cfg!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    journal, store = Path(cfg.output_dir) / "clips.jsonl", Path(cfg.output_dir) / "store.json"
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > after_lines):
        time.sleep(0.002)
    time.sleep(pause_s)
    at_work = not store.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return at_work


def test_a_killed_run_goes_on_without_losing_or_doubling_a_clip(tmp_path):
    videos = tmp_path / "videos"
    for index in range(30):
        write_clip(videos / f"{index:02}.mp4", num_frames=10 + index, size=(320, 240))
    write_clip(videos / "20.mp4", num_frames=15, size=(320, 240))  # shows 05.mp4 again
    (videos / "11.mp4").write_bytes(b"")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    changes = {"duplicates": "reject", "export": "lerobot"}
    run(options(videos, undisturbed, **changes))

    cfg = options(videos, killed, num_workers=1, **changes)
    moments = random.Random(0)
    for after_lines in (3, 12, 24):
        assert start_and_kill(cfg, after_lines, moments.uniform(0, 0.03)), "the run ended: give it more clips"
        # What a kill between two writes leaves behind: frames without a record, and half a record.
        with (killed / "frames.u8").open("ab") as frames, (killed / "clips.jsonl").open("a") as records:
            frames.write(b"half a frame")
            records.write('[{"num_fra')

    run(cfg)

    for name in ("frames.u8", "index.safetensors", "store.json", "manifest.jsonl", "manifest.parquet", "report.html"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    files = sorted(file.relative_to(undisturbed) for file in undisturbed.rglob("*"))
    assert files == sorted(file.relative_to(killed) for file in killed.rglob("*"))
    assert len({row["id"] for row in manifest(killed)}) == len(manifest(killed)) == 30
    # A finished store is not decoded again.
    written = (killed / "frames.u8").stat().st_mtime_ns
    run(cfg)
    assert (killed / "frames.u8").stat().st_mtime_ns == written


def test_every_clip_that_was_asked_for_is_in_the_manifest(tmp_path, in_process):
    videos, output = tmp_path / "videos", tmp_path / "store"
    write_clip(videos / "1.mp4", num_frames=12)
    write_clip(videos / "2.mp4", num_frames=2)
    (videos / "clips.csv").write_text("path,caption,lab\n1.mp4,open the door,north\nlost.mp4,gone,north\n")
    run(options(videos, output, licence="CC-BY-4.0"))
    rows = {row["id"]: row for row in manifest(output)}
    assert [rows[name]["filter"] for name in ("1.mp4", "2.mp4", "lost.mp4")] == [None, "length", "listing"]
    kept = rows["1.mp4"]
    assert (kept["status"], kept["caption"], kept["caption_origin"]) == ("kept", "open the door", "csv")
    assert (kept["licence"], kept["source"], kept["codec"]) == ("CC-BY-4.0", "north", "mpeg4")
    assert (kept["width"], kept["height"], kept["num_frames"], kept["fps"]) == (48, 32, 12, 10.0)
    assert kept["duration_s"] == pytest.approx(1.2)
    assert len(kept["sha256"]) == 64 and len(kept["hash"]) == 128
    assert pq.read_table(output / "manifest.parquet").to_pylist() == manifest(output)


def test_spans_of_one_video_hold_the_frames_that_decoding_it_alone_gives(tmp_path, in_process):
    """Overlapping spans, one of them to the end, and one that the video does not reach."""
    write_clip(tmp_path / "videos" / "long.mp4", num_frames=60)
    (tmp_path / "clips.csv").write_text(
        "id,path,caption,start,end\na,videos/long.mp4,one,0.5,2.5\nb,videos/long.mp4,two,2.0,4.0\n"
        "c,videos/long.mp4,three,4.8,6.0\nd,videos/long.mp4,four,5.9,9.0\n"
    )
    cfg = options(tmp_path / "clips.csv", tmp_path / "store", layout="table")
    run(cfg)
    whole = decoded(tmp_path / "videos" / "long.mp4", tmp_path / "long.u8")
    store = read_store(tmp_path / "store")
    expected = [np.arange(5, 25), np.arange(20, 40), np.arange(48, 60)]
    assert store.episode_offsets.tolist() == [0, 20, 40, 52]
    assert np.array_equal(store.frames, whole[np.concatenate(expected)])
    assert store.instructions == ["one", "two", "three"]
    assert "the media ends" in {row["id"]: row["reason"] for row in manifest(tmp_path / "store")}["d"]


def test_one_pass_decodes_each_frame_once(tmp_path, monkeypatch):
    write_clip(tmp_path / "long.mp4", num_frames=40)
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]
    clips = [ClipRecord(ClipRequest(f"{s}", "long.mp4", *s), tmp_path / f"{s[0]}.u8") for s in spans]
    scaled = []
    add = SquareScaler.add
    monkeypatch.setattr(SquareScaler, "add", lambda self, frame: scaled.append(frame.pts) or add(self, frame))
    decode(tmp_path / "long.mp4", None, clips, PassOptions(16, "codec", 2.0))
    assert len(scaled) == len(set(scaled)) == 40
    assert [len(clip.times_s) for clip in clips] == [20, 20, 20]


def test_damage_behind_a_span_does_not_cost_it(tmp_path):
    spans = [(0.0, 0.4), (0.3, 0.8), (0.9, None)]
    clips = [ClipRecord(ClipRequest(f"{s}", "images", *s), tmp_path / f"{s[0]}.u8") for s in spans]
    media = [io.BytesIO(data) for data in (*images(12), b"no picture")]
    decode(media, 10.0, clips, PassOptions(16, "off", 2.0))
    assert [clip.reason for clip in clips[:2]] == [None, None]
    assert [len(clip.times_s) for clip in clips] == [4, 5, 3]
    assert "cannot be decoded" in (clips[2].reason or "")


def test_a_disk_that_cannot_be_read_costs_a_clip_and_one_that_is_full_the_run(tmp_path):
    class Unreadable(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    def passed(part: Path, media: list) -> str | None:
        clip = ClipRecord(ClipRequest("a", "images"), part)
        decode(media, 10.0, [clip], PassOptions(768, "off", 2.0))
        return clip.reason

    assert "Input/output error" in (passed(tmp_path / "a.u8", [Unreadable(b"x")]) or "")
    with pytest.raises(OSError, match="No space left"):
        passed(Path("/dev/full"), [io.BytesIO(data) for data in images(3)])


def test_names_that_ffmpeg_or_the_system_would_misread(tmp_path, in_process, monkeypatch):
    write_clip(tmp_path / "videos" / "cooking:pasta.mp4")
    monkeypatch.chdir(tmp_path / "videos")
    assert run(options(Path(), Path("../store")))["num_clips"] == 1
    assert [row["id"] for row in manifest(tmp_path / "store")] == ["cooking:pasta.mp4"]

    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "clips.tar", "w") as archive:
        archive.add(tmp_path / "videos" / "cooking:pasta.mp4", "m" * 245 + ".mp4")
    assert run(options(tmp_path / "tars", tmp_path / "from_tar"))["num_clips"] == 1


def test_a_half_finished_store_is_not_gone_on_with_by_another_run(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()

    def part(num_frames: int) -> list[dict]:
        (parts / "0-0.u8").write_bytes(bytes(2 * 16 * 16 * 3))
        return [{"id": "a", "status": "kept", "num_frames": num_frames, "part": "0-0.u8", "first_frame": 0}]

    with (
        StoreWriter(tmp_path, "one", 16, "off") as store,
        pytest.raises(OSError, match="ends 768 bytes before its clip a does"),
    ):
        store.add(part(num_frames=3), parts)
    with StoreWriter(tmp_path, "one", 16, "off") as store:
        store.add(part(num_frames=2), parts)
    with pytest.raises(ValueError, match="holds a half-finished run with other clips or options"):
        StoreWriter(tmp_path, "other", 16, "off")
    (tmp_path / "captions.jsonl").write_text("of other clips")
    (tmp_path / "clips.jsonl").unlink()
    with StoreWriter(tmp_path, "other", 16, "off") as store:
        assert store.num_episodes == 0
    assert not (tmp_path / "captions.jsonl").exists()


def test_a_captioner_that_cannot_write_is_found_out_before_anything_is_decoded(tmp_path, in_process):
    write_clip(tmp_path / "videos" / "a.mp4")
    for wrong, message in ((Captioner(name="vlm"), "needs captioner.model"), (Captioner(name="human"), "'human'")):
        with pytest.raises(ValueError, match=message):
            run(options(tmp_path / "videos", tmp_path / "store", captioner=wrong))
    assert not (tmp_path / "store").exists()


def test_shards_divide_the_clips_among_them(tmp_path, in_process):
    for index in range(12):
        write_clip(tmp_path / "videos" / f"{index}.mp4", num_frames=8 + index)
    run(options(tmp_path / "videos", tmp_path / "all"))
    together = []
    for shard in range(3):
        run(options(tmp_path / "videos", tmp_path / str(shard), num_shards=3, shard=shard))
        together += [row["id"] for row in manifest(tmp_path / str(shard))]
    assert sorted(together) == sorted(row["id"] for row in manifest(tmp_path / "all"))
    assert len(set(together)) == 12


def test_a_finished_store_is_not_mixed_with_other_clips(tmp_path, in_process):
    write_clip(tmp_path / "videos" / "a.mp4")
    run(options(tmp_path / "videos", tmp_path / "store"))
    write_clip(tmp_path / "videos" / "b.mp4")
    with pytest.raises(ValueError, match="other clips or options"):
        run(options(tmp_path / "videos", tmp_path / "store"))


def test_mistakes_are_named_with_what_was_looked_for(tmp_path, in_process):
    videos, output = tmp_path / "videos", tmp_path / "store"
    with pytest.raises(ValueError, match=f"no folder {videos}"):
        run(options(videos, output))
    videos.mkdir()
    with pytest.raises(ValueError, match="no video files in"):
        run(options(videos, output))
    (videos / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"none of the 1 clips can be used; the first, a.mp4: the file is empty"):
        run(options(videos, output))
    for wrong, message in (
        ({"num_workers": 0}, "num_workers is 0"),
        ({"num_shards": 2, "shard": 2}, "shard is 2, expected 0 to 1"),
        ({"runner": "slurm"}, "runner is 'slurm', expected one of"),
        ({"duplicates": "yes"}, "duplicates is 'yes'"),
        ({"filters": {"shots": "cut"}}, "filters.shots is 'cut'"),
        ({"filters": {"shot_detector": "eye"}}, "filters.shot_detector is 'eye'"),
        ({"keep_actions": True, "filters": {"shots": "split"}}, "keep_actions needs whole episodes"),
        ({"motion": "off", "filters": {"max_motion": 1.0}}, r"filters.max_motion is 1.0 and motion is off"),
        ({"layout": "webvid", "captions": "a.csv"}, "captions is a.csv, which layout webvid does not read"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options(videos, output, **wrong))


def test_real_clips_are_stored_whole(shared_data, tmp_path):
    results = run(options(shared_data / "video" / "bridge", tmp_path / "store", image_size=64, source_column=""))
    assert (results["num_clips"], results["num_skipped"], results["num_frames"]) == (30, 0, 1079)
    assert results["num_duplicates"] == 10
