"""WebVid: `videos/<page_dir>/<videoid>.mp4`, listed in a CSV with videoid, contentUrl, duration, page_dir, name.

`path` is the CSV (the videos lie beside it) or a folder with any number of them; the split is train unless the
CSV's name has "val" in it. Videos that are missing are downloaded where download_dir is set.
"""

from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import rows
from video_data.sources.located import fetch_missing

COLUMNS = ("videoid", "contentUrl", "page_dir", "name")


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
        split = "validation" if "val" in table.stem.lower() else "train"
        for _, row in rows.read_rows(table):
            name, page = rows.text(row, "videoid"), rows.text(row, "page_dir")
            caption = rows.text(row, "name")
            yield ClipRequest(
                name,
                str(table.parent.resolve() / "videos" / page / f"{name}.mp4"),
                caption=caption,
                caption_origin="alt text" if caption else "none",
                source="webvid",
                split=split,
                url=rows.text(row, "contentUrl"),
            )
