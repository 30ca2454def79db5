"""Ego4D: narrations of points in time, each made a clip of `window_s` seconds around its point.

The videos are `v2/{full_scale,video_540ss,clips}/<uid>.mp4` (or v1, or without the version), the narrations
`v2/annotations/narration.json` or `all_narrations_redacted.json`:

    {uid: {"narration_pass_1": {"narrations": [{"timestamp_sec", "timestamp_frame", "narration_text"}]}, ...}}

`#C C` (the camera's wearer) and other marks of who acts are taken off the text; a narration that the annotator
marked `#unsure` is rejected.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources.documents import read_json

VERSIONS = ("v2", "v1", "")
VIDEO_FOLDERS = ("full_scale", "video_540ss", "clips")
NARRATIONS = ("annotations/narration.json", "narration.json", "all_narrations_redacted.json")
PASSES = ("narration_pass_1", "narration_pass_2")
# "#C C picks a cup", "#c c picks", "#O a man X talks", "# C C": who acts, before what is done.
ACTOR = re.compile(r"^\s*#\s*(?:[cC](?:\s+[cC]\b)?|[oO])[\s,:.]*")
MARK = re.compile(r"#\w+\s*")


def looks_like(root: Path) -> bool:
    return _find_narrations(root) is not None


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips of every narrated video, by uid, pass and time. options: window_s.

    Raises ValueError where there are no narrations or window_s is not above zero.
    """
    if options.window_s <= 0:
        raise ValueError(f"window_s is {options.window_s}, expected more than 0 seconds")
    narrations = _find_narrations(root)
    if narrations is None:
        raise ValueError(f"no {NARRATIONS[0]} in {root}, {root / 'v2'} or {root / 'v1'}")
    document = read_json(narrations)
    records = document.get("videos", document) if isinstance(document, dict) else None
    if not isinstance(records, dict):
        raise ValueError(f"{narrations} holds no narrations by video, but {str(document)[:80]}")
    for uid, record in sorted(records.items()):
        if not isinstance(record, dict):
            continue
        video = _find_video(root, uid)
        if video is None:
            yield Rejected(uid, f"{VERSIONS[0]}/{VIDEO_FOLDERS[0]}/{uid}.mp4", f"no file {uid}.mp4 in {VIDEO_FOLDERS}")
            continue
        for name in PASSES:
            for narration in (record.get(name) or {}).get("narrations") or []:
                yield _clip(uid, video, name, narration, options.window_s)


def _clip(uid: str, video: str, name: str, narration: dict, window_s: float) -> ClipRequest | Rejected:
    text, time_s = narration.get("narration_text") or "", narration.get("timestamp_sec")
    if not isinstance(time_s, int | float) or time_s < 0:
        return Rejected(f"{uid}:{name}:{text[:40]}", video, f"the narration's timestamp_sec is {time_s!r}")
    start_s, end_s = max(0.0, time_s - window_s / 2), time_s + window_s / 2
    # Both annotators may have spoken at the same moment, so the second one's clips are told apart.
    clip = f"{uid}:{start_s:.3f}-{end_s:.3f}" + ":2" * (name == PASSES[1])
    if "#unsure" in text.lower():
        return Rejected(clip, video, "the narration is marked #unsure")
    caption = MARK.sub("", ACTOR.sub("", text)).strip()
    origin = "narration" if caption else "none"
    return ClipRequest(clip, video, start_s, end_s, caption, caption_origin=origin, source="ego4d")


def _find_narrations(root: Path) -> Path | None:
    candidates = (root / version / name for version in VERSIONS for name in NARRATIONS)
    return next((file for file in candidates if file.is_file()), None)


def _find_video(root: Path, uid: str) -> str | None:
    for version in VERSIONS:
        for folder in VIDEO_FOLDERS:
            file = root / version / folder / f"{uid}.mp4"
            if file.is_file():
                return file.relative_to(root).as_posix()
    return None
