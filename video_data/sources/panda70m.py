"""Panda-70M: one row a YouTube video, with parallel lists of spans and captions as text.

    videoID, url, timestamp "[['0:00:25.110', '0:00:31.081'], ...]", caption "['a man ...', ...]", matching_score

`path` is the CSV or a folder with any number of them. The release has no videos: they are looked for as
`videos/<videoID>.*` beside the CSV, and downloaded where download_dir is set. What the data set's own downloader
writes (`<shard>/<clip>.mp4` with .txt and .json beside it) is layout folder.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import rows
from video_data.sources.located import fetch_missing, find_video

COLUMNS = ("videoID", "url", "timestamp", "caption")
SPLITS = {"validation": "validation", "testing": "test"}


def looks_like(root: Path) -> bool:
    return any(rows.has_columns(table, COLUMNS) for table in _tables(root))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the CSVs' names and rows. options: download_dir, attempts, num_workers.

    Raises ValueError where there is no CSV, or one lacks a column.
    """
    tables = _tables(root)
    if not tables:
        raise ValueError(f"no *.csv in {root}: expected one with the columns {', '.join(COLUMNS)}")
    for table in tables:
        rows.require_columns(table, COLUMNS)
    yield from fetch_missing(lambda: _list_rows(tables), root, options)


def _tables(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix.lower() == ".csv" else []
    return sorted(root.glob("*.csv"))


def _list_rows(tables: list[Path]) -> Iterator[ClipRequest | Rejected]:
    for table in tables:
        split = next((split for name, split in SPLITS.items() if name in table.stem), "train")
        videos = table.parent.resolve() / "videos"
        for line, row in rows.read_rows(table):
            yield from _list_video(videos, rows.text(row, "videoID"), line, row, split)


def _list_video(videos: Path, name: str, line: int, row: dict, split: str) -> Iterator[ClipRequest | Rejected]:
    video = str(find_video(videos, name) or videos / f"{name}.mp4")
    try:
        times, captions = (ast.literal_eval(rows.text(row, column)) for column in ("timestamp", "caption"))
        pairs = list(zip(times, captions, strict=True))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        yield Rejected(name, video, f"line {line}: timestamp and caption are no lists of the same length: {error}")
        return
    for number, (stated, caption) in enumerate(pairs):
        try:
            start, end = stated
            start_s, end_s = rows.span(start, end)
        except (ValueError, TypeError) as error:
            yield Rejected(f"{name}:{number}", video, f"line {line}: {error}")
            continue
        text = str(caption).strip()
        yield ClipRequest(
            f"{name}:{start_s:g}-{end_s:g}",
            video,
            start_s,
            end_s,
            text,
            caption_origin="model" if text else "none",
            source="panda70m",
            split=split,
            url=rows.text(row, "url"),
        )
