"""Targets in pixels: the plain error, the error weighted by motion, and one closer to what an eye compares.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim.
"""

import torch
from torch import Tensor

from lapa.quantizer.targets.base import PairBatch, Target, pixel_error, relative_error
from lapa.schema import MotionPixelTarget, PerceptualTarget

# Shares of the scales, fine to coarse, after Wang et al. 2003 (table of MS-SSIM); as many as the image has room for.
SCALE_SHARES = (0.0448, 0.2856, 0.3001)
KERNEL_SIZE = 7


class Pixels(Target):
    """Squared pixel error as a share of the error of repeating the first frame (LAPA, arXiv 2410.11758)."""

    def __init__(self, motion_weight: float = 0.0):
        super().__init__()
        self.motion_weight = motion_weight

    def forward(self, batch: PairBatch, latents_BLD: Tensor, predicted_BCHW: Tensor) -> tuple[Tensor, dict]:
        return pixel_error(predicted_BCHW, batch.frames_B2CHW, self.motion_weight), {}


def motion_pixels(config: MotionPixelTarget) -> Pixels:
    """`Pixels` in which what changes between the frames counts more; ValueError where it would not."""
    if config.motion_weight <= 0:
        raise ValueError(
            f"target.motion_weight is {config.motion_weight}: expected more than 0; target=pixels is the plain error"
        )
    return Pixels(config.motion_weight)


class Perceptual(Target):
    """Pixels, plus multi-scale structural similarity, plus the error of image gradients.

    A stand-in for a learned perceptual loss that needs no weights. Each term is a share of the same term for
    repeating the first frame, so that the weights compare.
    """

    def __init__(self, config: PerceptualTarget, image_size: int):
        super().__init__()
        self.config = config
        # torchmetrics wants images larger than (kernel - 1) * (scales - 1) ** 2.
        num_scales = max(n for n in (1, 2, 3) if image_size > (KERNEL_SIZE - 1) * max(1, n - 1) ** 2)
        total = sum(SCALE_SHARES[:num_scales])
        self.scale_shares = tuple(share / total for share in SCALE_SHARES[:num_scales])

    def forward(self, batch: PairBatch, latents_BLD: Tensor, predicted_BCHW: Tensor) -> tuple[Tensor, dict]:
        first_BCHW, second_BCHW = batch.frames_B2CHW.unbind(1)
        predicted_BCHW = predicted_BCHW.float()
        with torch.no_grad():
            copy_dissimilarity = self.dissimilarity(first_BCHW, second_BCHW)
        pixels = pixel_error(predicted_BCHW, batch.frames_B2CHW)
        structure = relative_error(self.dissimilarity(predicted_BCHW, second_BCHW), copy_dissimilarity)
        edges = relative_error(gradient_error(predicted_BCHW, second_BCHW), gradient_error(first_BCHW, second_BCHW))
        loss = pixels + self.config.similarity_weight * structure + self.config.gradient_weight * edges
        return loss, {"structure_error": structure.detach(), "edge_error": edges.detach()}

    def dissimilarity(self, one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        """1 - multi-scale structural similarity, mean over images."""
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        with torch.autocast(one_BCHW.device.type, enabled=False):
            return 1 - multiscale_structural_similarity_index_measure(
                one_BCHW,
                other_BCHW,
                gaussian_kernel=False,
                kernel_size=KERNEL_SIZE,
                data_range=1.0,
                betas=self.scale_shares,
                normalize="relu",
            )


def gradient_error(one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Mean square of the difference between the two images' finite differences, along both axes.

    Squared, since most pixels stand still: their absolute error has its kink just where prediction and frame agree,
    and that holds the prediction at a copy of the first frame for good.
    """
    difference_BCHW = one_BCHW - other_BCHW
    return difference_BCHW.diff(dim=-1).square().mean() + difference_BCHW.diff(dim=-2).square().mean()
