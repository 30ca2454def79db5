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
BATCH = 16  # frames scaled at a time: their planes fit the cache, and each step is taken often enough
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
    """Makes (K, image_size, image_size, 3) uint8 of up to `BATCH` frames: centre squares, area-averaged and upright.

    Each step is taken for all frames of a batch at once: coming back to it frame by frame, with the decoder's code and
    data in the caches between, takes twice as long as the pixels do.
    """

    def __init__(self, image_size: int):
        self.image_size = image_size
        self._reformatter = VideoReformatter()
        self._pixels = np.empty((BATCH, image_size, image_size, 3), np.uint8)
        self._num_done = 0  # frames in `_pixels`
        self._num_waiting = 0  # frames behind them, whose planes are in `_stacks`
        self._form: tuple = ()
        self._squares: list[tuple[int, int, int]] = []  # of each plane: top, left, side
        self._stacks: list[np.ndarray] = []  # of each plane: (BATCH, side, side), shrunk by a whole factor

    def __len__(self) -> int:
        return self._num_done + self._num_waiting

    def add(self, frame: av.VideoFrame) -> None:
        """Take in one frame, which may be of another size than the one before. At most `BATCH` until `take`."""
        assert len(self) < BATCH
        form = (frame.width, frame.height, frame.format.name, frame.color_range, frame.colorspace, frame.rotation)
        if form != self._form:
            self._finish_waiting()
            self._form = form
            self._prepare(frame)
        if self._stacks:
            for plane, (top, left, side), stack in zip(frame.planes, self._squares, self._stacks, strict=True):
                corner = top * plane.line_size + left
                square: np.ndarray = np.ndarray((side, side), np.uint8, plane, corner, (plane.line_size, 1))
                small = stack[self._num_waiting]
                if len(small) < side:
                    cv2.resize(square, small.shape, small, interpolation=cv2.INTER_AREA)
                else:
                    small[:] = square
            self._num_waiting += 1
        else:
            pixels = self._from_any(frame)
            self._pixels[self._num_done] = np.rot90(pixels, self._turns) if self._turns else pixels
            self._num_done += 1

    def take(self) -> np.ndarray:
        """The frames that were added since it was last called; they are overwritten by the next that are added."""
        self._finish_waiting()
        taken = self._pixels[: self._num_done]
        self._num_done = 0
        return taken

    @property
    def _turns(self) -> int:
        # Phones store the sensor's picture and the rotation that shows it upright, counter-clockwise in degrees.
        return round(self._form[-1] / 90) % 4

    def _prepare(self, frame: av.VideoFrame) -> None:
        """Where the square lies in each plane of such frames; no planes where they are not 8-bit 4:2:0."""
        self._squares, self._stacks = [], []
        side = min(frame.width, frame.height)
        if frame.format.name not in ("yuv420p", "yuvj420p") or side < self.image_size:
            return
        top, left = (frame.height - side) // 2, (frame.width - side) // 2
        for part in (1, 2, 2):
            # An odd corner falls between two pixels of chroma: half of one is nothing that can be seen.
            square = (side + part - 1) // part
            self._squares.append((top // part, left // part, square))
            shrunk = square // whole_factor(square, self.image_size)
            self._stacks.append(np.empty((BATCH, shrunk, shrunk), np.uint8))

    def _finish_waiting(self) -> None:
        """Bring the waiting planes to `image_size` and to RGB."""
        count = self._num_waiting
        if not count:
            return
        rows = (count * self.image_size, self.image_size)
        planes = [stack[:count].reshape(-1, stack.shape[-1]) for stack in self._stacks]
        if len({plane.shape for plane in planes}) == 1:
            whole = cv2.merge([plane.reshape(1, -1) for plane in planes])
            merged = _resize_stack(whole.reshape(*planes[0].shape, 3), rows)
        else:
            merged = cv2.merge([_resize_stack(plane, rows) for plane in planes])
        _, _, name, color_range, colorspace, _ = self._form
        full_range = name == "yuvj420p" or color_range == FULL_RANGE
        pixels = self._pixels[self._num_done : self._num_done + count]
        cv2.transform(
            merged, CONVERSIONS["709" if colorspace == BT709 else "601", full_range], pixels.reshape(*rows, 3)
        )
        if self._turns:
            pixels[:] = np.rot90(pixels, self._turns, axes=(1, 2)).copy()
        self._num_done, self._num_waiting = self._num_done + count, 0

    def _from_any(self, frame: av.VideoFrame) -> np.ndarray:
        size = self.image_size
        scale = size / min(frame.width, frame.height)
        width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
        scaled = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA")
        top, left = (height - size) // 2, (width - size) // 2
        return scaled.to_ndarray()[top : top + size, left : left + size]


def plane_pixels(plane) -> np.ndarray:
    """(H, W) uint8 view of an 8-bit plane."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _resize_stack(pixels: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    """Squares one below the other, of any number of channels, at `rows[1]` pixels a side; `rows[0]` pixels in all.

    They have been shrunk by a whole factor, which is fast; interpolation between neighbours is as good as an average
    while less than a factor of two is left.
    """
    height, size = rows
    side = pixels.shape[1]
    if side == size:
        return pixels
    if side > size:
        scaling = cv2.INTER_LINEAR if side < 2 * size else cv2.INTER_AREA
        return cv2.resize(pixels, (size, height), interpolation=scaling)
    # The chroma of small pictures. Enlarged in one, each square would take in the edge of the next.
    squares = pixels.reshape(-1, side, *pixels.shape[1:])
    return np.concatenate([cv2.resize(square, (size, size), interpolation=cv2.INTER_LINEAR) for square in squares])


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
