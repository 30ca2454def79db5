"""Broken and odd files, made from a few good encodes: what a crawl of the internet brings home.

`write_corpus` answers what must become of each: KEPT, EITHER (a decoder may save it or not), or a part of the reason
for which it is rejected.
"""

import os
import shutil
import struct
from pathlib import Path

import av
import numpy as np

from tests.video_data.encode import FPS, images, write_clip

KEPT, EITHER, REJECTED = "kept", "either", ""
GOOD = {
    "good.mp4": {"codec": "mpeg4"},
    "fast.mp4": {"codec": "mpeg4", "muxer": {"movflags": "faststart"}},
    "h264.mp4": {"codec": "libx264"},
    "good.mkv": {"codec": "mpeg4"},
    "good.webm": {"codec": "libvpx"},
    "good.avi": {"codec": "mpeg4"},
    "good.mov": {"codec": "mjpeg"},
}
CUTS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
HEADS = (4, 48, 600)


def write_corpus(root: Path) -> dict[str, str]:
    """Write the files below `root`; {clip id: what must become of it}, for every path that ends like a video."""
    expected: dict[str, str] = {}
    for name, options in GOOD.items():
        write_clip(root / name, **options)
        expected[name] = KEPT
    good = {name: (root / name).read_bytes() for name in GOOD}
    for write in (_cuts, _damage, _no_video, _headers, _times, _odd_but_whole, _captions, _names, _links, _rows):
        expected |= write(root, good)
    return expected


def _save(root: Path, name: str, data: bytes) -> str:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    return name


def _cuts(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Files cut off at the tail, and files without their head."""
    expected = {}
    for name, data in good.items():
        for share in CUTS:
            path = _save(root, f"cut/{share:.2f}-{name}", data[: int(len(data) * share)])
            expected[path] = REJECTED if share <= 0.5 else EITHER
        expected[_save(root, f"cut/last-byte-{name}", data[:-1])] = EITHER
        for size in HEADS:
            expected[_save(root, f"headless/{size}-{name}", data[size:])] = EITHER
    return expected


def _damage(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Bytes of the middle overwritten, garbage before and behind, two files in one."""
    expected = {}
    for seed, (name, data) in enumerate(good.items()):
        noise = np.random.default_rng(seed).bytes(200)
        middle = len(data) // 2
        expected[_save(root, f"damage/zeros-{name}", data[:middle] + bytes(200) + data[middle + 200 :])] = EITHER
        expected[_save(root, f"damage/noise-{name}", data[:middle] + noise + data[middle + 200 :])] = EITHER
        expected[_save(root, f"damage/before-{name}", noise + data)] = EITHER
        expected[_save(root, f"damage/behind-{name}", data + noise)] = EITHER
        expected[_save(root, f"damage/twice-{name}", data + data)] = EITHER
    return expected


def _no_video(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Empty files, random bytes, text, pictures, sound, and clips too short to show a motion."""
    expected = {}
    for suffix in ("mp4", "mkv", "webm", "avi", "mov"):
        expected[_save(root, f"none/empty.{suffix}", b"")] = "empty"
        expected[_save(root, f"none/random.{suffix}", np.random.default_rng(len(suffix)).bytes(3000))] = REJECTED
    page = b"<!DOCTYPE html><html><body>This video is unavailable</body></html>" * 20
    expected[_save(root, "none/page.mp4", page)] = REJECTED
    expected[_save(root, "none/zeros.mp4", bytes(1 << 20))] = REJECTED
    expected[_save(root, "none/one-byte.mp4", b"\x00")] = REJECTED
    expected[_save(root, "none/picture.mp4", images(1)[0])] = REJECTED
    expected[_save(root, "none/pointer.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")] = REJECTED
    for suffix, codec in (("mp4", "aac"), ("mkv", "aac"), ("mov", "aac")):
        _write_sound(root / f"none/sound.{suffix}", codec)
        expected[f"none/sound.{suffix}"] = "no video"
    for num_frames in (1, 3):
        write_clip(root / f"none/{num_frames}-frames.mp4", num_frames=num_frames)
        expected[f"none/{num_frames}-frames.mp4"] = f"{num_frames} frames"
    return expected


def _write_sound(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _behind(data: bytes, mark: bytes, offset: int, new: bytes) -> bytes:
    """`data` with `new` written `offset` bytes behind the first `mark`."""
    at = data.index(mark) + len(mark) + offset
    return data[:at] + new + data[at + len(new) :]


def _headers(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Headers that are wrong, or promise what is not there. Offsets are those of ISO/IEC 14496-12 and of AVI.

    Where the container's own mark is gone, FFmpeg may still find the bare stream within.
    """
    mp4, huge = good["good.mp4"], b"\x7f\xff\xff\xff"
    return {
        _save(root, "header/no-moov.mp4", mp4.replace(b"moov", b"free")): EITHER,
        _save(root, "header/no-track.mp4", mp4.replace(b"trak", b"free")): "no video",
        _save(root, "header/no-sizes.mp4", mp4.replace(b"stsz", b"free")): REJECTED,
        _save(root, "header/no-brand.mp4", mp4.replace(b"ftypisom", bytes(8))): EITHER,
        _save(root, "header/no-codec.mp4", mp4.replace(b"mp4v", b"none")): EITHER,
        _save(root, "header/no-ebml.mkv", bytes(4) + good["good.mkv"][4:]): EITHER,
        _save(root, "header/no-riff.avi", bytes(4) + good["good.avi"][4:]): EITHER,
        _save(root, "header/many-samples.mp4", _behind(mp4, b"stsz", 8, huge)): EITHER,
        _save(root, "header/huge-sample.mp4", _behind(mp4, b"stsz", 12, huge)): EITHER,
        _save(root, "header/far-chunk.mp4", _behind(mp4, b"stco", 8, huge)): REJECTED,
        _save(root, "header/long-film.mp4", _behind(mp4, b"mvhd", 16, huge)): EITHER,
        _save(root, "header/long-media.mp4", _behind(mp4, b"mdhd", 16, huge)): EITHER,
        _save(root, "header/wide-track.mp4", _behind(mp4, b"tkhd", 76, huge * 2)): EITHER,
        _save(root, "header/many-frames.avi", _behind(good["good.avi"], b"avih", 20, b"\xff\xff\xff\x7f")): EITHER,
        _save(root, "header/no-clock.avi", _behind(good["good.avi"], b"strh", 24, bytes(8))): EITHER,
        _save(root, "header/deep-box.mp4", struct.pack(">I", 1 << 31) + b"moov" + mp4): EITHER,
    }


def _times(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Times that stand still, run backwards, leap, or vary."""
    mp4, mkv = good["good.mp4"], good["good.mkv"]
    backwards = mkv
    for step in range(12):
        # A block of track 1 opens with its time in milliseconds, relative to its cluster.
        block = b"\x81" + struct.pack(">h", step * 1000 // FPS)
        backwards = backwards.replace(block, b"\x81" + struct.pack(">h", -step), 1)
    assert backwards != mkv
    vary = {"times": [0, 1, 2, 5, 6, 10, 11, 12, 13, 20, 21, 30]}
    write_clip(root / "times" / "vary.mp4", **vary)
    write_clip(root / "times" / "vary.mkv", **vary)
    write_clip(root / "times" / "slow.mp4", fps=1)
    write_clip(root / "times" / "fast.mp4", fps=1000)
    return {
        "times/vary.mp4": KEPT,
        "times/vary.mkv": KEPT,
        "times/slow.mp4": KEPT,
        "times/fast.mp4": KEPT,
        _save(root, "times/still.mp4", _behind(mp4, b"stts", 12, bytes(4))): EITHER,
        _save(root, "times/leap.mp4", _behind(mp4, b"stts", 12, b"\x3f\xff\xff\xff")): EITHER,
        _save(root, "times/backwards.mkv", backwards): EITHER,
    }


def _odd_but_whole(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """What plays everywhere and still trips a pipeline: all of it must be kept."""
    expected = {}
    for width, height in ((34, 50), (16, 200), (200, 16), (2, 2), (31, 33)):
        path = root / "odd" / f"{width}x{height}.avi"
        write_clip(path, size=(width, height), codec="ffv1" if width % 2 else "mpeg4")
        expected[f"odd/{path.name}"] = KEPT
    for degrees, turn in ((90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))):
        a, b, c, d = (value << 16 for value in turn)
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 32 << 16, 32 << 16, 1 << 30)
        expected[_save(root, f"odd/turned-{degrees}.mp4", _behind(good["good.mp4"], b"tkhd", 40, matrix))] = KEPT
    for name, suffix in (("good.mp4", "avi"), ("good.mkv", "mp4"), ("good.webm", "mov"), ("good.avi", "mkv")):
        expected[_save(root, f"odd/{name}-is.{suffix}", good[name])] = KEPT
    expected[_save(root, "odd/LOUD.MP4", good["good.mp4"])] = KEPT
    for name, codec, pixels in (
        ("grey.mkv", "ffv1", "gray"),
        ("deep.mkv", "ffv1", "yuv420p10le"),
        ("full.avi", "mjpeg", "yuvj444p"),
        ("alpha.mov", "png", "rgba"),
    ):
        _write_pixels(root / "odd" / name, codec, pixels)
        expected[f"odd/{name}"] = KEPT
    _write_pixels(root / "odd" / "two-streams.mkv", "mpeg4", "yuv420p", num_streams=2)
    expected["odd/two-streams.mkv"] = KEPT
    for name, size in (("ts-a", (32, 32)), ("ts-b", (64, 48))):
        write_clip(root / "odd" / name, size=size, codec="libx264", format="mpegts")
    joined = b"".join((root / "odd" / name).read_bytes() for name in ("ts-a", "ts-b"))
    expected[_save(root, "odd/size-changes.mp4", joined)] = EITHER
    return expected


def _write_pixels(path: Path, codec: str, pixels: str, num_streams: int = 1) -> None:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=FPS) for _ in range(num_streams)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for step in range(12):
            picture = np.full((32, 32, 3), 20 * step, np.uint8)
            picture[step : step + 8] = 255
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
                frame.pts = step
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())


def _captions(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Captions that are no text: the clip is kept without."""
    expected = {}
    for name, beside, data in (
        ("latin", ".txt", "schön".encode("latin-1")),
        ("half-utf16", ".txt", b"\xff\xfea"),
        ("binary", ".txt", bytes(range(256))),
        ("no-json", ".json", b'{"caption": "cut o'),
        ("list", ".json", b'["a", "b"]'),
        ("null", ".json", b'{"caption": null}'),
        ("deep", ".json", b"[" * 100_000),
    ):
        expected[_save(root, f"caption/{name}.mp4", good["good.mp4"])] = KEPT
        _save(root, f"caption/{name}{beside}", data)
    _save(root, "caption/folder.mp4", good["good.mp4"])
    (root / "caption" / "folder.txt").mkdir()
    return expected | {"caption/folder.mp4": KEPT}


def _names(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """File names that are legal and awkward."""
    names = ("new\nline.mp4", "smile 😀.mp4", "x" * 200 + ".mp4", " spaces .mp4", "-y.mp4", "%03d.mp4", "a#b.mp4")
    names += ("x.tar#y.mp4", "quote'\".mp4", "back\\slash.mp4", "file:c.mp4", "no.dots.mp4.mp4", "*.mp4", "tab\t.mp4")
    expected = {_save(root, f"names/{name}", good["good.mp4"]): KEPT for name in names}
    (root / "names" / os.fsdecode(b"latin-\xe9.mp4")).write_bytes(good["good.mp4"])
    return expected | {"names/latin-\\udce9.mp4": "not UTF-8"}


def _links(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """Links that lead nowhere, in circles or home; folders, pipes, and files that may not be read."""
    folder = root / "links"
    folder.mkdir()
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "ping.mp4").symlink_to("pong.mp4")
    (folder / "pong.mp4").symlink_to("ping.mp4")
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    (folder / "to-good.mp4").symlink_to(root / "good.mp4")
    (folder / "up").symlink_to("..", target_is_directory=True)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    shutil.copy(root / "good.mp4", folder / "forbidden.mp4")
    (folder / "forbidden.mp4").chmod(0)
    return {
        "links/self.mp4": "leads to no file",
        "links/ping.mp4": "leads to no file",
        "links/pong.mp4": "leads to no file",
        "links/dangling.mp4": "leads to no file",
        "links/to-good.mp4": KEPT,
        "links/up": "lies in",
        "links/folder.mp4": "a folder",
        "links/pipe.mp4": "neither a file nor a folder",
        # Root may read it all the same.
        "links/forbidden.mp4": EITHER,
    }


def _rows(root: Path, good: dict[str, bytes]) -> dict[str, str]:
    """A table of captions that lists a clip twice, and one that is not there."""
    table = "path,caption\ngood.mkv,open the door\ngood.mkv,close the door\nlost.mp4,gone\n"
    (root / "clips.csv").write_text(table)
    return {"good.mkv (clips.csv:3)": "repeats this path", "lost.mp4": "no such file"}
