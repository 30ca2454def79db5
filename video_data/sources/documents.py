"""JSON files: whole, or one pair at a time."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str) -> Any:
    """The document in `text`. Raises ValueError for other text, also where it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """The document in `path`. Raises ValueError, with the path, where it is not JSON in UTF-8."""
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from None


def iterate_object(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of the JSON object in `path`, one at a time: the captions of a million videos take gigabytes.

    Raises ValueError where the file holds no JSON object in UTF-8, or not the whole of it.
    """
    decoder = json.JSONDecoder()

    def behind_space(position: int) -> int:
        match = SPACE.match(buffer, position)
        return match.end() if match else position

    with path.open(encoding="utf-8") as file:
        buffer = file.read(BLOCK)
        position = behind_space(0)
        if buffer[position : position + 1] != "{":
            raise ValueError(f"{path} holds no JSON object")
        position += 1
        while True:
            try:
                at = behind_space(position)
                if buffer[at] == "}":
                    return
                key, at = decoder.raw_decode(buffer, at)
                value, at = decoder.raw_decode(buffer, behind_space(buffer.index(":", at) + 1))
                # A value is whole when what follows it is there: a number may go on in the next block.
                at = behind_space(at)
                closing = buffer[at]
            except (ValueError, IndexError):
                block = file.read(max(BLOCK, len(buffer) - position))
                if not block:
                    raise ValueError(f"{path} breaks off or is damaged: it is no whole JSON object") from None
                buffer, position = buffer[position:] + block, 0
                continue
            yield key, value
            if closing == "}":
                return
            position = at + 1
