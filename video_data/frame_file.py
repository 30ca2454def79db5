"""A large file that grows at its end, written past the system's cache.

The frames of a corpus are many times larger than memory. Through the cache each page of them would be taken, copied,
written back later and push out another, which costs more than scaling the frames did; and nobody reads them soon.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 4096  # what the disk is addressed in
BUFFER_BYTES = 4 << 20
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it; elsewhere the file is written through the cache


class FrameFile:
    """`path`, cut to `size` bytes and open at its end; a context manager.

    Other readers see what was appended after `flush`, and up to a block of zeros behind it until `close`.
    """

    def __init__(self, path: Path, size: int):
        flags = os.O_RDWR | os.O_CREAT
        try:
            self._file = os.open(path, flags | DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without it, as those in memory are
                raise
            self._file = os.open(path, flags, 0o644)
        if os.fstat(self._file).st_size != size:
            os.ftruncate(self._file, size)
        self.size, self._is_closed = size, False
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # begins at a page, as writing past the cache needs
        self._view = memoryview(self._buffer)
        self._num_waiting = size % BLOCK_BYTES  # bytes in the buffer: the last block, where it is not full, and behind
        with path.open("rb") as file:
            file.seek(size - self._num_waiting)
            file.readinto(self._view[: self._num_waiting])

    def __enter__(self) -> "FrameFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def is_direct(self) -> bool:
        """Whether the file system lets it write past the cache, so far."""
        return bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & DIRECT)

    def append(self, file: BinaryIO, num_bytes: int) -> int:
        """Append `num_bytes` from where `file` stands; returns how many it lacks."""
        while num_bytes:
            room = self._view[self._num_waiting : self._num_waiting + num_bytes]
            num_read = file.readinto(room)  # type: ignore[attr-defined]
            if not num_read:
                break
            self._num_waiting += num_read
            self.size += num_read
            num_bytes -= num_read
            if self._num_waiting == BUFFER_BYTES:
                self.flush()
        return num_bytes

    def flush(self) -> None:
        """Write what waits. A block that is not full is written with zeros, and again when there is more of it."""
        num_whole = self._num_waiting - self._num_waiting % BLOCK_BYTES
        rest = self._num_waiting - num_whole
        behind = num_whole + (BLOCK_BYTES if rest else 0)
        self._view[self._num_waiting : behind] = bytes(behind - self._num_waiting)
        self._write(self._view[:behind], self.size - self._num_waiting)
        self._view[:rest] = self._view[num_whole : num_whole + rest]
        self._num_waiting = rest

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self._file, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.is_direct:
                    raise
                # Some file systems take the flag and refuse what it means; others have larger blocks.
                fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~DIRECT)
                continue
            view, offset = view[written:], offset + written

    def close(self) -> None:
        """Write what waits and cut the file behind it; nothing where that was done."""
        if self._is_closed:
            return
        try:
            self.flush()
            os.ftruncate(self._file, self.size)
        finally:
            os.close(self._file)
            self._is_closed = True
