"""From a request to what a decoder opens: a file, a range of an archive's bytes, or single images."""

import contextlib
import stat
from pathlib import Path
from typing import BinaryIO

from video_data.clips import ClipRequest
from video_data.sources import laq_jpeg, rlds, webdataset
from video_data.sources.located import status


def open_media(request: ClipRequest, root: Path = Path()) -> Path | BinaryIO | list[Path] | list[BinaryIO]:
    """The media of `request`: a path, a seekable file of bytes (close it), or one item a frame.

    Each of them, and each item of a list, is what `av.open` takes (a path as text). A list has `request.fps`
    frames/s. Raises OSError or ValueError, with the reason, where there is no such media.
    """
    location = root / request.video
    there = status(location)
    if there and stat.S_ISDIR(there.st_mode):
        return laq_jpeg.numbered_images(location)
    if there and stat.S_ISREG(there.st_mode):
        # A file that may not be read is found out here, and not by each of those who read it.
        location.open("rb").close()
        return location
    tar, mark, member = request.video.partition(".tar#")
    if mark:
        return webdataset.open_member(root / f"{tar}.tar", member)
    records, mark, offset = request.video.rpartition("#")
    if mark and offset.isdigit() and request.episode:
        return list(rlds.open_images(root / records, int(offset), request.episode["camera"]))
    # Some names are not to be had for another reason, which this raises.
    with contextlib.suppress(FileNotFoundError):
        location.stat()
    raise FileNotFoundError(2, "no such file", str(location))
