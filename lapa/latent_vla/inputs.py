"""What the stages `ground` and `pretrain` read, images and instructions by frame, and on how many they measure."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lapa.data import FrameStore, to_float
from lapa.latent_vla.vision import random_shift

EVALUATION_BATCH = 256
MAX_EVALUATION_FRAMES = 4096
NUM_CURVE_FRAMES = 512  # held-out frames behind each point of the training curve
CURVE_EVERY_LOGS = 10


class Inputs:
    """Images and text ids (E, W) of the episodes, by frame, on the device.

    Args:
        futures: each the frame (N,) that is read behind each frame.
    """

    def __init__(self, store: FrameStore, ids_EW: Tensor, device: torch.device, futures: Sequence[np.ndarray] = ()):
        self.store, self.device, self.ids_EW, self.futures = store, device, ids_EW, futures
        self.episode_of_frame = store.episode_of_frame()

    def read(
        self, frames: np.ndarray, shift_pixels: int = 0, generator: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Images (B, 3, S, S) in [0, 1], text ids (B, W) and the frame indices themselves.

        Images have 3 channels more for each future frame: it comes behind, and is shifted with the present one.
        """
        pixels = self.store.frames[frames]
        if self.futures:
            behind = [self.store.frames[future_N[frames]] for future_N in self.futures]
            pixels = np.concatenate([pixels, *behind], axis=-1)
        if generator is not None:
            pixels = random_shift(pixels, shift_pixels, generator)
        ids_BW = self.ids_EW[self.episode_of_frame[frames]]
        return to_float(pixels, self.device), ids_BW.to(self.device), frames
