"""Video files to a frame store: the frames, what is skipped and why, and going on after a kill."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from lapa.data import read_store
from video_data.decode import decode_clip
from video_data.ingest import run

# Which of these a cut clip meets first depends on its container and codec.
CUT = "cut off|damaged|cannot be decoded"


def options(path: Path, output_dir: Path, **changes) -> SimpleNamespace:
    values = {"image_size": 16, "captions": None, "source_column": "lab", "min_frames": 4, "num_workers": 2}
    return SimpleNamespace(path=str(path), output_dir=str(output_dir), **(values | changes))


def write_clip(path: Path, num_frames: int = 12, fps: int = 10, size: tuple[int, int] = (48, 32), **muxer: str) -> None:
    """Frames of noise that brightens with time; noise, because flat pictures leave nothing to cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(num_frames)
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for step in range(num_frames):
            noise = random.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(noise + np.uint8(150 * step // num_frames), format="rgb24")
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


def test_captions_and_sources_come_from_the_table(tmp_path):
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
    assert "repeats" in found["1.mp4"]


def test_broken_clips_are_counted_and_never_fatal(tmp_path):
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
    write_clip(videos / "caption.mp4")
    (videos / "caption.txt").write_bytes(b"\xff\xfe\xfa")

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
        "caption.mp4": "UTF-8",
    }
    assert found.keys() == expected.keys()
    for clip, reason in expected.items():
        assert re.search(reason, found[clip])


def test_the_most_common_frame_rate_is_the_store_s(tmp_path):
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
    decode_clip(tmp_path / "disc.avi", tmp_path / "disc.u8", 16, 1)
    mass = np.fromfile(tmp_path / "disc.u8", np.uint8).reshape(16, 16, 3).mean(axis=2)
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
    decode_clip(path, tmp_path / "phone.u8", 16, 1)
    frame = np.fromfile(tmp_path / "phone.u8", np.uint8).reshape(16, 16, 3)
    assert frame[:, -3:].min() > 200
    assert frame[:, :8].max() < 50


def test_a_killed_run_goes_on_without_losing_or_doubling_a_clip(tmp_path):
    videos = tmp_path / "videos"
    for index in range(30):
        write_clip(videos / f"{index:02}.mp4", num_frames=10 + index, size=(320, 240))
    (videos / "11.mp4").write_bytes(b"")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(options(videos, undisturbed))

    cfg = options(videos, killed, num_workers=1)
    code = f"from types import SimpleNamespace\nfrom video_data.ingest import run\nrun(SimpleNamespace(**{vars(cfg)}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    journal = killed / "clips.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 12):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "store.json").exists(), "the run ended before it was killed: give it more clips"
    # What a kill between two writes leaves behind: frames without a record, and half a record.
    with (killed / "frames.u8").open("ab") as frames, journal.open("a") as records:
        frames.write(b"half a frame")
        records.write('{"num_fra')

    run(cfg)

    for name in ("frames.u8", "index.safetensors", "store.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()
    assert {file.name for file in killed.iterdir()} == {file.name for file in undisturbed.iterdir()}
    # A finished store is not decoded again.
    written = (killed / "frames.u8").stat().st_mtime_ns
    run(cfg)
    assert (killed / "frames.u8").stat().st_mtime_ns == written


def test_a_finished_store_is_not_mixed_with_other_clips(tmp_path):
    write_clip(tmp_path / "videos" / "a.mp4")
    run(options(tmp_path / "videos", tmp_path / "store"))
    write_clip(tmp_path / "videos" / "b.mp4")
    with pytest.raises(ValueError, match="other clips or options"):
        run(options(tmp_path / "videos", tmp_path / "store"))


def test_mistakes_are_named_with_what_was_looked_for(tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "store"
    with pytest.raises(ValueError, match=f"no folder {videos}"):
        run(options(videos, output))
    videos.mkdir()
    with pytest.raises(ValueError, match="no video files in"):
        run(options(videos, output))
    (videos / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"none of the 1 clips can be used; the first, a.mp4: the file is empty"):
        run(options(videos, output))
    with pytest.raises(ValueError, match=r"no file .*captions\.csv"):
        run(options(videos, output, captions=str(tmp_path / "captions.csv")))
    (videos / "clips.csv").write_text("path,text\na.mp4,hello\n")
    with pytest.raises(ValueError, match=r"clips.csv has no column 'caption': its columns are \['path', 'text'\]"):
        run(options(videos, output))
    (videos / "clips.csv").write_text("path,caption\na.mp4,hello\n")
    with pytest.raises(ValueError, match=r"no column 'lab'.*source_column"):
        run(options(videos, output))
    (videos / "clips.csv").write_text("path,caption,lab\nvideos/a.mp4,hello,north\n")
    with pytest.raises(ValueError, match=rf"looked for is {videos}/videos/a\.mp4"):
        run(options(videos, output))
    with pytest.raises(ValueError, match="num_workers is 0"):
        run(options(videos, output, num_workers=0))


def test_real_clips_are_stored_whole(shared_data, tmp_path):
    results = run(options(shared_data / "video" / "bridge", tmp_path / "store", image_size=64, source_column=""))
    assert (results["num_clips"], results["num_skipped"], results["num_frames"]) == (30, 0, 1079)
