"""JSON lines to parquet, a block at a time: a table of any length in the memory of a thousand rows.

pyarrow reads the lines itself, so that no row becomes an object of Python again and pandas is not loaded.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

BLOCK_BYTES = 1 << 20  # of lines in memory at once, and in one row group; no line is longer


def to_parquet(lines: Path, table: Path, schema: pa.Schema) -> None:
    """Write the rows of `lines`, which have the fields of `schema` and no others, to `table`."""
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    parsing = pyarrow.json.ParseOptions(
        explicit_schema=schema.remove_metadata(), unexpected_field_behavior="error", newlines_in_values=False
    )
    with pq.ParquetWriter(table, schema) as writer:
        if not lines.stat().st_size:
            return
        with pyarrow.json.open_json(lines, reading, parsing) as batches:
            for batch in batches:
                writer.write_table(pa.Table.from_batches([batch]).select(schema.names).cast(schema))
