"""Decoded frames to upright square RGB pictures, scaled once, and to their luma.

A centre square is cut out and averaged down. 8-bit 4:2:0 video, nearly all there is, is cut and scaled plane by
plane before its colours are converted, which costs a third of what a scaler that converts the whole picture does.
"""

from functools import lru_cache

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

# Rows are R, G, B of (Y, U, V, 1): ITU-R BT.601 and BT.709, for the full range and for video's 16 to 235.
_FULL = {
    "601": [[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]],
    "709": [[1, 0, 1.5748], [1, -0.187324, -0.468124], [1, 1.8556, 0]],
}
BT709, FULL_RANGE = 1, 2  # FFmpeg's numbers
STRIP_HEIGHT = 72  # pixels
SHARPNESS_SIDE = 90  # pixels: pictures are averaged down to between this and twice this before sharpness is measured


def _conversion(standard: str, full_range: bool) -> np.ndarray:
    """(3, 4) matrix from (Y, U, V, 1) in bytes to (R, G, B) in bytes."""
    matrix: np.ndarray = np.array(_FULL[standard])
    if not full_range:
        matrix = matrix * [255 / 219, 255 / 224, 255 / 224]
    offset = np.array([0 if full_range else 16, 128, 128])
    return np.hstack([matrix, -(matrix @ offset)[:, None]])


CONVERSIONS = {(standard, full): _conversion(standard, full) for standard in _FULL for full in (False, True)}


class SquareScaler:
    """Makes (image_size, image_size, 3) uint8 of a frame; keeps the scaler's tables from one frame to the next."""

    def __init__(self, image_size: int):
        self.image_size = image_size
        self._reformatter = VideoReformatter()
        self._planes = np.empty((image_size, image_size, 3), np.uint8)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """The centre square of `frame`, area-averaged and upright."""
        if frame.format.name in ("yuv420p", "yuvj420p") and min(frame.width, frame.height) >= self.image_size:
            pixels = self._from_planes(frame)
        else:
            pixels = self._from_any(frame)
        # Phones store the sensor's picture and the rotation that shows it upright, counter-clockwise in degrees.
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

    def _from_planes(self, frame: av.VideoFrame) -> np.ndarray:
        side = min(frame.width, frame.height)
        top, left = (frame.height - side) // 2, (frame.width - side) // 2
        planes = []
        for plane, part in zip(frame.planes, (1, 2, 2), strict=True):
            # An odd corner falls between two pixels of chroma: half of one is nothing that can be seen.
            corner = top // part * plane.line_size + left // part
            square = (side + part - 1) // part
            pixels: np.ndarray = np.ndarray((square, square), np.uint8, plane, corner, (plane.line_size, 1))
            planes.append(shrink(pixels, self.image_size))
        full_range = frame.format.name == "yuvj420p" or frame.color_range == FULL_RANGE
        standard = "709" if frame.colorspace == BT709 else "601"
        cv2.merge(planes, self._planes)
        return cv2.transform(self._planes, CONVERSIONS[standard, full_range])

    def _from_any(self, frame: av.VideoFrame) -> np.ndarray:
        size = self.image_size
        scale = size / min(frame.width, frame.height)
        width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
        scaled = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA")
        top, left = (height - size) // 2, (width - size) // 2
        return np.ascontiguousarray(scaled.to_ndarray()[top : top + size, left : left + size])


def plane_pixels(plane) -> np.ndarray:
    """(H, W) uint8 view of an 8-bit plane."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def shrink(square: np.ndarray, size: int) -> np.ndarray:
    """A square plane at `size` pixels a side.

    By a whole factor first, which is fast, then by interpolation between neighbours, which is as good as an
    average while less than a factor of two is left.
    """
    side = len(square)
    factor = whole_factor(side, size)
    if factor > 1:
        square = cv2.resize(square, (side // factor, side // factor), interpolation=cv2.INTER_AREA)
        side = len(square)
    if side == size:
        return square
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_LINEAR if side < 2 * size else cv2.INTER_AREA)


@lru_cache(maxsize=64)
def whole_factor(side: int, size: int) -> int:
    """The largest divisor of `side` that leaves at least `size` pixels."""
    return max((k for k in range(1, side // size + 1) if side % k == 0), default=1)


def luma(frame: av.VideoFrame) -> np.ndarray:
    """(H, W) uint8: the brightness of the stored picture, at its own size."""
    component = frame.format.components[0]
    if component.is_luma and component.bits == 8 and frame.format.is_planar:
        return plane_pixels(frame.planes[0])
    return frame.to_ndarray(format="gray")


def sharpness(luma_HW: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco 2000) of (H, W) uint8, in squared grey levels."""
    factor = min(luma_HW.shape) // SHARPNESS_SIDE
    if factor > 1:
        height, width = luma_HW.shape
        luma_HW = cv2.resize(luma_HW, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luma_HW, cv2.CV_16S, ksize=3))
    return float(deviation[0, 0]) ** 2


def brightness(pixels: np.ndarray) -> float:
    """Mean luma of (H, W, 3) uint8 RGB, 0 to 255."""
    red, green, blue, _ = cv2.mean(pixels)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def change(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two pictures in grey levels."""
    return cv2.norm(first, second, cv2.NORM_L1) / first.size


def strip_jpeg(frames: np.ndarray) -> bytes:
    """Pictures (K, H, W, 3) uint8 RGB side by side, as a small JPEG for reports."""
    strip = np.hstack(list(frames))
    width = round(strip.shape[1] * STRIP_HEIGHT / strip.shape[0])
    shown = cv2.resize(strip, (width, STRIP_HEIGHT), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return data.tobytes()
