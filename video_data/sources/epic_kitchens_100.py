"""EPIC-KITCHENS-100: narrated spans of `P01/videos/P01_01.MP4`, listed in EPIC_100_{train,validation}.csv.

The lists lie in the folder, in `annotations/` or in `epic-kitchens-100-annotations/`; the videos in the folder or
in `EPIC-KITCHENS/`, as the download script lays them out. The source of a clip is its participant.
"""

from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import rows
from video_data.sources.located import find_video

SPLITS = ("train", "validation")
LIST_FOLDERS = ("", "annotations", "epic-kitchens-100-annotations")
COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "narration")


def looks_like(root: Path) -> bool:
    return bool(_lists(root))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the lists; the id is narration_id. Raises ValueError for a missing list or column."""
    lists = _lists(root)
    if not lists:
        raise ValueError(f"no EPIC_100_train.csv or EPIC_100_validation.csv in {root} or its {LIST_FOLDERS[1:]}")
    for split, table in lists.items():
        rows.require_columns(table, COLUMNS)
        for line, row in rows.read_rows(table):
            yield _clip(root, split, line, row)


def _clip(root: Path, split: str, line: int, row: dict) -> ClipRequest | Rejected:
    clip, participant, name = (rows.text(row, column) for column in COLUMNS[:3])
    folder = next((f for f in (root, root / "EPIC-KITCHENS") if (f / participant).is_dir()), root) / participant
    video = find_video(folder / "videos", name)
    if video is None:
        looked_for = folder / "videos" / f"{name}.MP4"
        return Rejected(clip, looked_for.relative_to(root).as_posix(), f"no file {looked_for}")
    path = video.relative_to(root).as_posix()
    try:
        start_s, end_s = rows.span(row["start_timestamp"], row["stop_timestamp"])
    except ValueError as error:
        return Rejected(clip, path, f"line {line}: {error}")
    caption = rows.text(row, "narration")
    origin = "narration" if caption else "none"
    return ClipRequest(clip, path, start_s, end_s, caption, origin, source=participant, split=split)


def _lists(root: Path) -> dict[str, Path]:
    found = {}
    for split in SPLITS:
        candidates = (root / folder / f"EPIC_100_{split}.csv" for folder in LIST_FOLDERS)
        if table := next((file for file in candidates if file.is_file()), None):
            found[split] = table
    return found
