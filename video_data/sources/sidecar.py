"""Captions and licences that lie beside a clip: `<stem>.txt` and `<stem>.json`, as files or in an archive."""

from pathlib import Path
from typing import Any

from video_data.captions.text import decode_text
from video_data.sources.documents import parse_json

# What the tools that write such files call it.
JSON_KEYS = {
    "caption": ("caption", "text", "label", "title"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "url": ("url", "source_url"),
    "split": ("split",),
}


def beside(video: Path) -> dict[str, Any]:
    """What the files beside `video` say: fields of a ClipRequest, caption and caption_origin always among them."""
    found = {suffix: video.with_suffix(suffix) for suffix in (".txt", ".json")}
    try:
        return fields({suffix: file.read_bytes() for suffix, file in found.items() if file.is_file()})
    except OSError:
        return {"caption": "", "caption_origin": "unreadable"}


def fields(contents: dict[str, bytes]) -> dict[str, Any]:
    """The same from the files' bytes, by suffix. A text file comes before the caption in a JSON file.

    What is no text, or no JSON object, leaves the clip without a caption, of the origin "unreadable".
    """
    found: dict[str, Any] = {}
    unreadable = False
    if ".json" in contents:
        try:
            found = _from_json(parse_json(decode_text(contents[".json"])))
        except ValueError:
            unreadable = True
    if ".txt" in contents:
        try:
            found["caption"] = decode_text(contents[".txt"]).strip() or found.get("caption", "")
        except ValueError:
            unreadable = True
    caption = found.pop("caption", "")
    return found | {"caption": caption, "caption_origin": _origin(caption, unreadable)}


def _origin(caption: str, unreadable: bool) -> str:
    if caption:
        return "sidecar"
    return "unreadable" if unreadable else "none"


def _from_json(document) -> dict[str, str]:
    if not isinstance(document, dict):
        raise ValueError("the file holds no JSON object")
    found = {}
    for field, keys in JSON_KEYS.items():
        value = next((document[key] for key in keys if isinstance(document.get(key), str) and document[key]), None)
        if value is not None:
            found[field] = value.strip()
    return found
