"""Clips with text laid over the picture: subtitles, banners, watermarks.

RapidOCR's detector marks the text in a few full-size frames of the clip; the score is the share of the picture that
it covers, the mean over those frames. Text in the scene counts too: a threshold of a few percent lets labels pass.
"""

from functools import lru_cache

import numpy as np

NUM_PICTURES = 3  # looked at a clip; the detector takes about half a second for each on one core


def reject(scores: dict, options) -> str | None:
    share = scores["text_share"]
    if share is not None and share > options.max_text_share:
        return f"text covers {share:.3f} of the picture, max_text_share is {options.max_text_share}"
    return None


def is_wanted(options) -> bool:
    return options.max_text_share < 1


def text_share(pictures: list[np.ndarray]) -> float:
    """Share of the pictures (H, W, 3) uint8 RGB that detected text covers. Raises ValueError without RapidOCR."""
    import cv2

    shares = []
    for picture in pictures:
        covered = np.zeros(picture.shape[:2], np.uint8)
        found = _detector()(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
        for box in [] if found.boxes is None else found.boxes:
            cv2.fillPoly(covered, [np.round(box).astype(np.int32)], 1)
        shares.append(float(covered.mean()))
    return float(np.mean(shares)) if shares else 0.0


@lru_cache(maxsize=1)
def _detector():
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise ValueError("max_text_share needs the package rapidocr: pip install 'lerobot_policy_lapa[ocr]'") from None
    # Clips are decoded side by side, so each detector gets one thread.
    return RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
