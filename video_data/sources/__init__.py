"""Where clips come from: one module a layout, each with `list_clips(root, options)` and `looks_like(root)`.

A layout only lists; what it lists is opened by `open_media`. A new layout is a file beside these and a line in
`LAYOUTS`. docs/video_data.md says what each one looks for.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from video_data.captions.text import clean_caption
from video_data.clips import ClipRequest, Rejected
from video_data.sources import (
    ego4d,
    egocentric10k,
    epic_kitchens_100,
    folder,
    howto100m,
    laq_jpeg,
    lerobot,
    panda70m,
    rlds,
    something_something_v2,
    table,
    webdataset,
    webvid,
)
from video_data.sources.media import open_media

__all__ = ["LAYOUTS", "detect_layout", "list_requests", "open_media"]

LAYOUTS: dict[str, ModuleType] = {
    "folder": folder,
    "table": table,
    "something_something_v2": something_something_v2,
    "ego4d": ego4d,
    "epic_kitchens_100": epic_kitchens_100,
    "howto100m": howto100m,
    "webdataset": webdataset,
    "webvid": webvid,
    "panda70m": panda70m,
    "egocentric10k": egocentric10k,
    "lerobot": lerobot,
    "laq_jpeg": laq_jpeg,
    "rlds": rlds,
}


def list_requests(layout: str, root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Every clip that `root` offers, in an order that depends on its contents alone, with an id of its own each.

    layout: a name of LAYOUTS, or "auto". options: the fields of IngestConfig that the layout names, and licence.
    Captions come cleaned; a repeated id is Rejected, and so is what cannot be requested. Raises ValueError for
    wrong options, where `root` does not hold what the layout looks for, and at the end where no clip was listed.
    """
    if layout == "auto":
        layout = detect_layout(root)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected auto or one of {', '.join(LAYOUTS)}")
    if options.captions and layout != "folder":
        raise ValueError(
            f"captions is {options.captions}, which layout {layout} does not read: leave it out, or set layout=folder"
        )
    if not root.exists():
        raise ValueError(f"no folder {root}: path must name what layout {layout} lies in")
    seen: set[str] = set()
    num_rejected, first = 0, None
    for position, entry in enumerate(LAYOUTS[layout].list_clips(root, options)):
        if not (_is_text(entry.id) and _is_text(entry.video)):
            entry = Rejected(_as_text(entry.id), _as_text(entry.video), "its name is not UTF-8: rename it")
        if entry.id in seen:
            repeated = f"the id {entry.id!r} was listed before: its first clip counts"
            reason = entry.reason if isinstance(entry, Rejected) else repeated
            entry = Rejected(f"{entry.id} (row {position + 1})", entry.video, reason)
        seen.add(entry.id)
        if isinstance(entry, Rejected):
            num_rejected, first = num_rejected + 1, first or entry
            yield entry
        else:
            caption = clean_caption(entry.caption)
            yield dataclasses.replace(
                entry,
                caption=caption,
                caption_origin=entry.caption_origin if caption or entry.caption_origin == "unreadable" else "none",
                # Few different texts for many clips: one object each.
                source=sys.intern(_as_text(entry.source)),
                licence=sys.intern(_as_text(entry.licence or options.licence)),
                split=sys.intern(_as_text(entry.split)),
                url=_as_text(entry.url),
            )
    if first is not None and num_rejected == len(seen):
        raise ValueError(
            f"none of the {num_rejected} clips listed in {root} is there; the first, {first.id}: {first.reason}; "
            f"{_what_is_there(root / first.video)}"
        )


def detect_layout(root: Path) -> str:
    """The layout that `root` is in, told by files that only that layout has; else "folder".

    Raises ValueError where several fit: then the option `layout` has to say.
    """
    fitting = [name for name, module in LAYOUTS.items() if name != "folder" and module.looks_like(root)]
    if len(fitting) > 1:
        raise ValueError(f"{root} may be {' or '.join(fitting)}: set layout to one of them")
    return fitting[0] if fitting else "folder"


def _is_text(name: str) -> bool:
    """Whether `name` can be written as UTF-8: names of files and archives may hold bytes that are no text."""
    return _as_text(name) == name


def _as_text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _what_is_there(looked_for: Path) -> str:
    """What the nearest folder that exists holds, for a message about one that does not."""
    there = next(folder for folder in looked_for.parents if folder.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in there.iterdir())
    return f"{there} holds {', '.join(names[:8]) or 'nothing'}" + (f" and {len(names) - 8} more" * (len(names) > 8))
