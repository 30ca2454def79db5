"""Target: the next frame's latent features, learned with the quantizer (LAOM, arXiv 2502.00379), no reconstruction.

Shapes: B batch, C = 3 colours, H = W = image_size, V = 2 views, F feature channels, G = H / 8, L code_length,
D latent_dim.

An encoder is trained so that its features of the first frame and the latent action predict the second frame's
features under a slowly moving average of the encoder. As in LAOM the inverse model may look farther ahead than the
frame that is predicted (multi-step inverse dynamics; labels are made at one distance, so codes are spent on motions
that they never show), and the frames are shifted at random: here both frames of a
pair alike, but otherwise for the inverse model than for the features, so that the latent action can carry motion
and not places. Unlike LAOM, the inverse model does not share the encoder, so that it is the same for every target.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import distributed
from lapa.quantizer.convolutional import ResidualBlock
from lapa.quantizer.targets.base import PairBatch, Target, pixel_error, relative_error
from lapa.quantizer.targets.feature_forward import FeatureForwardModel
from lapa.schema import LatentConsistencyTarget

LEAST_CHANGE = 0.5


class LatentConsistency(Target):
    """Squared error of the predicted features, as a share of that of repeating the first frame's.

    Features that never change would be easy to predict. Three things keep them from it: the target is a moving
    average that takes no gradient; every channel has variance 1 over each image, so that it says something of
    place; and where the change between the frames has a standard deviation below `LEAST_CHANGE`, it is pushed up
    (the hinge of VICReg, arXiv 2105.04906, on the change: most of a scene stands still, and an encoder of what
    stands still alone would vary as well as any). The log shows that deviation (change_std) and that of the
    features over the batch (feature_std).
    """

    def __init__(self, config: LatentConsistencyTarget, code_length: int, latent_dim: int):
        super().__init__()
        if not 0 < config.ema_decay < 1:
            raise ValueError(f"target.ema_decay is {config.ema_decay}: expected between 0 and 1, such as 0.99")
        self.config, self.pixel_gradient = config, config.pixel_weight
        self.encoder = Encoder(config.width)
        self.average = deepcopy(self.encoder).requires_grad_(False)
        self.forward_model = FeatureForwardModel(
            config.width, code_length, latent_dim, 2 * config.width, config.num_layers
        )

    def inverse_frames(self, batch: PairBatch) -> Tensor:
        first_BCHW, further_BCHW = batch.frames_B2CHW[:, 0], batch.further_BCHW
        assert further_BCHW is not None and batch.shifts_BV2 is not None
        return shift(torch.stack([first_BCHW, further_BCHW], 1), batch.shifts_BV2[:, 0])

    def forward(self, batch: PairBatch, latents_BLD: Tensor, predicted_BCHW: Tensor) -> tuple[Tensor, dict]:
        assert batch.shifts_BV2 is not None
        if self.training:
            self._follow()
        frames_B2CHW = shift(batch.frames_B2CHW, batch.shifts_BV2[:, 1])
        features_B2FGG = self.encoder(frames_B2CHW.flatten(0, 1)).float().unflatten(0, (-1, 2))
        with torch.no_grad():
            targets_B2FGG = self.average(frames_B2CHW.flatten(0, 1)).float().unflatten(0, (-1, 2))
        first_BFGG, second_BFGG = targets_B2FGG.unbind(1)
        predicted_BFGG = self.forward_model(features_B2FGG[:, 0], latents_BLD)
        error = relative_error((predicted_BFGG - second_BFGG).square(), (first_BFGG - second_BFGG).square())
        change_BFGG = distributed.gather_rows(features_B2FGG[:, 1] - features_B2FGG[:, 0])
        change_std_F = (change_BFGG.square().mean((0, 2, 3)) + 1e-6).sqrt()
        still = (1 - change_std_F / LEAST_CHANGE).relu().mean()
        pixels = pixel_error(predicted_BCHW, batch.frames_B2CHW)
        return error + self.config.change_weight * still + pixels, {
            "feature_error": error.detach(),
            "feature_std": features_B2FGG[:, 0].std(0, correction=0).mean().detach(),
            "change_std": change_std_F.mean().detach(),
            "pixel_error": pixels.detach(),
        }

    @torch.no_grad()
    def _follow(self) -> None:
        for average, parameter in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(parameter, 1 - self.config.ema_decay)


class Encoder(nn.Module):
    """Features (B, F, G, G) of images (B, C, H, W), G = H / 8; each channel has mean 0 and variance 1 over an image."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3 * 16, width, 3, 1, 1)
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.block = ResidualBlock(width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BFHW = F.pixel_unshuffle(4 * (images_BCHW - 0.5), 4).contiguous(memory_format=torch.channels_last)
        return F.instance_norm(self.block(self.down(F.silu(self.stem(x_BFHW)))).float())


def shift(frames_B2CHW: Tensor, shifts_B2: Tensor) -> Tensor:
    """Both frames of each pair moved by the same whole pixels, x and y; borders are repeated."""
    batch, size = len(frames_B2CHW), frames_B2CHW.shape[-1]
    axis_H = torch.arange(size, device=frames_B2CHW.device)
    columns_BH, rows_BH = ((axis_H - shifts_B2[:, i, None]).clamp(0, size - 1) for i in (0, 1))
    each_B = torch.arange(batch, device=frames_B2CHW.device)[:, None, None]
    moved_BHW2C = frames_B2CHW.permute(0, 3, 4, 1, 2)[each_B, rows_BH[:, :, None], columns_BH[:, None, :]]
    return moved_BHW2C.permute(0, 3, 4, 1, 2)
