"""The forward model of targets in feature space: the second frame's features from the first's and the latent action.

Shapes: B batch, F feature channels, G patches along a side, W width, L code_length, D latent_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.convolutional import ResidualBlock


class FeatureForwardModel(nn.Module):
    """Residual convolutions over the first frame's features, scaled and shifted (FiLM) by the latent action."""

    def __init__(self, num_channels: int, code_length: int, latent_dim: int, width: int, num_layers: int):
        super().__init__()
        if width % 4:
            raise ValueError(f"target.width is {width}: expected a multiple of 4")
        self.embed = nn.Sequential(nn.Linear(code_length * latent_dim, 2 * width), nn.SiLU())
        # Two more channels say where a patch lies, without which what enters at the border cannot be told.
        self.stem = nn.Conv2d(num_channels + 2, width, 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, 2 * width) for _ in range(num_layers))
        self.head = nn.Conv2d(width, num_channels, 1)
        # Zero: the first prediction repeats the first frame's features.
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, features_BFGG: Tensor, latents_BLD: Tensor) -> Tensor:
        """The second frame's features (B, F, G, G)."""
        condition_BW = self.embed(latents_BLD.flatten(1))
        size = features_BFGG.shape[-1]
        axis_G = torch.linspace(-1, 1, size, device=features_BFGG.device)
        place_2GG = torch.stack(torch.meshgrid(axis_G, axis_G, indexing="ij"))
        place_B2GG = place_2GG.to(features_BFGG.dtype).expand(len(features_BFGG), -1, -1, -1)
        x_BWGG = self.stem(torch.cat([features_BFGG, place_B2GG], 1)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x_BWGG = block(x_BWGG, condition_BW)
        return features_BFGG + self.head(F.silu(x_BWGG)).float()
