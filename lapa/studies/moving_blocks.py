"""Clips to be told, imagined and described: one of two blocks moves to a column, and there up or down.

The instruction names the block's colour and the column; whether the block goes to the upper or the lower place of the
column is a coin's toss, so that there are two right futures and their mean is none. Blocks lie between pixels: what is
drawn of them is how much of each pixel they cover.

Shapes: B clips, O = 2 outcomes, C channels, H W pixels, K candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLOURS = ("red", "green", "blue")  # a channel each
COLUMNS = ("far left", "left", "right", "far right")
WORDS = (*COLOURS, *COLUMNS)
NUM_WORDS = 2  # of an instruction
SIDE = 0.25  # of a block, as a share of the picture's
MARGIN = 0.03  # between a block and the border, or another block, likewise
PLACES_X = tuple(SIDE / 2 + MARGIN + column / 3 * (1 - SIDE - 2 * MARGIN) for column in range(len(COLUMNS)))
PLACES_Y = (0.3, 0.7)
JITTER = 0.03  # largest distance from a place along each axis
VISIBLE = 0.3  # brightness from which a pixel counts as part of a block


@dataclass(frozen=True)
class Clips:
    """present_BCHW and future_BCHW in [-1, 1]; words_BW (B, 2) int64 of WORDS: colour and column.

    outcomes_BOCHW: both right futures. places_BO2: where the moved block then is, x and y in pixels.
    """

    present_BCHW: Tensor
    future_BCHW: Tensor
    words_BW: Tensor
    outcomes_BOCHW: Tensor
    places_BO2: Tensor


def draw_clips(count: int, size: int, generator: np.random.Generator) -> Clips:
    """`count` clips of `size` pixels."""
    rows = np.arange(count)
    column = generator.integers(len(COLUMNS), size=count)
    places_BO2 = np.stack(
        [np.stack([np.array(PLACES_X)[column], np.full(count, y)], axis=1) for y in PLACES_Y], axis=1
    ) + JITTER * generator.uniform(-1, 1, (count, 1, 2))

    def place_apart(taken_BP2: np.ndarray) -> np.ndarray:
        """A place (B, 2) for a block that touches none of those taken."""
        candidate_BK2 = SIDE / 2 + (1 - SIDE) * generator.random((count, 64, 2))
        distance_BK = np.abs(candidate_BK2[:, :, None] - taken_BP2[:, None]).max(-1).min(-1)
        return candidate_BK2[rows, (distance_BK > SIDE + MARGIN).argmax(1)]

    other_B2 = place_apart(places_BO2)
    start_B2 = place_apart(np.concatenate([places_BO2, other_B2[:, None]], axis=1))
    colours_BK = generator.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)
    chosen = generator.integers(len(PLACES_Y), size=count)

    def render(place_B2: np.ndarray) -> np.ndarray:
        image_BCHW = np.zeros((count, len(COLOURS), size, size), np.float32)
        for block, centre_B2 in enumerate((place_B2, other_B2)):
            image_BCHW[rows, colours_BK[:, block]] += square(centre_B2 * size, SIDE * size, size)
        return image_BCHW * 2 - 1

    outcomes_BOCHW = np.stack([render(places_BO2[:, outcome]) for outcome in range(len(PLACES_Y))], axis=1)
    return Clips(
        present_BCHW=torch.from_numpy(render(start_B2)),
        future_BCHW=torch.from_numpy(outcomes_BOCHW[rows, chosen]),
        words_BW=torch.from_numpy(np.stack([colours_BK[:, 0], len(COLOURS) + column], axis=1)),
        outcomes_BOCHW=torch.from_numpy(outcomes_BOCHW),
        places_BO2=torch.from_numpy(places_BO2 * size).float(),
    )


def square(centre_B2: np.ndarray, side: float, size: int) -> np.ndarray:
    """How much of each pixel (B, H, W) squares cover."""
    left_P = np.arange(size)
    covered_B2P = np.minimum(left_P + 1, centre_B2[..., None] + side / 2) - np.maximum(
        left_P, centre_B2[..., None] - side / 2
    )
    x_BP, y_BP = covered_B2P.clip(0, 1).transpose(1, 0, 2)
    return (y_BP[:, :, None] * x_BP[:, None]).astype(np.float32)


def frame_errors(frames_BCHW: Tensor, clips: Clips) -> dict[str, float]:
    """How far frames in [-1, 1] are from the nearest of the right futures.

    squared_error: of pixels in [0, 1]. position_error_px: of the moved block, a block that is not there being in the
    middle of the picture. right_share: of frames with that below a quarter of a block's side. lower_share: of frames
    whose block is nearer the lower of its places, 0.5 in the data.
    """
    squared_BO = (frames_BCHW[:, None] - clips.outcomes_BOCHW).square().mean((2, 3, 4)) / 4
    rows = torch.arange(len(frames_BCHW))
    brightness_BHW = ((frames_BCHW[rows, clips.words_BW[:, 0]] + 1) / 2 - VISIBLE).clamp(min=0) + 1e-6
    weight_BHW = brightness_BHW / brightness_BHW.sum((1, 2), keepdim=True)
    centres = torch.arange(frames_BCHW.shape[-1]) + 0.5
    place_B2 = torch.stack([weight_BHW.sum(1) @ centres, weight_BHW.sum(2) @ centres], dim=1)
    distance_B, nearest_B = (place_B2[:, None] - clips.places_BO2).norm(dim=-1).min(1)
    return {
        "squared_error": squared_BO.amin(1).mean().item(),
        "position_error_px": distance_B.mean().item(),
        "right_share": (distance_B < SIDE / 4 * frames_BCHW.shape[-1]).float().mean().item(),
        "lower_share": nearest_B.float().mean().item(),
    }
