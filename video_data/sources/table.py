"""A CSV or parquet file with one clip a row: path or url, caption, start, end, id, source, licence, split.

Paths are absolute or relative to the table's folder; start and end are seconds or HH:MM:SS.ss, empty for the whole
video. All columns but path or url may be left out, and others may stand beside them.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import panda70m, rows
from video_data.sources.located import fetch_missing

COLUMNS = ("path", "url", "caption", "start", "end", "id", "source", "licence", "split")
SUFFIXES = (".csv", ".parquet")


def looks_like(root: Path) -> bool:
    if not root.is_file() or root.suffix.lower() not in SUFFIXES:
        return False
    # Panda-70M's rows have a URL too, and lists where this layout has one span.
    return rows.has_columns(root, ("path",)) or (rows.has_columns(root, ("url",)) and not panda70m.looks_like(root))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the rows. options: download_dir, attempts, num_workers.

    The id of a row without one is its path or URL, and its span. Raises ValueError for a table without the columns
    path and url, and for a column that is one of these but for its spelling.
    """
    table = _find(root)
    columns = rows.read_columns(table)
    if not {"path", "url"} & set(columns):
        raise ValueError(f"{table} has neither a column 'path' nor 'url': its columns are {columns}")
    _refuse_misspelt(table, columns)
    yield from fetch_missing(lambda: _list_rows(table), Path(), options)


def _find(root: Path) -> Path:
    if root.is_file():
        return root
    for name in ("clips.csv", "clips.parquet"):
        if (root / name).is_file():
            return root / name
    raise ValueError(f"no clips.csv or clips.parquet in {root}: path must name the table")


def _refuse_misspelt(table: Path, columns: list[str]) -> None:
    """A column that was meant to be read and is not would be missed only much later."""
    for column in columns:
        if column in COLUMNS or column == "license":
            continue
        meant = difflib.get_close_matches(column.lower().strip(), COLUMNS, n=1, cutoff=0.8)
        if meant and meant[0] not in columns:
            raise ValueError(
                f"{table} has a column {column!r} and no {meant[0]!r}; its columns are {columns}: rename it"
            )


def _list_rows(table: Path) -> Iterator[ClipRequest | Rejected]:
    folder = table.parent.resolve()
    for line, row in rows.read_rows(table):
        path, url = rows.text(row, "path"), rows.text(row, "url")
        name = rows.text(row, "id") or path or url or f"{table.name}:{line}"
        if not path and not url:
            yield Rejected(name, "", f"line {line} has neither a path nor a URL")
            continue
        try:
            start_s, end_s = rows.span(row.get("start"), row.get("end"))
        except ValueError as error:
            yield Rejected(name, path or url, f"line {line}: {error}")
            continue
        is_span = start_s is not None or end_s is not None
        if is_span and not rows.text(row, "id"):
            name = f"{name}:{start_s or 0:g}-{'' if end_s is None else f'{end_s:g}'}"
        caption = rows.text(row, "caption")
        yield ClipRequest(
            name,
            str(folder / path) if path else "",
            start_s,
            end_s,
            caption,
            caption_origin=table.suffix.lower().strip(".") if caption else "none",
            source=rows.text(row, "source") or table.stem,
            licence=rows.text(row, "licence", "license"),
            split=rows.text(row, "split"),
            url=url,
        )
