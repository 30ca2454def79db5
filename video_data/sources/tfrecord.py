"""TFRecord files and the tf.train.Example in them, read without TensorFlow.

A record (tensorflow/core/lib/io/record_writer.h) is

    uint64 length | uint32 masked CRC-32C of the length | data | uint32 masked CRC-32C of the data

in little endian, with masked(c) = rotate_right(c, 15) + 0xa282ead8. The data is a protocol buffer
(tensorflow/core/example/{example,feature}.proto):

    Example { Features features = 1 }            Feature { oneof { BytesList bytes_list = 1
    Features { map<string, Feature> feature = 1 }                  FloatList float_list = 2
    *List { repeated value = 1 }                                   Int64List int64_list = 3 } }
"""

import mmap
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

HEADER_BYTES, FOOTER_BYTES = 12, 4
POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
LANE_BYTES = 1024


def record_offsets(path: Path) -> Iterator[int]:
    """The first byte of every record. Raises ValueError where the file is cut off or its lengths are damaged."""
    size = path.stat().st_size
    position = 0
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            length = _length(file.read(HEADER_BYTES), path, position)
            end = position + HEADER_BYTES + length + FOOTER_BYTES
            if end > size:
                raise ValueError(f"{path} is cut off: the record at byte {position} ends at {end} of {size}")
            yield position
            position = end


def read_record(path: Path, offset: int) -> bytes:
    """The data of the record at byte `offset`. Raises ValueError where it does not match its checksum."""
    with path.open("rb") as file:
        file.seek(offset)
        length = _length(file.read(HEADER_BYTES), path, offset)
        data, footer = file.read(length), file.read(FOOTER_BYTES)
    if len(data) < length or len(footer) < FOOTER_BYTES:
        raise ValueError(f"{path} is cut off in the record at byte {offset}")
    if struct.unpack("<I", footer)[0] != masked_crc(data):
        raise ValueError(f"the record at byte {offset} of {path} is damaged: its checksum does not match")
    return data


def map_record(path: Path, offset: int) -> memoryview:
    """The data of the record at byte `offset` in a memory map: what is not looked at is not read, nor checked."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = _length(mapped[offset : offset + HEADER_BYTES], path, offset)
    start = offset + HEADER_BYTES
    return memoryview(mapped)[start : start + length]


def _length(header: bytes, path: Path, offset: int) -> int:
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path} is cut off in the record at byte {offset}")
    length, checksum = struct.unpack("<QI", header)
    if checksum != masked_crc(header[:8]):
        raise ValueError(f"the record at byte {offset} of {path} is damaged: the checksum of its length does not match")
    return length


def parse_example(data: bytes | memoryview) -> dict[str, memoryview]:
    """{name: Feature, still encoded} of a tf.train.Example. Raises ValueError for other data."""
    features: dict[str, memoryview] = {}
    for _, message in _fields(memoryview(data), {1}):
        for _, entry in _fields(message, {1}):
            pair = dict(_fields(entry, {1, 2}))
            if 1 in pair and 2 in pair:
                features[bytes(pair[1]).decode()] = pair[2]
    return features


def bytes_values(feature: memoryview) -> list[memoryview]:
    """The values of a bytes_list; empty for a feature of another kind."""
    return [value for _, values in _fields(feature, {1}) for _, value in _fields(values, {1})]


def int_values(feature: memoryview) -> list[int]:
    """The values of an int64_list, packed or not; empty for a feature of another kind."""
    found = []
    for _, values in _fields(feature, {3}):
        for _, value in _fields(values, {1}, varints=True):
            if isinstance(value, int):
                found.append(value)
                continue
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                found.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in found]


def _fields(message: memoryview, wanted: set[int], varints: bool = False) -> Iterator[tuple[int, memoryview]]:
    """(number, value) of the length-delimited fields in `wanted`, and with `varints` of the numbers among them."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            if varints and number in wanted:
                yield number, value  # type: ignore[misc]
            continue
        length = {1: 8, 5: 4}.get(wire_type)
        if wire_type == 2:
            length, position = _varint(message, position)
        if length is None or position + length > len(message):
            raise ValueError("the record is no tf.train.Example")
        if wire_type == 2 and number in wanted:
            yield number, message[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A base-128 number and the position behind it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("the record is no tf.train.Example")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def masked_crc(data: bytes) -> int:
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`: lanes of 1024 bytes side by side, then joined.

    The CRC is linear over GF(2): the remainder of A followed by n bytes is a fixed matrix times the remainder of A,
    so a lane's own remainder (from zero) is added to that of what lies before it, moved on by one lane.
    """
    table = _table()
    crc = 0xFFFFFFFF
    head = len(data) % LANE_BYTES
    for byte in data[:head]:
        crc = int(table[(crc ^ byte) & 0xFF]) ^ crc >> 8
    lanes = np.frombuffer(data, np.uint8, offset=head).reshape(-1, LANE_BYTES).T.astype(np.uint32, order="C")
    remainders = np.zeros(lanes.shape[1], np.uint32)
    for row in lanes:
        remainders = table[(remainders ^ row) & 0xFF] ^ remainders >> 8
    first, second, third, fourth = _past_one_lane()
    for remainder in remainders.tolist():
        moved = first[crc & 0xFF] ^ second[crc >> 8 & 0xFF] ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24]
        crc = moved ^ remainder
    return crc ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """(256,) uint32: the remainder of every byte."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


@lru_cache(maxsize=1)
def _past_one_lane() -> list[list[int]]:
    """Four tables of 256: what a lane of zeros makes of each byte of the remainder before it."""
    table = _table()
    values = (np.arange(256, dtype=np.uint32)[None] << np.arange(0, 32, 8, dtype=np.uint32)[:, None]).astype(np.uint32)
    for _ in range(LANE_BYTES):
        values = table[values & 0xFF] ^ values >> 8
    return values.tolist()
