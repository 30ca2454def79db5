"""Raw frames of a clip on their way from the process that decodes it to the one that writes the frame store.

They go through files of a folder, because a clip may be longer than memory. A file that was read is written over by
another clip: its pages are in memory already, and taking and freeing pages can cost more than scaling what fills them.
"""

from pathlib import Path
from typing import BinaryIO

SPARE = "spare-"
MAX_SPARES = 64
MAX_SPARE_BYTES = 32 << 20  # a longer clip's file is removed, so that the spare ones stay small beside the frame store


def create_part(part: Path) -> BinaryIO:
    """The file `part`, unbuffered and to be written from its beginning; truncate it behind what was written."""
    for spare in part.parent.glob(f"{SPARE}*"):
        try:
            spare.rename(part)
        except FileNotFoundError:  # another process took it
            continue
        break
    else:
        part.touch()
    return part.open("r+b", buffering=0)


def release_part(part: Path) -> None:
    """What is in `part` is needed no more."""
    spares = sum(1 for _ in part.parent.glob(f"{SPARE}*"))
    if spares < MAX_SPARES and part.stat().st_size <= MAX_SPARE_BYTES:
        part.rename(part.with_name(f"{SPARE}{part.name}"))
    else:
        part.unlink()
