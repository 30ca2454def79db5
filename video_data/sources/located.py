"""Rows that name a file, a URL or both: the file where it lies, else one that was downloaded."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from video_data.clips import VIDEO_SUFFIXES, ClipRequest, Rejected
from video_data.sources.download import fetch, licence_of


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is an answer, not an error."""
    try:
        return path.is_file()
    except OSError:
        return False


def status(path: Path) -> os.stat_result | None:
    """What the system says of `path`; None where nothing is there, or its name (of a tar's member) cannot be."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def find_video(folder: Path, stem: str) -> Path | None:
    """`<folder>/<stem>` with the suffix of a video, in lower or upper case; None where there is none."""
    for suffix in VIDEO_SUFFIXES:
        for written in (suffix, suffix.upper()):
            if is_file(folder / f"{stem}{written}"):
                return folder / f"{stem}{written}"
    return None


def fetch_missing(
    listed: Callable[[], Iterator[ClipRequest | Rejected]], root: Path, options
) -> Iterator[ClipRequest | Rejected]:
    """What `listed()` lists, with the video of a request replaced by its download where the file is missing.

    `listed` is called twice: first for the URLs, then for the clips. options: download_dir, attempts, num_workers.
    Without download_dir, or where a download failed, a request without its file is Rejected.
    """
    fetched: dict[str, Path | str] = {}
    if options.download_dir:
        wanted = (r.url for r in listed() if isinstance(r, ClipRequest) and r.url and not _is_there(root, r))
        folder = Path(options.download_dir).expanduser().resolve()
        fetched = fetch(wanted, folder, options.attempts, options.num_workers)
    for request in listed():
        if isinstance(request, Rejected) or _is_there(root, request):
            yield request
            continue
        result = fetched.get(request.url)
        if isinstance(result, Path):
            licence = request.licence or licence_of(result)
            yield dataclasses.replace(request, video=str(result), licence=licence)
        elif result:
            yield Rejected(request.id, request.url, result)
        elif request.url:
            looked_for = f"no file {root / request.video}" if request.video else "it has a URL and no file"
            yield Rejected(request.id, request.video or request.url, f"{looked_for}: set download_dir to download it")
        else:
            yield Rejected(request.id, request.video, f"no file {root / request.video}")


def _is_there(root: Path, request: ClipRequest) -> bool:
    return bool(request.video) and is_file(root / request.video)
