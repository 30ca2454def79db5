"""WebDataset tars: files of one key lie one after the other, `{key}.mp4`, `{key}.json`, `{key}.txt`.

The key is the member's path up to the first dot of its name (webdataset's convention). Clips are decoded from
inside the tar; nothing is unpacked.
"""

import io
import itertools
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from video_data.clips import VIDEO_SUFFIXES, ClipRequest, Rejected
from video_data.sources import sidecar
from video_data.sources.file_range import FileRange
from video_data.sources.walk import walk


def looks_like(root: Path) -> bool:
    if root.suffix == ".tar":
        return root.is_file()
    return any(root.glob("*.tar")) and not any(path for path in walk(root, VIDEO_SUFFIXES))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the tars' paths; ids are "<tar>/<key>". `root` is a tar or a folder of them.

    Captions, licences and sources come from the .txt and .json of the same key; else the source is the tar's name.
    Raises ValueError where there is no tar.
    """
    for tar in tars(root):
        if isinstance(tar, Rejected):
            yield tar
        else:
            yield from list_tar(root, tar, source=Path(tar).stem)


def tars(root: Path) -> Iterator[str | Rejected]:
    """Paths of the tars, relative to `root` (or its own name, absolute, where `root` is one)."""
    if root.is_file():
        yield str(root.resolve())
        return
    found = iter(walk(root, (".tar",)))
    first = next(found, None)
    if first is None:
        raise ValueError(f"no *.tar in {root}: compressed ones (.tar.gz) must be unpacked to .tar first")
    yield from itertools.chain([first], found)


def list_tar(root: Path, tar: str, source: str) -> Iterator[ClipRequest | Rejected]:
    """The clips of one tar. A tar that is cut off yields those before the cut, then one Rejected for itself."""
    key: str | None = None
    videos: list[str] = []
    beside: dict[str, bytes] = {}
    try:
        size = (root / tar).stat().st_size
        with tarfile.open(root / tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                member_key, suffix = _key(member.name)
                if key is not None and member_key != key:
                    yield from _clips(tar, key, videos, beside, source)
                    videos, beside = [], {}
                key = member_key
                if member.offset_data + member.size > size:
                    yield Rejected(f"{tar}/{member.name}", f"{tar}#{member.name}", "cut off with the tar it lies in")
                elif suffix in (".txt", ".json"):
                    contents = archive.extractfile(member)
                    beside[suffix] = contents.read() if contents else b""
                elif suffix.endswith(VIDEO_SUFFIXES):
                    videos.append(member.name)
            if key is not None:
                yield from _clips(tar, key, videos, beside, source)
    except (tarfile.TarError, OSError) as error:
        if key is not None:
            yield from _clips(tar, key, videos, beside, source)
        yield Rejected(tar, tar, f"the tar cannot be read to its end: {error}")


def _key(name: str) -> tuple[str, str]:
    """("a/b", ".mp4") of a/b.mp4."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _clips(
    tar: str, key: str, videos: list[str], beside: dict[str, bytes], source: str
) -> Iterator[ClipRequest | Rejected]:
    stated = {"source": source} | sidecar.fields(beside)
    for name in videos:
        # A key may hold several cameras: 0001.left.mp4, 0001.right.mp4.
        clip = f"{tar}/{key}" if len(videos) == 1 else f"{tar}/{name}"
        yield ClipRequest(clip, f"{tar}#{name}", **stated)


def open_member(tar: Path, name: str) -> BinaryIO:
    """A member's bytes as a seekable file. Raises OSError or ValueError where there is none."""
    status = tar.stat()
    member = _index(tar, status.st_size, status.st_mtime_ns).get(name)
    if member is None:
        raise ValueError(f"{tar} has no member {name!r}")
    return io.BufferedReader(FileRange(tar, *member), 1 << 16)


# Requests of one tar come one after the other, so its headers are read once and not once a clip.
@lru_cache(maxsize=4)
def _index(tar: Path, size: int, changed_ns: int) -> dict[str, tuple[int, int]]:
    """{member: (first byte, bytes)}"""
    index = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile() and member.offset_data + member.size <= size:
                    index[member.name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not index:
            raise ValueError(f"{tar} is no tar: {error}") from None
    return index
