"""Which clips a folder of video files holds, and the caption and source of each."""

import csv
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
DEFAULT_CAPTIONS = "clips.csv"


@dataclass(frozen=True)
class Clip:
    path: str  # relative to the folder, with forward slashes
    caption: str  # empty where there is none
    source: str  # a lab, a data set, a camera: what a split can hold out


def list_clips(folder: Path, captions: str | None, source_column: str) -> tuple[list[Clip], list[dict]]:
    """The clips of `folder` sorted by path, and what was left out: {"clip", "reason"} each.

    Captions come from a CSV with the columns path (relative to `folder`), caption and `source_column`: the file
    `captions`, else `clips.csv` in the folder. A clip that it does not list takes its caption from `<stem>.txt`
    beside the file, and its source from the name of its top folder; so does every clip where `source_column`
    is empty. Raises ValueError for a missing folder, file or column.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: path must name a folder of video files")
    videos = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    if not videos:
        raise ValueError(f"no video files in {folder}: looked for **/*{{{','.join(SUFFIXES)}}}")

    table = _captions_file(folder, captions)
    rows, skipped = _read_captions(table, source_column) if table else ({}, [])
    if rows and rows.keys().isdisjoint(videos):
        raise ValueError(
            f"none of the {len(rows)} paths in {table} exists; the first looked for is {folder / next(iter(rows))}: "
            "the column path must be relative to the folder of videos"
        )
    skipped += [{"clip": path, "reason": f"listed in {table}, but no such file"} for path in rows.keys() - set(videos)]

    clips = []
    for path in videos:
        caption, source = rows.get(path, ("", ""))
        if path not in rows:
            try:
                caption = _caption_beside(folder / path)
            except UnicodeDecodeError as error:
                skipped.append({"clip": path, "reason": f"the caption beside it is not UTF-8: {error}"})
                continue
        clips.append(Clip(path, caption, source or _top_folder(folder, path)))
    return clips, sorted(skipped, key=lambda entry: entry["clip"])


def _captions_file(folder: Path, captions: str | None) -> Path | None:
    if captions is None:
        default = folder / DEFAULT_CAPTIONS
        return default if default.is_file() else None
    table = Path(captions).expanduser()
    if not table.is_file():
        raise ValueError(f"no file {table}: captions must name a CSV file")
    return table


def _read_captions(table: Path, source_column: str) -> tuple[dict[str, tuple[str, str]], list[dict]]:
    """{path: (caption, source)}, and the rows that repeat a path."""
    rows: dict[str, tuple[str, str]] = {}
    repeated = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            for column in filter(None, ("path", "caption", source_column)):
                if column not in columns:
                    raise ValueError(
                        f"{table} has no column {column!r}: its columns are {columns}"
                        + (
                            "; set source_column to one of them, or to '' to use folder names"
                            * (column == source_column)
                        )
                    )
            for row in reader:
                path = Path((row["path"] or "").strip()).as_posix()
                if path in rows:
                    reason = f"line {reader.line_num} of {table} repeats this path: its first row counts"
                    repeated.append({"clip": path, "reason": reason})
                    continue
                rows[path] = ((row["caption"] or "").strip(), (row.get(source_column) or "").strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a CSV file in UTF-8 ({error}): save it as one") from None
    return rows, repeated


def _caption_beside(video: Path) -> str:
    text = video.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""


def _top_folder(folder: Path, path: str) -> str:
    return path.split("/")[0] if "/" in path else folder.resolve().name
