"""Rows of a CSV or parquet file, and the times in them."""

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path

# Captions of a whole video in one field (Panda-70M) are longer than the csv module's limit.
csv.field_size_limit(min(sys.maxsize, 1 << 30))


def read_rows(table: Path) -> Iterator[tuple[int, dict]]:
    """(line, {column: value}) of every row; text from CSV, native types from parquet, None where there is none.

    Lines count from 1 with the header, rows of parquet from 1. Raises ValueError for a file that is neither.
    """
    if table.suffix.lower() == ".parquet":
        yield from _parquet_rows(table)
        return
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a CSV file in UTF-8 ({error}): save it as one") from None


def read_columns(table: Path) -> list[str]:
    """The names of the columns, in order. Raises ValueError for a file that is neither CSV nor parquet."""
    if table.suffix.lower() == ".parquet":
        return _open_parquet(table).schema_arrow.names
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file).fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a CSV file in UTF-8 ({error}): save it as one") from None


def has_columns(table: Path, wanted: tuple[str, ...]) -> bool:
    """Whether `table` can be read and has all of these columns."""
    try:
        return set(wanted) <= set(read_columns(table))
    except ValueError:
        return False


def require_columns(table: Path, required: tuple[str, ...]) -> list[str]:
    """The columns of `table`; ValueError that names the first of `required` it lacks, and what it has."""
    columns = read_columns(table)
    for column in required:
        if column not in columns:
            raise ValueError(f"{table} has no column {column!r}: its columns are {columns}")
    return columns


def _parquet_rows(table: Path) -> Iterator[tuple[int, dict]]:
    line = 0
    for batch in _open_parquet(table).iter_batches(batch_size=4096):
        for row in batch.to_pylist():
            line += 1
            yield line, row


def _open_parquet(table: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(table)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{table} is not a parquet file: {error}") from None


def text(row: dict, *columns: str) -> str:
    """The first value of `columns` that is not empty, as text."""
    for column in columns:
        value = row.get(column)
        if value is not None and not (isinstance(value, float) and math.isnan(value)) and str(value).strip():
            return str(value).strip()
    return ""


def seconds(value: str | float | None) -> float | None:
    """Seconds from a number, "12.5", "MM:SS.ss" or "HH:MM:SS.ss"; None where empty. Raises ValueError for others."""
    stated = str(value).strip() if value is not None else ""
    if not stated:
        return None
    parts = stated.split(":")
    try:
        if len(parts) > 3:
            raise ValueError
        total = 0.0
        for part in parts:
            total = total * 60 + float(part)
    except ValueError:
        raise ValueError(f"the time {stated!r} is neither seconds nor HH:MM:SS.ss") from None
    if math.isnan(total):
        return None
    if total < 0 or math.isinf(total):
        raise ValueError(f"the time {stated!r} is not a point in a video")
    return total


def span(start, end) -> tuple[float | None, float | None]:
    """(start_s, end_s) from two stated times. Raises ValueError where the end is not behind the start."""
    start_s, end_s = seconds(start), seconds(end)
    if end_s is not None and end_s <= (start_s or 0.0):
        raise ValueError(f"the clip ends at {end_s:g} s and starts at {start_s or 0.0:g} s")
    return start_s, end_s
