"""The operator that every runner runs: one video in, one row of the manifest a clip out.

It decodes once, scores, splits into shots where asked, and filters. Frames of clips that are kept so far are left in
`parts`, raw, for the writer of the frame store; near duplicates are its business.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from video_data import duplicates
from video_data.clips import ClipRequest
from video_data.decode import ClipRecord, PassOptions, Probe, Sample, decode, frame_rate
from video_data.filters import AFTER_DECODING, BEFORE_DECODING, darkness, first_reason, shots, stillness, text
from video_data.parts import release_part
from video_data.pictures import strip_jpeg
from video_data.sources.media import open_media

HASH_CHUNK_BYTES = 1 << 20
# Columns that the pass fills in; None until then, and for clips that it never reached.
MEASURED = (
    "codec",
    "width",
    "height",
    "fps",
    "num_frames",
    "duration_s",
    "sha256",
    "hash",
    "language",
    "motion",
    "sharpness",
    "brightness",
    "dark_share",
    "still_share",
    "num_shots",
    "text_share",
)


@dataclass(frozen=True, slots=True)
class Video:
    """One media file with the clips that are wanted of it, as a job of its own."""

    number: int  # position among the videos of this run
    requests: tuple[ClipRequest, ...]


def new_row(request: ClipRequest) -> dict:
    """The row of a clip about which nothing but the request is known."""
    row = asdict(request)
    row["episode"] = json.dumps(row["episode"]) if row["episode"] else None
    row["stated_fps"] = row.pop("fps")
    row |= dict.fromkeys(MEASURED) | {"status": "kept", "filter": None, "reason": None, "duplicate_of": None}
    return row


def curate(video: Video, root: str, parts: str, options: PassOptions, filters) -> list[dict]:
    """Rows of the clips of `video`, in the order of its requests; shots of a split clip in order of time.

    A kept row has a key `part`: the file in `parts` with its frames, and `first_frame`, where they begin in it. A
    rejected row that has frames has a key `strip`: a small JPEG of four of them in base64.
    """
    rows: dict[int, list[dict]] = {}
    records: dict[int, ClipRecord] = {}
    for index, request in enumerate(video.requests):
        row = new_row(request) | {"language": _language(request, filters)}
        if rejection := first_reason(BEFORE_DECODING, row, filters):
            rows[index] = [_rejected(row, *rejection)]
        else:
            records[index] = ClipRecord(request, Path(parts) / f"{video.number}-{index}.u8")
    if records:
        probe, digest = _decode(video.requests[0], Path(root), list(records.values()), options)
        for index, record in records.items():
            row = new_row(record.request) | {"language": _language(record.request, filters), "sha256": digest}
            row |= {"codec": probe.codec or None, "width": probe.width or None, "height": probe.height or None}
            rows[index] = _finish(row, record, probe, options, filters)
            if all(row["status"] == "rejected" for row in rows[index]):
                release_part(record.part)
    return [row for index in sorted(rows) for row in rows[index]]


def _language(request: ClipRequest, filters) -> str | None:
    """The language of the caption, looked for only where it is asked for."""
    if not filters.languages or not request.caption:
        return None
    from video_data.captions.language import detect_language

    return detect_language(request.caption)


def _decode(
    request: ClipRequest, root: Path, records: list[ClipRecord], options: PassOptions
) -> tuple[Probe, str | None]:
    """Open, hash and decode the media of `request`."""
    try:
        media = open_media(request, root)
        is_empty = isinstance(media, Path) and not media.stat().st_size
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        for record in records:
            record.close()
            record.reason = f"cannot be opened: {reason}"
        return Probe(), None
    try:
        if is_empty:
            for record in records:
                record.close()
                record.reason = "the file is empty"
            return Probe(), None
        probe = decode(media, request.fps, records, options)
        try:
            return probe, _sha256(media)
        except OSError as error:
            for record in records:
                record.reason = record.reason or f"cannot be read: {error.strerror or error}"
            return probe, None
    finally:
        for opened in media if isinstance(media, list) else [media]:
            if not isinstance(opened, Path):
                opened.close()


def _sha256(media) -> str | None:
    """Of the bytes of the media; None for a list of images."""
    if isinstance(media, list):
        return None
    digest = hashlib.sha256()
    if isinstance(media, Path):
        with media.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if media.closed:
        return None
    media.seek(0)
    while chunk := media.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _finish(row: dict, record: ClipRecord, probe: Probe, options: PassOptions, filters) -> list[dict]:
    """The row of a decoded clip, or one for each of its shots."""
    num_frames = len(record.times_s)
    reason = record.reason or (None if num_frames else "no frame within its span")
    fps = frame_rate(record.times_s[0], record.times_s[-1], num_frames, probe.fps) if num_frames else 0.0
    if reason is None and not fps:
        reason = "no frame rate" if num_frames >= filters.min_frames else None
    if reason is not None:
        row = _rejected(row | {"num_frames": num_frames or None}, "decode", reason)
        return [row | _strip(_frames(record, options.image_size), 0, num_frames) if num_frames else row]
    frames = _frames(record, options.image_size)
    starts = [0]
    if filters.shots != "off":
        starts += shots.detect_cuts(frames, fps or 1.0, filters)
    if filters.shots != "split" or len(starts) == 1:
        whole = _score(row, record, frames, fps, 0, num_frames, filters)
        whole["num_shots"] = len(starts) if filters.shots != "off" else None
        return [_filtered(whole, frames, filters)]
    rows = []
    for first, behind in zip(starts, [*starts[1:], num_frames], strict=True):
        start_s, end_s = record.times_s[first], record.times_s[behind - 1] + 1 / fps
        shot = replace(
            record.request, id=f"{record.request.id}:{start_s:.3f}-{end_s:.3f}", start_s=start_s, end_s=end_s
        )
        shot_row = row | {"id": shot.id, "start_s": start_s, "end_s": end_s, "num_shots": 1}
        rows.append(_filtered(_score(shot_row, record, frames, fps, first, behind, filters), frames, filters))
    return rows


def _score(row: dict, record: ClipRecord, frames: np.ndarray, fps: float, first: int, behind: int, filters) -> dict:
    """`row` with what was measured of the frames from `first` up to `behind`."""
    samples = [sample for sample in record.samples if first <= sample.frame < behind]
    changes = _known(samples[1:], "change")
    moved = _known(samples, "motion")
    bright = _known(samples, "brightness")
    num_frames = behind - first
    seen = [picture for frame, picture in record.pictures if first <= frame < behind]
    return row | {
        "fps": round(fps, 3),
        "num_frames": num_frames,
        "duration_s": round(num_frames / fps, 3) if fps else 0.0,
        "hash": duplicates.perceptual_hash(frames[first + duplicates.frame_positions(num_frames)]).hex(),
        "motion": round(float(moved.mean()), 6) if len(moved) else None,
        "sharpness": round(float(np.median(_known(samples, "sharpness"))), 3) if samples else None,
        "brightness": round(float(bright.mean()), 3) if samples else None,
        "dark_share": round(darkness.dark_share(bright), 4) if samples else None,
        "still_share": round(stillness.still_share(changes), 4) if len(changes) else None,
        "text_share": round(text.text_share(_spread(seen)), 5) if text.is_wanted(filters) else None,
        "part": record.part.name,
        "first_frame": first,
    }


def _known(samples: list[Sample], name: str) -> np.ndarray:
    values = [getattr(sample, name) for sample in samples]
    return np.array([value for value in values if value is not None])


def _spread(seen: list) -> list:
    """At most as many pictures as the text filter looks at, spread over the clip."""
    if len(seen) <= text.NUM_PICTURES:
        return seen
    return [seen[index] for index in np.linspace(0, len(seen) - 1, text.NUM_PICTURES).round().astype(int)]


def _frames(record: ClipRecord, image_size: int) -> np.ndarray:
    """(T, S, S, 3) uint8: the frames that the pass wrote, mapped."""
    return np.memmap(record.part, np.uint8, "r", shape=(len(record.times_s), image_size, image_size, 3))


def _filtered(row: dict, frames: np.ndarray, filters) -> dict:
    rejection = first_reason(AFTER_DECODING, row, filters)
    if rejection is None:
        return row
    return _rejected(row, *rejection) | _strip(frames, row["first_frame"], row["num_frames"])


def _strip(frames: np.ndarray, first: int, num_frames: int) -> dict:
    """Four pictures of a rejected clip, for the report: its frames are kept nowhere else."""
    jpeg = strip_jpeg(frames[first + duplicates.shown_positions(num_frames)])
    return {"strip": base64.b64encode(jpeg).decode()}


def _rejected(row: dict, name: str, reason: str) -> dict:
    row = {key: value for key, value in row.items() if key not in ("part", "first_frame")}
    return row | {"status": "rejected", "filter": name, "reason": reason}


def crashed(video: Video) -> list[dict]:
    """Rows for a video that took its process down."""
    return [_rejected(new_row(request), "decode", "the decoder crashed") for request in video.requests]
