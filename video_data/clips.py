"""The record of a clip: what a source asks for, and what cannot even be asked for.

A source (`video_data/sources/`) lists one `ClipRequest` a clip; the pass decodes it and writes one manifest row.
"""

from dataclasses import dataclass

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(frozen=True, slots=True)  # a run holds one for each clip
class ClipRequest:
    """One clip to decode: a whole media or a span of it. Any number of requests may share one media.

    A span holds the frames with start_s <= time < end_s, where a time is rounded to its frame: half a frame of
    tolerance, because data sets store times as decimal or 32-bit numbers.
    """

    id: str  # unique within the ingest; "<video id>:<start>-<end>" for spans
    video: str  # absolute, or relative to the root; "<tar path>#<member>" in tars; the folder of image files
    start_s: float | None = None  # None: from the beginning
    end_s: float | None = None  # None: to the end
    caption: str = ""  # empty: none
    caption_origin: str = ""  # "csv", "sidecar", "narration", "asr", "label", "instruction", "none", "unreadable", ...
    source: str = ""  # data set, lab or camera: what a split can hold out
    licence: str = ""  # as the data set or the option states it; empty: unknown, counted in the report
    split: str = ""  # train | validation | test, where the layout has one
    url: str = ""  # where it came from, where known
    fps: float | None = None  # only where the media cannot tell: single images
    episode: dict | None = None  # robot data: camera, and the rows that hold the actions; see sources/lerobot.py


@dataclass(frozen=True)
class Rejected:
    """A row that cannot even be requested: a duplicate id, a missing file, a span that ends before it starts."""

    id: str
    video: str
    reason: str
