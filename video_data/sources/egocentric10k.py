"""Egocentric-10K: WebDataset tars `factory_001/workers/worker_001/factory001_worker001_part00.tar`, no captions.

The source of a clip is its factory, so that a split can hold out whole factories.
"""

from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import webdataset

TARS = "factory_*/workers/worker_*/*.tar"


def looks_like(root: Path) -> bool:
    return any(root.glob(TARS))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of factory, worker and tar. Raises ValueError where no tar lies where it should."""
    tars = sorted(path.relative_to(root).as_posix() for path in root.glob(TARS))
    if not tars:
        raise ValueError(f"no {TARS} in {root}: it holds {sorted(entry.name for entry in root.iterdir())[:8]}")
    for tar in tars:
        yield from webdataset.list_tar(root, tar, source=tar.split("/")[0])
