"""Clips that are black for much of their time: title cards, fades, a covered lens."""

import numpy as np

DARK = 20.0  # grey levels of 255: video black is 16 before its range is expanded, and cameras add some noise


def dark_share(brightness: np.ndarray) -> float:
    """Share of the samples (K,) that are darker than `DARK`."""
    return float((brightness < DARK).mean())


def reject(scores: dict, options) -> str | None:
    share = scores["dark_share"]
    if share is not None and share > options.max_dark_share:
        return f"dark: {share:.2f} of its time, max_dark_share is {options.max_dark_share}"
    return None
