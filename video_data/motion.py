"""How much moves: the codec's own motion vectors where it exports them, dense optical flow elsewhere.

Both are the mean length of the displacement from the frame before, in picture heights a second. The codec's
vectors cost nothing, for the decoder has them; they point to the frame that the encoder chose to predict from, so
clips with B-frames read up to twice as high. Compare scores within one source, and set thresholds from the report's
histogram.
"""

import av
import cv2
import numpy as np

# FFmpeg's decoders that export vectors; the others (HEVC, VP9, AV1, image codecs) do not.
CODECS_WITH_VECTORS = frozenset(
    ("h264", "mpeg4", "mpeg1video", "mpeg2video", "h263", "flv", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2")
)
DECODER_OPTIONS = {"flags2": "+export_mvs"}
FLOW_SIDE = 128  # pixels: larger pictures are scaled down to this first


class FlowMeter:
    """Dense inverse search optical flow (Kroeger et al. 2016)."""

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> float:
        """Mean displacement between two RGB pictures (S, S, 3) uint8, as a share of their height."""
        flow = self._flow.calc(_grey(first), _grey(second), None)  # type: ignore[call-overload]
        return float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / len(flow)


def _grey(pixels: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    # The method's coarsest scale needs some pixels, and its time grows with their number.
    side = min(max(len(grey), FLOW_SIDE // 2), FLOW_SIDE)
    return grey if len(grey) == side else cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)


def vector_length(frame: av.VideoFrame) -> float | None:
    """Mean length of the codec's motion vectors as a share of the picture's height; None for a frame without."""
    side_data = frame.side_data.get("MOTION_VECTORS")
    if side_data is None:
        return None
    vectors = side_data.to_ndarray()
    if not len(vectors):
        return None
    areas = np.multiply(vectors["w"], vectors["h"], dtype=np.float32)
    across, down = vectors["motion_x"].astype(np.float32), vectors["motion_y"].astype(np.float32)
    # In parts of a pixel: a scale of 4 is quarter pixels. Older codecs leave the scale at zero for whole pixels.
    lengths = np.sqrt(across * across + down * down) / np.maximum(vectors["motion_scale"], 1)
    return float(areas @ lengths / areas.sum()) / frame.height
