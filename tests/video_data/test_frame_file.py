"""A file written past the cache holds what was appended, in any pieces, on any file system."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest

from video_data import frame_file
from video_data.frame_file import BLOCK_BYTES, FrameFile


def noise(num_bytes: int) -> bytes:
    return np.random.default_rng(num_bytes).bytes(num_bytes)


@pytest.mark.parametrize("piece", [768, BLOCK_BYTES, 10_000, 300_000])
def test_pieces_follow_each_other_however_often_they_are_written(tmp_path, piece, monkeypatch):
    monkeypatch.setattr(frame_file, "BUFFER_BYTES", 16 * BLOCK_BYTES)
    path, expected = tmp_path / "frames.u8", b""
    for run in range(3):
        with FrameFile(path, len(expected)) as file:
            for number in range(7):
                data = noise(piece + run)
                assert file.append(io.BytesIO(data), len(data)) == 0
                expected += data
                if number % 3 == 0:
                    file.flush()
                    assert path.read_bytes()[: len(expected)] == expected
        assert path.read_bytes() == expected


def test_what_lies_behind_the_size_is_cut_away(tmp_path):
    path = tmp_path / "frames.u8"
    path.write_bytes(noise(9000))
    with FrameFile(path, 5000) as file:
        assert file.append(io.BytesIO(b"short"), 8) == 3
        assert file.size == 5005
    assert path.read_bytes() == noise(9000)[:5000] + b"short"


def test_a_file_system_that_refuses_is_written_through_the_cache(tmp_path, monkeypatch):
    write, refused = os.pwrite, []

    def pwrite(file: int, data, offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with FrameFile(tmp_path / "frames.u8", 0) as file:
        if not file.is_direct:
            pytest.skip("this file system is always written through the cache")
        file.append(io.BytesIO(noise(5000)), 5000)
    assert (tmp_path / "frames.u8").read_bytes() == noise(5000)
    assert refused


def test_a_full_disk_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        file = FrameFile(Path("/dev/full"), 0)
        file.append(io.BytesIO(noise(5000)), 5000)
        file.flush()
