"""Something-Something V2: `20bn-something-something-v2/<id>.webm`, captions in train.json, validation.json, test.json.

The lists lie in the folder or in its `labels/`, and older copies call them something-something-v2-<split>.json.
Items are {"id", "label", "template", "placeholders"}; those of the test list have an id alone.
"""

from collections.abc import Iterator
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources.documents import read_json

VIDEOS = "20bn-something-something-v2"
SPLITS = ("train", "validation", "test")
SOURCE = "something_something_v2"


def looks_like(root: Path) -> bool:
    return (root / VIDEOS).is_dir()


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the lists; the caption is the label. Raises ValueError where there is no list."""
    lists = [(split, found) for split in SPLITS if (found := _find(root, split))]
    if not lists:
        raise ValueError(
            f"no train.json or validation.json in {root} or {root / 'labels'}: "
            f"{root} holds {sorted(entry.name for entry in root.iterdir())[:8]}"
        )
    for split, found in lists:
        for item in read_json(found):
            if not isinstance(item, dict) or "id" not in item:
                raise ValueError(f"{found} must list objects with the key 'id', and holds {str(item)[:80]}")
            name, label = str(item["id"]), str(item.get("label") or "")
            video = f"{VIDEOS}/{name}.webm"
            if not (root / video).is_file():
                yield Rejected(name, video, f"no file {root / video}")
                continue
            yield ClipRequest(
                name,
                video,
                caption=label,
                caption_origin="label" if label else "none",
                source=SOURCE,
                split=split,
            )


def _find(root: Path, split: str) -> Path | None:
    for folder in (root, root / "labels"):
        for name in (f"{split}.json", f"something-something-v2-{split}.json"):
            if (folder / name).is_file():
                return folder / name
    return None
