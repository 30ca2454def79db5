"""A folder of video files: `**/*.{mp4,webm,mkv,avi,mov}`, captions in a table or beside each file.

The table is the option `captions`, else `clips.csv` in the folder: the columns path (relative to the folder),
caption, `source_column` and, where there is one, licence. A clip that it does not list takes its caption from
`<stem>.txt`, else from the key caption of `<stem>.json`, and its source from the name of its top folder; so does
every clip where `source_column` is empty.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from video_data.clips import VIDEO_SUFFIXES, ClipRequest, Rejected
from video_data.sources import rows, sidecar
from video_data.sources.walk import walk

DEFAULT_CAPTIONS = "clips.csv"


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of their paths, which are their ids. options: captions, source_column.

    Raises ValueError for a missing folder, table or column, and where no path of the table exists.
    """
    if not root.is_dir():
        raise ValueError(f"no folder {root}: path must name a folder of video files")
    table = _captions_table(root, options.captions)
    captions, repeated = _read_captions(table, options.source_column) if table else ({}, [])
    yield from repeated
    found, num_listed = False, 0
    for path in walk(root, VIDEO_SUFFIXES):
        found = True
        if isinstance(path, Rejected):
            yield path
        elif path in captions:
            num_listed += 1
            stated = captions.pop(path)
            origin = "csv" if stated["caption"] else "none"
            source = stated["source"] or _top(root, path)
            yield ClipRequest(path, path, caption_origin=origin, **(stated | {"source": source}))
        else:
            beside = {"source": _top(root, path)} | sidecar.beside(root / path)
            yield ClipRequest(path, path, **beside)
    if not found:
        raise ValueError(f"no video files in {root}: looked for **/*{{{','.join(VIDEO_SUFFIXES)}}}")
    if captions and not num_listed:
        raise ValueError(
            f"none of the {len(captions)} paths in {table} exists; the first looked for is "
            f"{root / next(iter(captions))}: the column path must be relative to the folder of videos"
        )
    for path in captions:
        yield Rejected(path, path, f"listed in {table}, but no such file")


def _captions_table(root: Path, captions: str | None) -> Path | None:
    if captions is None:
        return root / DEFAULT_CAPTIONS if (root / DEFAULT_CAPTIONS).is_file() else None
    table = Path(captions).expanduser()
    if not table.is_file():
        raise ValueError(f"no file {table}: captions must name a CSV file")
    return table


def _read_captions(table: Path, source_column: str) -> tuple[dict[str, dict[str, Any]], list[Rejected]]:
    """{path: caption, source and licence}, and the rows that repeat a path."""
    columns = rows.require_columns(table, ("path", "caption"))
    if source_column and source_column not in columns:
        raise ValueError(
            f"{table} has no column {source_column!r}: its columns are {columns}"
            "; set source_column to one of them, or to '' to use folder names"
        )
    captions: dict[str, dict[str, Any]] = {}
    repeated = []
    for line, row in rows.read_rows(table):
        path = Path(rows.text(row, "path")).as_posix()
        if path in captions:
            reason = f"line {line} of {table} repeats this path: its first row counts"
            repeated.append(Rejected(f"{path} ({table.name}:{line})", path, reason))
            continue
        captions[path] = {
            "caption": rows.text(row, "caption"),
            "source": rows.text(row, source_column) if source_column else "",
            "licence": rows.text(row, "licence", "license"),
        }
    return captions, repeated


def _top(root: Path, path: str) -> str:
    return path.split("/")[0] if "/" in path else root.resolve().name
