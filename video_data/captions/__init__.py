"""Who writes captions: the data set, or a model that looks at the clip. A new writer is a file and a line here."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from video_data.clips import ClipRequest


class Captioner(Protocol):
    """Frames of a clip (T, H, W, 3) uint8 and its request to (caption, caption_origin)."""

    def caption(self, frames: np.ndarray, request: ClipRequest) -> tuple[str, str]: ...

    def caption_batch(self, frames: Sequence[np.ndarray], requests: Sequence[ClipRequest]) -> list[tuple[str, str]]: ...


class GivenCaptions:
    """The caption that came with the clip."""

    def caption(self, frames: np.ndarray, request: ClipRequest) -> tuple[str, str]:
        return request.caption, request.caption_origin

    def caption_batch(self, frames: Sequence[np.ndarray], requests: Sequence[ClipRequest]) -> list[tuple[str, str]]:
        return [(request.caption, request.caption_origin) for request in requests]


def captioner(options) -> Captioner:
    """The writer that `options.name` names (see `Captioner` in lapa/schema.py for the other options).

    Raises ValueError for another name, and where a model is needed and none is given.
    """
    if options.name == "given":
        return GivenCaptions()
    if options.name == "vlm":
        # Imported here, because it brings torch and transformers.
        from video_data.captions.vision_language_model import VisionLanguageCaptioner

        return VisionLanguageCaptioner(options)
    if options.name == "realigner":
        from video_data.captions.realigner import RealigningCaptioner

        return RealigningCaptioner(options)
    raise ValueError(f"captioner.name is {options.name!r}, expected given or vlm or realigner")
