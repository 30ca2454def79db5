"""The record reader against published checksums and against messages written byte by byte."""

import struct

import numpy as np
import pytest

from tests.video_data.layouts import example, field, record, varint
from video_data.sources.tfrecord import (
    bytes_values,
    crc32c,
    int_values,
    masked_crc,
    parse_example,
    read_record,
    record_offsets,
)


# RFC 3720, appendix B.4, and the check value of the CRC catalogue.
@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_checksums_are_those_that_are_published(data, checksum):
    assert crc32c(data) == checksum


@pytest.mark.parametrize("size", [1023, 1024, 1025, 5000, 40961])
def test_joined_lanes_give_the_checksum_of_the_whole(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_features_of_every_kind_are_told_apart():
    features = parse_example(
        example({"text": [b"a", b"", b"\xff" * 300], "step": [0, 127, 128, -1, 2**62], "reward": [0.5, 1.5]})
    )
    assert features.keys() == {"text", "step", "reward"}
    assert [bytes(value) for value in bytes_values(features["text"])] == [b"a", b"", b"\xff" * 300]
    assert int_values(features["step"]) == [0, 127, 128, -1, 2**62]
    assert bytes_values(features["reward"]) == int_values(features["text"]) == []


def test_numbers_that_are_not_packed_and_unknown_fields_are_read_too():
    unpacked = b"".join(varint(1 << 3) + varint(number) for number in (5, 600))
    unknown = varint(9 << 3 | 5) + bytes(4) + varint(8 << 3 | 1) + bytes(8) + varint(7 << 3) + varint(300)
    entry = field(1, b"step") + field(2, field(3, unpacked))
    assert int_values(parse_example(unknown + field(1, field(1, entry)))["step"]) == [5, 600]


@pytest.mark.parametrize("data", [b"\x0a\xff", b"\x0b", b"\x0f\x01", b"\x80" * 11])
def test_other_messages_are_errors(data):
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        parse_example(data)


def test_records_are_found_and_checked(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(record(b"first") + record(b"") + record(b"third" * 1000))
    offsets = list(record_offsets(path))
    assert [read_record(path, offset) for offset in offsets] == [b"first", b"", b"third" * 1000]
    assert struct.unpack("<I", path.read_bytes()[17:21])[0] == masked_crc(b"first")
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"the record at byte {offsets[2]} .* checksum does not match"):
        read_record(path, offsets[2])
    with pytest.raises(ValueError, match="checksum of its length"):
        read_record(path, 3)
    path.write_bytes(damaged[:-1])
    with pytest.raises(ValueError, match="cut off"):
        list(record_offsets(path))
