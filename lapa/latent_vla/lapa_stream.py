"""The stream that the released weights of LAPA-7B are published in: where each array lies, and its bytes.

A file is one msgpack record after another, each `[key, bytes]`. The key is the path of a weight in the flax tree,
with or without leading "params"; the bytes are flax's serialisation of one array:

    array     ExtType 1 of [shape, dtype name, row-major bytes]
    chunked   {"__msgpack_chunked_array__": true, "shape": {"0": n, ...}, "chunks": {"0": array, ...}},
              for an array of more than 2^30 bytes; its chunks are flat

Only headers are parsed here, by hand: a msgpack library hands over a record as one object, and unpacking an array
from it copies its 2.9 GB again. Formats: the msgpack specification; flax.serialization; the streaming checkpoints
of EasyLM, which LWM (arXiv 2402.08268) and LAPA (arXiv 2410.11758) use.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

ARRAY_CODE = 1  # flax's ExtType of an array
CHUNK_MARKER = "__msgpack_chunked_array__"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_TEXT_BYTES = 1024  # of one part of a key, or of a dtype's name
MAX_ITEMS = 4096  # of a key, a shape or a list of chunks

# First byte of a value: its kind and how many bytes its length (or the number itself) takes.
SIZED = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xCC: ("number", 1), 0xCD: ("number", 2), 0xCE: ("number", 4), 0xCF: ("number", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclass(frozen=True)
class StoredArray:
    """One array of the file: its flax path joined by "/", and the (offset, length) in bytes of its parts, in order."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    kind: str  # number | bool | text | bytes | list | map | extension
    value: int  # the number, or how many bytes or items follow
    code: int = 0  # of an extension


class Cursor:
    """A position in the file; nothing is read beyond `end`, be it the file's or that of the enclosing value."""

    def __init__(self, file: BinaryIO, name: str, position: int, end: int):
        self.file, self.name, self.position, self.end = file, name, position, end

    def skip(self, num_bytes: int, what: str) -> int:
        """Move past `num_bytes`; returns where they began. ValueError where they do not fit."""
        start = self.position
        if start + num_bytes > self.end:
            raise ValueError(
                f"{self.name} is truncated or damaged: {what} needs the bytes {start} to {start + num_bytes}, but what "
                f"holds it ends at byte {self.end}: fetch the file again"
            )
        self.position = start + num_bytes
        return start

    def read(self, num_bytes: int, what: str) -> bytes:
        self.file.seek(self.skip(num_bytes, what))
        return self.file.read(num_bytes)

    def header(self, expected: str, *kinds: str) -> Header:
        """The next value's header, which must be of one of `kinds`; `expected` names the value in errors."""
        start = self.position
        first = self.read(1, expected)[0]
        if first <= 0x7F:
            found = Header("number", first)
        elif first <= 0x8F:
            found = Header("map", first & 0x0F)
        elif first <= 0x9F:
            found = Header("list", first & 0x0F)
        elif first <= 0xBF:
            found = Header("text", first & 0x1F)
        elif first in (0xC2, 0xC3):
            found = Header("bool", first & 1)
        elif first in FIXED_EXTENSION:
            found = Header("extension", FIXED_EXTENSION[first], self.read(1, expected)[0])
        elif first in SIZED:
            kind, width = SIZED[first]
            value = int.from_bytes(self.read(width, expected), "big")
            found = Header(kind, value, self.read(1, expected)[0] if kind == "extension" else 0)
        else:
            found = Header(f"a value that starts with {first:#04x}", 0)
        if found.kind not in kinds:
            raise ValueError(
                f"{self.name} at byte {start}: expected {expected} ({' or '.join(kinds)}), found {found.kind}: this is "
                "not a stream of msgpack records as LAPA-7B is published in; give its file `params`"
            )
        return found

    def count(self, expected: str, kind: str) -> int:
        """How many items the next list or map has."""
        count = self.header(expected, kind).value
        if count > MAX_ITEMS:
            raise ValueError(f"{self.name} before byte {self.position}: {expected} has {count} items, that is damage")
        return count

    def text(self, expected: str) -> str:
        length = self.header(expected, "text", "bytes").value
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"{self.name} before byte {self.position}: {expected} has {length} bytes, that is damage")
        return self.read(length, expected).decode(errors="replace")

    def inside(self, length: int, what: str) -> "Cursor":
        """A cursor over the next `length` bytes, which this one moves past."""
        start = self.skip(length, what)
        return Cursor(self.file, self.name, start, start + length)

    def require_end(self, what: str) -> None:
        if self.position != self.end:
            raise ValueError(
                f"{self.name}: {self.end - self.position} bytes too many in {what} at byte {self.position}"
            )


def scan_stream(path: str | Path) -> dict[str, StoredArray]:
    """Every array of the file by key, in the file's order; reads headers only.

    Raises ValueError, naming the byte, for a file that is no such stream, is truncated or holds a key twice.
    """
    path = Path(path)
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty: fetch it again")
    arrays: dict[str, StoredArray] = {}
    with path.open("rb") as file:
        cursor = Cursor(file, str(path), 0, size)
        while cursor.position < size:
            start = cursor.position
            if cursor.count("a record", "list") != 2:
                raise ValueError(
                    f"{path} at byte {start}: a record is a pair of a key and bytes; this is no such stream"
                )
            key = read_key(cursor)
            length = cursor.header(f"the array {key}", "bytes", "text").value
            value = cursor.inside(length, f"the array {key}")
            if key in arrays:
                raise ValueError(f"{path} at byte {start}: the key {key} comes a second time")
            arrays[key] = read_array(value, key)
            value.require_end(f"the array {key}")
    return arrays


def read_key(cursor: Cursor) -> str:
    """A key, a list of names or one name with slashes, as "transformer/wte/embedding"."""
    start = cursor.position
    header = cursor.header("a key", "list", "text", "bytes")
    if header.kind == "list":
        if header.value > MAX_ITEMS:
            raise ValueError(f"{cursor.name} at byte {start}: a key of {header.value} parts, that is damage")
        parts = [cursor.text("a part of a key") for _ in range(header.value)]
    else:
        cursor.position = start
        parts = cursor.text("a key").split("/")
    # EasyLM writes the tree that flax calls "params" as a whole, and the train state one level above that.
    while parts and parts[0] == "params":
        parts = parts[1:]
    return "/".join(parts)


def read_array(cursor: Cursor, key: str) -> StoredArray:
    """Where the array at the cursor lies; the cursor moves past it."""
    start = cursor.position
    header = cursor.header(f"the array {key}", "extension", "map")
    if header.kind == "extension":
        cursor.position = start
        return read_flat_array(cursor, key)
    shape: tuple[int, ...] | None = None
    chunks: list[StoredArray] | None = None
    is_chunked = False
    for _ in range(header.value):
        name = cursor.text(f"a field of the array {key}")
        if name == CHUNK_MARKER:
            is_chunked = bool(cursor.header(f"the mark of the array {key}", "bool").value)
        elif name == "shape":
            shape = tuple(read_numbered(cursor, f"the shape of {key}", lambda: cursor.header("a size", "number").value))
        elif name == "chunks":
            chunks = read_numbered(cursor, f"the chunks of {key}", lambda: read_flat_array(cursor, key))
        else:
            raise ValueError(
                f"{cursor.name} before byte {cursor.position}: {key} is a tree with {name!r}, not an array"
            )
    if not is_chunked or shape is None or not chunks or len({chunk.dtype for chunk in chunks}) != 1:
        raise ValueError(f"{cursor.name} at byte {start}: {key} is neither an array nor a whole chunked one")
    whole = StoredArray(key, shape, chunks[0].dtype, tuple(span for chunk in chunks for span in chunk.spans))
    stored = sum(length for _, length in whole.spans)
    if stored != whole.num_bytes:
        raise ValueError(
            f"{cursor.name} at byte {start}: {key} of shape {shape} needs {whole.num_bytes} bytes, "
            f"its chunks have {stored}"
        )
    return whole


def read_numbered(cursor: Cursor, what: str, read_item) -> list:
    """flax's form of a tuple: a map from "0", "1", ... to its items."""
    items = {}
    for _ in range(cursor.count(what, "map")):
        number = cursor.text(f"a number in {what}")
        items[number] = read_item()
    if set(items) != {str(i) for i in range(len(items))}:
        raise ValueError(f"{cursor.name} before byte {cursor.position}: {what} is numbered {sorted(items)}")
    return [items[str(i)] for i in range(len(items))]


def read_flat_array(cursor: Cursor, key: str) -> StoredArray:
    """An array in one piece: ExtType 1 of [shape, dtype name, bytes]."""
    start = cursor.position
    header = cursor.header(f"the array {key}", "extension")
    if header.code != ARRAY_CODE:
        raise ValueError(
            f"{cursor.name} at byte {start}: {key} is of msgpack type {header.code}, an array is of type 1"
        )
    inside = cursor.inside(header.value, f"the array {key}")
    if inside.count(f"the array {key}", "list") != 3:
        raise ValueError(f"{cursor.name} at byte {start}: {key} is not a triple of shape, dtype and bytes")
    num_dimensions = inside.count(f"the shape of {key}", "list")
    shape = tuple(inside.header(f"the shape of {key}", "number").value for _ in range(num_dimensions))
    dtype = inside.text(f"the dtype of {key}")
    if dtype not in DTYPES:
        raise ValueError(f"{cursor.name} at byte {start}: {key} is of dtype {dtype!r}: known are {sorted(DTYPES)}")
    length = inside.header(f"the numbers of {key}", "bytes", "text").value
    span = inside.skip(length, f"the numbers of {key}"), length
    inside.require_end(f"the array {key}")
    array = StoredArray(key, shape, DTYPES[dtype], (span,))
    if array.num_bytes != length:
        raise ValueError(
            f"{cursor.name} at byte {start}: {key} of shape {shape} needs {array.num_bytes} bytes, it has {length}"
        )
    return array


def read_tensor(file: BinaryIO, array: StoredArray, layer: int | None = None) -> Tensor:
    """The whole array, or `array[layer]`; only those bytes are read, once, into the tensor's own memory."""
    shape = array.shape if layer is None else array.shape[1:]
    num_bytes = math.prod(shape) * array.dtype.itemsize
    first = 0 if layer is None else layer * num_bytes
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    target = memoryview(buffer.numpy())
    part_start = 0
    for offset, length in array.spans:
        begin, end = max(first, part_start), min(first + num_bytes, part_start + length)
        if begin < end:
            file.seek(offset + begin - part_start)
            if file.readinto(target[begin - first : end - first]) != end - begin:  # type: ignore[attr-defined]
                raise ValueError(f"{array.key}: the file became shorter while it was read; fetch it again")
        part_start += length
    return buffer.view(array.dtype).reshape(shape)
