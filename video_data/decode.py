"""One sequential pass over one video: it feeds every clip of it with square frames, times and scores.

Seeking to each pair of frames decodes the same pictures again and again, 30 to 50 times slower than one pass from
the first wanted frame to the last.
"""

import itertools
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from video_data import motion, pictures
from video_data.clips import ClipRequest
from video_data.parts import create_part

# Containers count frames that an edit list cuts away, so a clip is called cut off only when clearly short.
MIN_DECODED_SHARE = 0.9
# Closer to the beginning than this, decoding is cheaper than finding a key frame.
MIN_SEEK_S = 10.0
FRAMES_AHEAD = 8  # decoded pictures in memory at once, at full size


class Sample(NamedTuple):
    """What is measured at a few frames a second. None: not to be had of this frame."""

    frame: int  # index within the clip
    motion: float | None  # picture heights a second
    sharpness: float  # variance of the Laplacian, squared grey levels
    brightness: float  # 0 to 255
    change: float | None  # mean difference to the sample before, grey levels


@dataclass
class Probe:
    """What the container and the pass tell about the media itself."""

    codec: str = ""
    width: int = 0  # upright
    height: int = 0
    fps: float = 0.0  # as the container states it, then as measured where that is wrong; 0: unknown
    num_declared: float = 0.0  # frames that the container promises; 0 where it does not say


class DamagedFrame(Exception):
    """The decoder marked a frame as corrupt."""


class PartNotWritten(OSError):
    """The frames of a clip could not be written: the disk's fault, where any other OSError is the media's."""


@dataclass
class ClipRecord:
    """One clip while it is decoded: its frames go to the file `part`, its times and samples stay here."""

    request: ClipRequest
    part: Path
    times_s: array = field(default_factory=lambda: array("d"))
    samples: list[Sample] = field(default_factory=list)
    pictures: list[tuple[int, np.ndarray]] = field(default_factory=list)  # full size, where a filter asks for them
    reason: str | None = None
    complete: bool = False  # its span was decoded to its end: what comes behind does not matter to it
    _picture_stride: int = 1
    _last_sampled: np.ndarray | None = None
    _last_tick: int | None = None
    _postponed: bool = False

    def __post_init__(self) -> None:
        self._file = create_part(self.part)

    def is_past(self, time_s: float, half_frame_s: float) -> bool:
        return self.request.end_s is not None and time_s >= self.request.end_s - half_frame_s

    def add(self, pixels: np.ndarray, times_s: Sequence[float]) -> None:
        """Frames (K, S, S, 3) uint8 and their times."""
        left = memoryview(pixels).cast("B")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise PartNotWritten(error.errno, error.strerror, str(self.part)) from error
        self.times_s.extend(times_s)

    def wants_sample(self, tick: int) -> bool:
        return tick != self._last_tick

    def postpone_sample(self) -> bool:
        """Whether the sample may wait for the next frame, once: this one (a key frame) tells nothing of motion."""
        self._postponed = not self._postponed
        return self._postponed

    def add_sample(self, tick: int, pixels: np.ndarray, moved: float | None, sharp: float, bright: float) -> None:
        self._last_tick, self._postponed = tick, False
        changed = None if self._last_sampled is None else pictures.change(self._last_sampled, pixels)
        self._last_sampled = pixels
        self.samples.append(Sample(len(self.times_s) - 1, moved, sharp, bright, changed))

    def add_picture(self, frame: av.VideoFrame, most: int) -> None:
        """Keep up to 2 * `most` full pictures spread over what has been seen; the stride doubles as it grows."""
        if (len(self.samples) - 1) % self._picture_stride:
            return
        self.pictures.append((len(self.times_s) - 1, frame.to_ndarray(format="rgb24")))
        if len(self.pictures) > 2 * most:
            self.pictures, self._picture_stride = self.pictures[::2], self._picture_stride * 2

    def close(self) -> None:
        with self._file:
            # The file may have held a longer clip before.
            if os.fstat(self._file.fileno()).st_size > self._file.tell():
                self._file.truncate()


@dataclass(frozen=True)
class PassOptions:
    """What a pass measures."""

    image_size: int
    motion: str  # codec (vectors where the codec has them, else flow) | flow | off
    samples_per_s: float
    num_pictures: int = 0  # full-size pictures a clip that a filter wants to see


def decode(
    media: Path | BinaryIO | Sequence, image_fps: float | None, clips: list[ClipRecord], options: PassOptions
) -> Probe:
    """Feed `clips` from one pass over `media`. A clip that cannot be completed gets a `reason`.

    An OSError from writing is raised, for a full disk is no fault of the clip; one from reading `media` is a reason.
    """
    probe = Probe()
    try:
        if isinstance(media, list):
            _feed(_image_frames(media, image_fps, probe), probe, clips, options)
        else:
            _decode_container(media, probe, clips, options)
    except DamagedFrame as error:
        _fail(clips, str(error))
    except av.error.FFmpegError as error:
        _fail(clips, f"cannot be decoded: {error.strerror}")
    except PartNotWritten:
        raise
    except OSError as error:
        _fail(clips, f"cannot be read: {error.strerror or error}")
    except Exception as error:  # whatever a decoder makes of a damaged file costs its clips, never the run
        _fail(clips, f"cannot be decoded: {type(error).__name__}: {error}")
    finally:
        for clip in clips:
            clip.close()
    return probe


def _decode_container(media, probe: Probe, clips: list[ClipRecord], options: PassOptions) -> None:
    # Some AVI files hold metadata that is no text, which is no reason to refuse the pictures.
    with av.open(media if hasattr(media, "read") else str(media), metadata_errors="ignore") as container:
        if not container.streams.video:
            _fail(clips, "no video stream")
            return
        stream = container.streams.video[0]
        probe.codec, probe.fps = stream.codec_context.name, float(stream.average_rate or 0)
        # Clips are decoded side by side; threads within one would only hold back its first frames.
        stream.codec_context.thread_count = 1
        if options.motion == "codec" and probe.codec in motion.CODECS_WITH_VECTORS:
            stream.codec_context.options = dict(motion.DECODER_OPTIONS)
        start_s = min(clip.request.start_s or 0.0 for clip in clips)
        sought = start_s > MIN_SEEK_S
        if sought:
            container.seek(int(start_s * av.time_base) + (container.start_time or 0))
        num_decoded = _feed(_container_frames(container, stream, probe), probe, clips, options)
        if num_decoded is None or sought:
            return
        probe.num_declared = _declared_frames(container, stream, probe.fps)
        if num_decoded < MIN_DECODED_SHARE * probe.num_declared:
            reason = f"cut off: {num_decoded} frames of about {probe.num_declared:.0f}"
            _fail([clip for clip in clips if clip.request.end_s is None], reason)


def _feed(
    frames: Iterator[tuple[av.VideoFrame, float]], probe: Probe, clips: list[ClipRecord], options: PassOptions
) -> int | None:
    """Give every frame to the clips that hold it; how many frames there were, None where not all were needed."""
    batch = _Batch(options.image_size)
    measure_motion = _motion_meter(probe.codec, options.motion)
    waiting = sorted(clips, key=lambda clip: clip.request.start_s or 0.0)
    active: list[ClipRecord] = []
    before_s, first_s, num_frames = 0.0, 0.0, 0
    half_frame_s = 0.5 / probe.fps if probe.fps else 0.0
    change_s = -math.inf  # when the next clip begins or ends
    try:
        for frame, time_s in frames:
            if not num_frames:
                turned = round(frame.rotation / 90) % 2
                probe.width, probe.height = (frame.height, frame.width) if turned else (frame.width, frame.height)
                first_s = before_s = time_s
            num_frames += 1
            if time_s >= change_s:
                batch.hand_to(active)
                while waiting and _start_s(waiting[0], half_frame_s) <= time_s:
                    active.append(waiting.pop(0))
                for clip in active:
                    clip.complete = clip.is_past(time_s, half_frame_s)
                active = [clip for clip in active if not clip.complete]
                if not active and not waiting:
                    return None
                change_s = min(
                    *(_start_s(clip, half_frame_s) for clip in waiting[:1]),
                    *(clip.request.end_s - half_frame_s for clip in active if clip.request.end_s is not None),
                    math.inf,
                    math.inf,
                )
            if not active:
                batch.last, before_s = None, time_s
                continue
            batch.add(frame, time_s)
            # Samples lie on a grid of the video's own time, so that a clip's scores do not depend on its neighbours.
            tick = int(time_s * options.samples_per_s)
            if due := [clip for clip in active if clip.wants_sample(tick)]:
                before, pixels = batch.hand_to(active)
                assert pixels is not None  # the frame that was just added
                moved = measure_motion(frame, before, pixels, time_s - before_s)
                if moved is None:
                    due = [clip for clip in due if not clip.postpone_sample()]
                if due:
                    sharp, bright = pictures.sharpness(pictures.luma(frame)), pictures.brightness(pixels)
                for clip in due:
                    clip.add_sample(tick, pixels, moved, sharp, bright)
                    if options.num_pictures:
                        clip.add_picture(frame, options.num_pictures)
            elif batch.is_full:
                batch.hand_to(active)
            before_s = time_s
    finally:
        batch.hand_to(active)
    probe.fps = frame_rate(first_s, before_s, num_frames, probe.fps)
    for clip in itertools.chain(active, waiting):
        if clip.request.end_s is not None:
            _check_span_end(clip, probe)
    return num_frames


def _start_s(clip: ClipRecord, half_frame_s: float) -> float:
    return -math.inf if clip.request.start_s is None else clip.request.start_s - half_frame_s


class _Batch:
    """Frames that the same clips hold, on their way to them."""

    def __init__(self, image_size: int):
        self._scaler = pictures.SquareScaler(image_size)
        self._times_s: list[float] = []
        self.last: np.ndarray | None = None  # the last frame handed on

    @property
    def is_full(self) -> bool:
        return len(self._times_s) == pictures.BATCH

    def add(self, frame: av.VideoFrame, time_s: float) -> None:
        self._scaler.add(frame)
        self._times_s.append(time_s)

    def hand_to(self, clips: list[ClipRecord]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Scale and write; the last frame, and the one before it where the pass was at it."""
        if not self._times_s:
            return None, None
        pixels, times_s = self._scaler.take(), self._times_s
        self._times_s = []
        for clip in clips:
            clip.add(pixels, times_s)
        before = pixels[-2] if len(pixels) > 1 else self.last
        self.last = pixels[-1].copy()
        return before, self.last


def _motion_meter(codec: str, choice: str) -> Callable:
    """(frame, pixels before or None, pixels, seconds between them) to picture heights a second, or None."""
    if choice == "off":
        return lambda frame, before, pixels, elapsed_s: None
    if choice == "codec" and codec in motion.CODECS_WITH_VECTORS:

        def moved(frame, before, pixels, elapsed_s):
            length = motion.vector_length(frame)
            return None if length is None or elapsed_s <= 0 else length / elapsed_s
    else:
        flow = motion.FlowMeter()

        def moved(frame, before, pixels, elapsed_s):
            return None if before is None or elapsed_s <= 0 else flow(before, pixels) / elapsed_s

    return moved


def _check_span_end(clip: ClipRecord, probe: Probe) -> None:
    """The media ended within the span: fine to a tenth, for data sets round their times."""
    start_s, end_s = clip.request.start_s or 0.0, clip.request.end_s
    assert end_s is not None
    covered_s = clip.times_s[-1] - start_s + (1 / probe.fps if probe.fps else 0.0) if clip.times_s else 0.0
    if covered_s < MIN_DECODED_SHARE * (end_s - start_s):
        clip.reason = f"cut off: the media ends {end_s - start_s - covered_s:.1f} s before the span does"


def _container_frames(container, stream, probe: Probe) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with their times in seconds from the stream's start, counted where they have none."""
    start_s = float((stream.start_time or 0) * stream.time_base)
    for number, frame in enumerate(_ahead(container.decode(stream))):
        if frame.is_corrupt:
            raise DamagedFrame(f"frame {number} is damaged")
        yield frame, number / (probe.fps or 1.0) if frame.time is None else frame.time - start_s


def _ahead(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """`frames`, decoded a few at a time: turning to each at once costs twice, for decoder and Python share the caches.

    Those before an error come first, then the error.
    """
    while True:
        few: list[av.VideoFrame] = []
        try:
            few.extend(itertools.islice(frames, FRAMES_AHEAD))
        except Exception:
            yield from few
            raise
        if not few:
            return
        few.reverse()
        while few:
            yield few.pop()


def _image_frames(images: list, fps: float | None, probe: Probe) -> Iterator[tuple[av.VideoFrame, float]]:
    if not fps:
        raise ValueError("single images have no frame rate: set image_fps")
    probe.fps, probe.num_declared = fps, len(images)
    for number, image in enumerate(images):
        with av.open(str(image) if isinstance(image, Path) else image) as container:
            probe.codec = container.streams.video[0].codec_context.name
            for frame in container.decode(video=0):
                yield frame, number / fps


def _fail(clips: list[ClipRecord], reason: str) -> None:
    """Reject the clips that are not complete yet."""
    for clip in clips:
        if clip.reason is None and not clip.complete:
            clip.reason = reason


def frame_rate(first_s: float, last_s: float, num_frames: int, nominal: float) -> float:
    """Frames per second of `num_frames` frames; 0 where neither the container nor the times tell."""
    if last_s <= first_s:
        return nominal
    measured = (num_frames - 1) / (last_s - first_s)
    # Some recorders state 1000 frames/s, the rate of their clock. Where the container is right its value is
    # better: timestamps rounded to milliseconds would give every clip a rate of its own.
    return nominal if abs(nominal / measured - 1) < 0.02 else measured


def _declared_frames(container, stream, fps: float) -> float:
    """The number of frames that the container promises; 0 where it does not say."""
    if stream.frames:
        return stream.frames
    # The container's duration is that of its longest stream, so it tells about the video only if that is alone.
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base * fps
    return 0
