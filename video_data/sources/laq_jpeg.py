"""Folders of numbered images, as the released LAPA code reads them: `<root>/<clip>/img_00001.jpg`.

Any word before the number will do, JPEG or PNG; the frames are in the order of their numbers. A clip's folder may
lie deeper, and the folder it lies in is its source. The frame rate is the option `image_fps`.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from video_data.clips import ClipRequest, Rejected
from video_data.sources import sidecar
from video_data.sources.walk import walk

SUFFIXES = (".jpg", ".jpeg", ".png")
NUMBERED_IMAGE = re.compile(r"\D*(\d+)\.(jpe?g|png)", re.IGNORECASE)


def looks_like(root: Path) -> bool:
    # A few folders tell; a corpus may have millions.
    folders = itertools.islice(root.glob("*/"), 8)
    return any(any(folder.glob("img_*.jpg")) for folder in folders)


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of their folders' paths, which are their ids. options: image_fps.

    A caption is taken from `<clip>.txt` or `<clip>.json` beside the folder. Raises ValueError where no folder
    holds an image.
    """
    images = (path for path in walk(root, SUFFIXES) if isinstance(path, str) and "/" in path)
    found = False
    # The walk lists a folder's files side by side, but a folder within it may lie between them.
    seen: set[str] = set()
    for folder, files in itertools.groupby(images, key=lambda path: path.rpartition("/")[0]):
        if folder in seen:
            continue
        seen.add(folder)
        found = True
        first = next(files).rpartition("/")[2]
        if not NUMBERED_IMAGE.fullmatch(first):
            yield Rejected(folder, folder, f"its images are not numbered: expected names as img_00001.jpg, got {first}")
            continue
        source = folder.rpartition("/")[0] or root.resolve().name
        # A folder's name may hold a dot, so the caption's suffix is added and replaces nothing.
        stem = (root / folder).with_name(f"{Path(folder).name}.x")
        beside: dict[str, Any] = {"source": source} | sidecar.beside(stem)
        yield ClipRequest(folder, folder, fps=options.image_fps, **beside)
    if not found:
        raise ValueError(f"no */*{{{','.join(SUFFIXES)}}} in {root}: expected a folder of numbered images a clip")


def numbered_images(folder: Path) -> list[Path]:
    """The images of `folder` whose names are a word and a number, by number."""
    numbers = {file: match for file in folder.iterdir() if (match := NUMBERED_IMAGE.fullmatch(file.name))}
    return sorted(numbers, key=lambda file: (int(numbers[file].group(1)), file.name))
