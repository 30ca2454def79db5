"""Near duplicates: the same clip under another name, size or encoding.

Eight frames spread over a clip are each hashed to 64 bits (a perceptual hash: signs of the low frequencies of the
cosine transform against their median, as in pHash). faiss finds the earlier clips whose 512 bits differ in few
places. Hashes of a fixed camera agree wherever the scene does, whatever the arm does in it, so the pictures of a
candidate are compared before it is called a duplicate.
"""

import logging

import cv2
import numpy as np

NUM_FRAMES = 8
HASH_BYTES = NUM_FRAMES * 8
# Mean bits of 64 a frame in which re-encoded copies of a clip differ at most; clips of one scene differ by 4 or more.
MAX_BITS = 6.5
# Candidates whose pictures are compared: clips of one fixed camera may be candidates of each other by the thousand.
MAX_CANDIDATES = 64
COMPARED_SIDE = 32  # pixels
# Grey levels that all but a hundredth of the compared pixels agree to. Copies of half the size, a tenth of the bits or
# another brightness differ by up to 20 (11 clips of DROID and Bridge), other clips of one scene by 30 and more.
MAX_DIFFERENCE = 22.0


def frame_positions(num_frames: int) -> np.ndarray:
    """(8,) indices of the frames that stand for a clip."""
    return np.linspace(0, num_frames - 1, NUM_FRAMES).round().astype(int)


def shown_positions(num_frames: int) -> np.ndarray:
    """(4,) indices of the frames that show a clip in the report."""
    return frame_positions(num_frames)[1::2]


def perceptual_hash(frames: np.ndarray) -> bytes:
    """64 bytes for eight frames (8, S, S, 3) uint8."""
    low = np.empty((NUM_FRAMES, 64), np.float32)
    for coefficients, frame in zip(low, frames, strict=True):
        grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
        coefficients[:] = cv2.dct(grey.astype(np.float32))[:8, :8].ravel()
    # The first coefficient is the brightness, which is no part of a picture's structure.
    return np.packbits(low > np.median(low[:, 1:], axis=1, keepdims=True)).tobytes()


def same_pictures(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether eight frames and eight others (8, S, S, 3) uint8 show the same, but for coding and brightness."""
    first_small, second_small = _compared(first), _compared(second)
    return bool(np.quantile(np.abs(first_small - second_small), 0.99) <= MAX_DIFFERENCE)


def _compared(frames: np.ndarray) -> np.ndarray:
    side = (COMPARED_SIDE, COMPARED_SIDE)
    grey = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), side, interpolation=cv2.INTER_AREA) for f in frames]
    pixels = np.stack(grey).astype(np.float32)
    return pixels - pixels.mean(axis=(1, 2), keepdims=True)


class HashIndex:
    """Hashes of the clips so far, in memory: 64 bytes a clip."""

    def __init__(self) -> None:
        # It tells which instruction sets it tries, in the words of an error.
        logging.getLogger("faiss").setLevel(logging.WARNING)
        try:
            import faiss
        except ImportError:
            raise ValueError(
                "near duplicates need the package faiss-cpu: "
                "pip install 'lerobot_policy_lapa[video]', or set duplicates=off"
            ) from None
        self._index = faiss.IndexBinaryFlat(HASH_BYTES * 8)

    def near(self, clip_hash: bytes) -> list[tuple[int, float]]:
        """(number, mean bits a frame) of up to `MAX_CANDIDATES` clips within `MAX_BITS`, nearest first, then earliest.

        clip_hash: 64 bytes, as `perceptual_hash` makes them.
        """
        query = np.frombuffer(clip_hash, np.uint8)[None]
        # faiss looks for distances below the radius.
        _, distances, numbers = self._index.range_search(query, int(MAX_BITS * NUM_FRAMES) + 1)
        found = sorted(zip(distances.tolist(), numbers.tolist(), strict=True))[:MAX_CANDIDATES]
        return [(number, distance / NUM_FRAMES) for distance, number in found]

    def add(self, clip_hash: bytes) -> None:
        self._index.add(np.frombuffer(clip_hash, np.uint8)[None])
