"""The kept clips as a LeRobotDataset v3 beside the frame store, at their own size and quality.

A clip that is a whole file in the size, rate and codec of most others is copied packet by packet, which costs next
to nothing; its timestamps are counted anew. All others (spans, shots, other sizes or rates, rotated pictures), and
every clip where a key-frame interval is asked for, are encoded to that size and rate.

Work is cut into shards of clips that appear under their names when they are complete, so a run that was killed goes
on with those that are missing.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from video_data.clips import ClipRequest
from video_data.lerobot_files import Episode, write_dataset
from video_data.runner import run_in_order
from video_data.sources.media import open_media
from video_data.store import read_manifest, write_text
from video_data.video_output import VideoOutput, read_packets

CLIPS_A_SHARD = 50
RATE_TOLERANCE = 0.02  # rates closer than this are one rate; frames are then taken one by one
CRF, PRESET, PIXEL_FORMAT = 18, "veryfast", "yuv420p"
# As PyAV names their decoders: what MP4 can hold. Packets of others have to be encoded.
COPIED_CODECS = {"h264", "hevc", "mpeg4", "vp9", "libvpx-vp9", "av1", "libdav1d", "mjpeg"}
DEFAULT_KEYFRAME_INTERVAL = 12  # frames, of the clips that have to be encoded in a data set of copied ones


@dataclass(frozen=True)
class Target:
    """What every video of the data set has in common."""

    width: int
    height: int
    fps: int
    codec: str
    keyframe_interval: int  # 0: copy where possible


def export_lerobot(root: Path, output: Path, keyframe_interval: int, runner: str, num_workers: int) -> Path:
    """Write <output>/lerobot from the frame store and manifest in `output`; returns it. Nothing to do where it is.

    root: what the clips' paths are relative to. The options stand beside it, in lerobot.json. Raises ValueError for a
    clip that can no longer be read, and where the folder was written with another key-frame interval.
    """
    folder, record = output / "lerobot", output / "lerobot.json"
    written = {"export_keyframe_interval": keyframe_interval}
    if folder.is_dir():
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else "not recorded"
        if found != written:
            raise ValueError(f"the options of {folder} are {found}, expected {written}: delete it to export again")
        return folder
    target = _target(output, keyframe_interval)
    shards = output / ".lerobot-shards"
    _begin(shards, target)
    groups = _groups(output)
    missing = [number for number in range(len(groups)) if not (shards / str(number)).is_dir()]
    calls = [(str(shards / str(number)), str(root), str(output), *groups[number], target) for number in missing]
    with tqdm(total=sum(count for _, count in groups), desc="export", unit="clip", mininterval=1.0) as progress:
        progress.update(progress.total - sum(groups[number][1] for number in missing))
        for number, done in zip(missing, run_in_order(runner, write_shard, calls, num_workers), strict=True):
            if done is None:
                clips = [row["id"] for row in _kept(output, *groups[number])]
                raise ValueError(f"the encoder crashed on one of {clips}")
            progress.update(done)
    write_text(record, json.dumps(written))
    write_dataset(folder, lambda: _episodes(output, shards), _pixel_samples(output), target.fps)
    shutil.rmtree(shards, ignore_errors=True)
    return folder


def _kept(output: Path, offset: int = 0, count: int | None = None) -> Iterator[dict]:
    """The rows of `count` clips in the frame store (None: all), from byte `offset` of the manifest on."""
    return itertools.islice((row for row in read_manifest(output, offset) if row["status"] == "kept"), count)


def _groups(output: Path) -> list[tuple[int, int]]:
    """Of every shard: the byte of the manifest at which its clips begin, and their number."""
    groups: list[tuple[int, int]] = []
    offset = 0
    with (output / "manifest.jsonl").open("rb") as file:
        for line in file:
            if json.loads(line)["status"] == "kept":
                if not groups or groups[-1][1] == CLIPS_A_SHARD:
                    groups.append((offset, 0))
                groups[-1] = (groups[-1][0], groups[-1][1] + 1)
            offset += len(line)
    return groups


def _episodes(output: Path, shards: Path) -> Iterator[Episode]:
    rows = _kept(output)
    for number in itertools.count():
        group = list(itertools.islice(rows, CLIPS_A_SHARD))
        if not group:
            return
        folder = shards / str(number)
        clips = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
        for row, clip in zip(group, clips, strict=True):
            yield Episode(folder / clip["file"], clip["start"], clip["length"], row["caption"])


def _target(output: Path, keyframe_interval: int) -> Target:
    """The most common size, rate and codec; sizes are even, as 4:2:0 video needs."""
    sizes: Counter[tuple[int, int]] = Counter()
    rates: Counter[int] = Counter()
    codecs: Counter[str] = Counter()
    for row in _kept(output):
        sizes[row["width"], row["height"]] += 1
        rates[max(1, round(row["fps"]))] += 1
        codecs[row["codec"]] += 1
    width, height = sizes.most_common(1)[0][0]
    fps, codec = rates.most_common(1)[0][0], codecs.most_common(1)[0][0]
    return Target(width & ~1, height & ~1, fps, codec, keyframe_interval)


def _begin(shards: Path, target: Target) -> None:
    """An empty folder for the shards, or the one that a killed run with the same target left."""
    record = shards / "target.json"
    if record.is_file() and json.loads(record.read_text()) == asdict(target):
        return
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    write_text(record, json.dumps(asdict(target)))


def write_shard(folder: str, root: str, output: str, offset: int, count: int, target: Target) -> int:
    """Write the videos of `count` clips and clips.json (file, first frame and length of each) to `folder`.

    output: the frame store; offset: byte of its manifest at which the rows of the clips begin.
    """
    # Of this process alone: the worker of a killed run may still be at work on the same shard.
    partial = Path(f"{folder}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with ShardWriter(partial, target) as writer:
        clips = [writer.add(row, Path(root)) for row in _kept(Path(output), offset, count)]
    (partial / "clips.json").write_text(json.dumps(clips), encoding="utf-8")
    try:
        partial.replace(folder)
    except OSError:
        if not Path(folder).is_dir():
            raise
        shutil.rmtree(partial)
    return len(clips)


class ShardWriter:
    """Video files of one shard: one of encoded clips, and one for every run of clips whose packets fit together."""

    def __init__(self, folder: Path, target: Target):
        self.folder, self.target = folder, target
        self._num_files = 0
        self._encoded: _EncodedOutput | None = None
        self._copied: VideoOutput | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        for output in (self._encoded, self._copied):
            if output is not None:
                output.close()

    def add(self, row: dict, root: Path) -> dict:
        request = _request(row)
        media = open_media(request, root)
        try:
            if self._is_copied(row, media) and (copied := self._copy(media, row["num_frames"])):
                return copied
            if not isinstance(media, list | Path):
                media.seek(0)
            return self._encode(media, request, row)
        except av.error.FFmpegError as error:
            raise ValueError(f"{row['id']} can no longer be decoded: {error.strerror}") from None
        finally:
            for opened in media if isinstance(media, list) else [media]:
                if not isinstance(opened, Path):
                    opened.close()

    def _is_copied(self, row: dict, media) -> bool:
        target = self.target
        return (
            not target.keyframe_interval
            and not isinstance(media, list)
            and row["codec"] in COPIED_CODECS
            and row["start_s"] is None
            and row["end_s"] is None
            and (row["width"], row["height"], row["codec"]) == (target.width, target.height, target.codec)
            and _same_rate(row["fps"], target.fps)
        )

    def _copy(self, media, num_frames: int) -> dict | None:
        """Append the packets of `media`; None where they are not one frame each, from a key frame on."""
        with av.open(str(media) if isinstance(media, Path) else media, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            if (stream.width, stream.height) != (self.target.width, self.target.height):
                return None  # stored lying on its side
            packets = read_packets(container, stream, num_frames)
            if packets is None:
                return None
            if self._copied is None or not self._copied.takes(stream, packets.delay):
                if self._copied is not None:
                    self._copied.close()
                self._copied = VideoOutput.copy_of(self._next_file(), stream, packets.delay, self.target.fps)
            output = self._copied
            start = output.append(packets)
        return {"file": output.path.name, "start": start, "length": num_frames}

    def _encode(self, media, request: ClipRequest, row: dict) -> dict:
        if self._encoded is None:
            self._encoded = _EncodedOutput.encoder(self._next_file(), self.target)
        output = self._encoded
        start = output.num_frames
        for pixels in _resampled(_frames(media, request, row["fps"]), row["fps"], self.target.fps):
            frame = av.VideoFrame.from_ndarray(_fit(pixels, self.target.width, self.target.height), format="rgb24")
            frame.pts = output.num_frames
            if output.num_frames == start:
                frame.pict_type = av.video.frame.PictureType.I
            output.container.mux(output.stream.encode(frame))
            output.num_frames += 1
        if output.num_frames == start:
            raise ValueError(f"{row['id']} has no frames any more: ingest again")
        return {"file": output.path.name, "start": start, "length": output.num_frames - start}

    def _next_file(self) -> Path:
        self._num_files += 1
        return self.folder / f"{self._num_files - 1}.mp4"


class _EncodedOutput(VideoOutput):
    """A video file of frames that are encoded."""

    @classmethod
    def encoder(cls, path: Path, target: Target) -> "_EncodedOutput":
        container = av.open(str(path), "w")
        stream = container.add_stream("libx264", rate=target.fps)
        stream.width, stream.height, stream.pix_fmt = target.width, target.height, PIXEL_FORMAT
        stream.codec_context.time_base = Fraction(1, target.fps)
        stream.codec_context.thread_count = 1
        interval = target.keyframe_interval or DEFAULT_KEYFRAME_INTERVAL
        stream.options = {"crf": str(CRF), "preset": PRESET, "g": str(interval), "bf": "0", "forced-idr": "1"}
        return cls(path, container, stream, 0, b"", target.fps)

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        super().close()


def _request(row: dict) -> ClipRequest:
    """The request that a row of the manifest came from."""
    episode = json.loads(row["episode"]) if row["episode"] else None
    return ClipRequest(row["id"], row["video"], row["start_s"], row["end_s"], fps=row["stated_fps"], episode=episode)


def _same_rate(fps: float, other: float) -> bool:
    return abs(fps / other - 1) < RATE_TOLERANCE


def _frames(media, request: ClipRequest, fps: float) -> Iterator[np.ndarray]:
    """Upright RGB frames (H, W, 3) of the clip."""
    if isinstance(media, list):
        for image in media:
            with av.open(str(image) if isinstance(image, Path) else image) as container:
                yield from (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return
    half_frame_s = 0.5 / fps
    with av.open(str(media) if isinstance(media, Path) else media, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        start_s = float((stream.start_time or 0) * (stream.time_base or 0))
        if request.start_s:
            container.seek(int((request.start_s - half_frame_s) * av.time_base) + (container.start_time or 0))
        for number, frame in enumerate(container.decode(stream)):
            time_s = number / fps if frame.time is None else frame.time - start_s
            if request.start_s is not None and time_s < request.start_s - half_frame_s:
                continue
            if request.end_s is not None and time_s >= request.end_s - half_frame_s:
                return
            yield np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _resampled(frames: Iterator[np.ndarray], fps: float, target_fps: float) -> Iterator[np.ndarray]:
    """The frame shown at every tick of `target_fps`; every frame once where the rates are the same."""
    if _same_rate(fps, target_fps):
        yield from frames
        return
    num_written = 0
    for number, frame in enumerate(frames):
        while num_written < round((number + 1) * target_fps / fps):
            yield frame
            num_written += 1


def _fit(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, 3): scaled to cover that size, then cut to it around the centre."""
    if pixels.shape[:2] != (height, width):
        scale = max(width / pixels.shape[1], height / pixels.shape[0])
        size = max(width, round(pixels.shape[1] * scale)), max(height, round(pixels.shape[0] * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        top, left = (size[1] - height) // 2, (size[0] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(pixels)


def _pixel_samples(output: Path) -> Iterator[np.ndarray]:
    """(P, 3) uint8 of every episode in turn: four frames of the frame store, for the data set's statistics."""
    store = json.loads((output / "store.json").read_text(encoding="utf-8"))
    size = store["image_size"]
    pixels = np.empty((4, size, size, 3), np.uint8)
    first = 0
    # Read, not mapped: what was looked at in a mapping counts as this process's memory.
    with (output / "frames.u8").open("rb", buffering=0) as frames:
        for row in _kept(output):
            for frame, time in zip(pixels, np.linspace(0, row["num_frames"] - 1, 4).round().astype(int), strict=True):
                frames.seek((first + int(time)) * size * size * 3)
                frames.readinto(frame.data)
            yield pixels[:, ::2, ::2].reshape(-1, 3)
            first += row["num_frames"]
