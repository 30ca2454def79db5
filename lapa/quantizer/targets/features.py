"""Target: the second frame's frozen image features (after UniVLA, arXiv 2505.06111, which predicts DINOv2 features).

Shapes: B batch, C = 3 colours, H = W = image_size, F feature channels, G patches along a side, L code_length,
D latent_dim.
"""

import torch
from torch import Tensor, nn

from lapa import distributed
from lapa.quantizer.targets.base import PairBatch, Target, pixel_error, relative_error
from lapa.quantizer.targets.feature_forward import FeatureForwardModel
from lapa.quantizer.targets.feature_sources import build_features
from lapa.schema import FeatureTarget


class Features(Target):
    """Squared error of the predicted features as a share of the error of repeating those of the first frame.

    Channels are normalised to mean 0 and variance 1 over the data, so that none outweighs the others.
    """

    def __init__(self, config: FeatureTarget, code_length: int, latent_dim: int, image_size: int):
        super().__init__()
        self.pixel_gradient = config.pixel_weight
        self.features = build_features(config)
        channels = self.features(torch.zeros(1, 3, image_size, image_size)).shape[1]
        self.normalise = ChannelNorm(channels)
        self.forward_model = FeatureForwardModel(channels, code_length, latent_dim, config.width, config.num_layers)

    def forward(self, batch: PairBatch, latents_BLD: Tensor, predicted_BCHW: Tensor) -> tuple[Tensor, dict]:
        features_NFGG = self.normalise(self.features(batch.frames_B2CHW.flatten(0, 1)))
        first_BFGG, second_BFGG = features_NFGG.unflatten(0, (-1, 2)).unbind(1)
        predicted_BFGG = self.forward_model(first_BFGG, latents_BLD)
        error = relative_error((predicted_BFGG - second_BFGG).square(), (first_BFGG - second_BFGG).square())
        pixels = pixel_error(predicted_BCHW, batch.frames_B2CHW)
        return error + pixels, {"feature_error": error.detach(), "pixel_error": pixels.detach()}


class ChannelNorm(nn.Module):
    """Channels of (B, F, G, G) to mean 0 and variance 1 of the data seen lately."""

    def __init__(self, num_channels: int, momentum: float = 0.05):
        super().__init__()
        self.momentum = momentum
        self.mean_F: Tensor
        self.variance_F: Tensor
        self.is_fresh: Tensor
        self.register_buffer("mean_F", torch.zeros(num_channels))
        self.register_buffer("variance_F", torch.ones(num_channels))
        self.register_buffer("is_fresh", torch.ones((), dtype=torch.bool))

    def forward(self, x_BFGG: Tensor) -> Tensor:
        if self.training:
            self._follow(x_BFGG)
        mean_F11, variance_F11 = self.mean_F[:, None, None], self.variance_F[:, None, None]
        return (x_BFGG - mean_F11) * (variance_F11 + 1e-5).rsqrt()

    @torch.no_grad()
    def _follow(self, x_BFGG: Tensor) -> None:
        mean_F = distributed.mean(x_BFGG.mean((0, 2, 3)))
        square_F = distributed.mean(x_BFGG.square().mean((0, 2, 3)))
        momentum = torch.where(self.is_fresh, 1.0, self.momentum)
        self.mean_F.lerp_(mean_F, momentum)
        self.variance_F.lerp_((square_F - self.mean_F.square()).clamp(min=0), momentum)
        self.is_fresh.fill_(False)
