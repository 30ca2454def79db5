"""The frames of a clip that a captioner is shown: a few, spread over the clip, at full size."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import av
import numpy as np

from video_data.clips import ClipRequest
from video_data.sources.media import open_media

# Closer to the beginning than this, decoding is cheaper than finding a key frame.
MIN_SEEK_S = 10.0


def shown_frames(request: ClipRequest, root: Path, num_frames: int, fps: float, num_shown: int) -> np.ndarray:
    """(T, H, W, 3) uint8: up to `num_shown` frames of a clip of `num_frames`, spread over it, upright and whole.

    They are decoded anew, because a model of language and vision wants more pixels than a frame store keeps. Raises
    ValueError where the clip has no frames any more, and OSError where its media is gone.
    """
    wanted = spread(num_frames, num_shown)
    with contextlib.closing(_frames(request, root, fps)) as frames:
        shown = list(_pick(frames, wanted))
    if not shown:
        raise ValueError(f"clip {request.id} has no frames: {request.video} was changed since it was ingested")
    return np.stack(shown)


def spread(num_frames: int, num_shown: int) -> list[int]:
    """Indices of at most `num_shown` frames, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, num_frames - 1, min(num_shown, num_frames)).round().astype(int).tolist()))


def _pick(frames: Iterator[av.VideoFrame], wanted: list[int]) -> Iterator[np.ndarray]:
    size = None
    for index, frame in enumerate(frames):
        # A stream may change its size on the way; a model sees one.
        size = size or (frame.width, frame.height)
        if index in wanted:
            pixels = frame.reformat(*size, format="rgb24").to_ndarray()
            yield np.rot90(pixels, round(frame.rotation / 90))
        if index == wanted[-1]:
            return


def _frames(request: ClipRequest, root: Path, fps: float) -> Generator[av.VideoFrame]:
    """The frames of a clip's span, in order."""
    media = open_media(request, root)
    try:
        if isinstance(media, list):
            for image in media:
                with av.open(str(image) if isinstance(image, Path) else image, "r") as container:
                    yield next(container.decode(video=0))
            return
        start_s = (request.start_s or 0.0) - 0.5 / fps
        with av.open(str(media) if isinstance(media, Path) else media, "r", metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            # Spans count from the stream's first frame, whose time need not be 0.
            first_s = float((stream.start_time or 0) * (stream.time_base or 0))
            if start_s > MIN_SEEK_S:
                container.seek(int(start_s * av.time_base) + (container.start_time or 0))
            for frame in container.decode(stream):
                if request.start_s is None or frame.time is None or frame.time - first_s >= start_s:
                    yield frame
    finally:
        for opened in media if isinstance(media, list) else [media]:
            if not isinstance(opened, Path | bytes):
                opened.close()
