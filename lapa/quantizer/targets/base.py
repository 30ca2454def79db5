"""The contract of every target: what of the second frame the latent action has to explain.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim, W words, S state dimensions,
A action dimensions, V = 2 views. A target is trained beside the quantizer and is no part of what is saved, so
that quantizers of different targets have the same inverse model, codebook and forward model.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from lapa import distributed


@dataclass
class PairBatch:
    """Frame pairs in [0, 1] and, where the objective asks for it, what goes with them.

    further_BCHW: a frame that lies as far as, or farther than, the second; the inverse model reads it instead.
    shifts_BV2: whole pixels, x and y, by which two views of a pair are shifted. words_BW: ids of lapa/text.py.
    states_B2S: at both frames. actions_BA: executed between the frames, where has_action_B; elsewhere zero.
    """

    frames_B2CHW: Tensor
    further_BCHW: Tensor | None = None
    shifts_BV2: Tensor | None = None
    words_BW: Tensor | None = None
    states_B2S: Tensor | None = None
    actions_BA: Tensor | None = None
    has_action_B: Tensor | None = None


class Target(nn.Module, ABC):
    """A loss of latent actions.

    pixel_gradient: share of the gradient of the pixel forward model that reaches the latent action.
    """

    pixel_gradient: float = 1.0

    def inverse_frames(self, batch: PairBatch) -> Tensor:
        """The frame pairs (B, 2, C, H, W) that the inverse model reads."""
        return batch.frames_B2CHW

    @abstractmethod
    def forward(self, batch: PairBatch, latents_BLD: Tensor, predicted_BCHW: Tensor) -> tuple[Tensor, dict]:
        """The loss and numbers to log, from the latents and the second frame that they predict in pixels."""


def relative_error(error: Tensor, reference: Tensor) -> Tensor:
    """Mean error as a share of the mean reference error, which is that of repeating the first frame.

    The reference, through which no gradient passes, is a mean over all data-parallel processes: averaging their
    gradients then gives those of the whole batch.
    """
    return error.mean() / distributed.mean(reference.mean()).clamp(min=1e-6)


def pixel_error(predicted_BCHW: Tensor, frames_B2CHW: Tensor, motion_weight: float = 0.0) -> Tensor:
    """Squared error of the predicted second frame, as a share of that of repeating the first.

    With `motion_weight` w, a pixel counts 1 + w * change times, where its change between the frames goes from 0 to
    1 at a tenth of the full range.
    """
    first_BCHW, second_BCHW = frames_B2CHW.unbind(1)
    change_BCHW = (second_BCHW - first_BCHW).square()
    error_BCHW = (predicted_BCHW.float() - second_BCHW).square()
    if motion_weight:
        largest_B1HW = change_BCHW.amax(1, keepdim=True).sqrt()
        weight_B1HW = 1 + motion_weight * (largest_B1HW * 10).clamp(max=1)
        error_BCHW, change_BCHW = error_BCHW * weight_B1HW, change_BCHW * weight_B1HW
    return relative_error(error_BCHW, change_BCHW)
