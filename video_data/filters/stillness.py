"""Clips that stand still for much of their time: frozen recordings, slides."""

import numpy as np

STILL = 0.25  # grey levels, mean over the picture: below what a camera's noise or any visible motion changes


def still_share(change: np.ndarray) -> float:
    """Share of the steps from sample to sample (K,) in which nothing changes."""
    return float((change < STILL).mean())


def reject(scores: dict, options) -> str | None:
    share = scores["still_share"]
    if share is not None and share > options.max_still_share:
        return f"still: {share:.2f} of its time, max_still_share is {options.max_still_share}"
    return None
