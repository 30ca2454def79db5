"""The files below a folder, one at a time, in the order of their paths; what cannot be read is named, never raised."""

import os
from collections.abc import Iterator
from pathlib import Path

from video_data.clips import Rejected


def walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str | Rejected]:
    """Paths relative to `root`, with forward slashes, of the files that end in one of `suffixes` (lower case).

    Links to folders are followed, except into a folder that the link lies in. Rejected: whatever bears such a
    suffix and is no readable file, and folders that cannot be listed.
    """
    yield from _walk(root, "", suffixes, {_identity(root)})


def _walk(folder: Path, prefix: str, suffixes: tuple[str, ...], above: set) -> Iterator[str | Rejected]:
    try:
        with os.scandir(folder) as entries:
            # Folders sort as "name/", which makes the order of the walk that of the paths as text.
            found = sorted((entry.name + "/" * _is_folder(entry), entry.path) for entry in entries)
    except OSError as error:
        yield _rejected(prefix.rstrip("/") or ".", f"the folder cannot be listed: {error.strerror}")
        return
    for name, location in found:
        path, entry = prefix + name, Path(location)
        is_video = entry.name.lower().endswith(suffixes)
        if name.endswith("/"):
            if is_video:
                yield _rejected(path.rstrip("/"), "a folder, not a file")
            try:
                identity = _identity(entry)
            except OSError as error:
                yield _rejected(path.rstrip("/"), f"cannot be looked at: {error.strerror}")
                continue
            if identity in above:
                yield _rejected(path.rstrip("/"), "a link to a folder that it lies in")
            else:
                yield from _walk(entry, path, suffixes, above | {identity})
        elif is_video:
            reason = _why_no_file(entry)
            yield path if reason is None else _rejected(path, reason)


def _why_no_file(entry: Path) -> str | None:
    try:
        if entry.is_file():
            return None
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    return "a link that leads to no file" if entry.is_symlink() else "neither a file nor a folder"


def _is_folder(entry: os.DirEntry) -> bool:
    # Only pathlib answers no to a link that leads to itself; the entry alone needs no look at the disk.
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _rejected(path: str, reason: str) -> Rejected:
    return Rejected(path, path, reason)
