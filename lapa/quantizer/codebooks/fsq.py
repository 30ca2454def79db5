"""Finite scalar quantisation with evenly used levels.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim.
"""

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import FSQCodebook

OUT_OF_REACH = 1e6  # finite, since the moving average of weights subtracts thresholds


class EqualisedFSQ(FSQ):
    """Finite scalar quantisation (arXiv 2309.15505) whose levels are all used alike.

    The library bounds latents by tanh and cuts at fixed places, so that a heavy-tailed latent, as real video
    gives, falls into two or three levels. Here batch-normalised latents are cut at running quantiles: each
    level takes 1 / levels of them. Gradients pass through the normal distribution function instead.
    """

    def __init__(self, levels: list[int], latent_dim: int, code_length: int, momentum: float = 0.02):
        super().__init__(levels, dim=latent_dim, preserve_symmetry=True)
        self.momentum = momentum
        self.norm = nn.BatchNorm1d(code_length * len(levels), affine=False)
        # S scalars, T thresholds between levels; a scalar with fewer levels than the largest has some out of reach.
        share_ST = torch.arange(1, max(levels)) / torch.tensor(levels * code_length)[:, None]
        self.share_ST: Tensor
        self.thresholds_ST: Tensor
        self.register_buffer("share_ST", share_ST, persistent=False)
        self.register_buffer("thresholds_ST", torch.special.ndtri(share_ST.clamp(max=1)).clamp(max=OUT_OF_REACH))

    def symmetry_preserving_bound(self, z, hard_clamp: bool = False):
        """Level values in [-1, 1] for latents (B, L, 1, scalars of a token); gradients pass straight through."""
        z_BS = self.norm(z.flatten(1))
        if self.training:
            self._follow_quantiles(z_BS.detach())
        level = (z_BS.detach()[..., None] > self.thresholds_ST).sum(-1).view(z.shape)
        smooth = torch.special.ndtr(z_BS).view(z.shape) * self._levels - 0.5
        return (smooth + (level - smooth).detach()) * (2 / (self._levels - 1)) - 1

    def _follow_quantiles(self, z_BS: Tensor) -> None:
        batch = len(z_BS)
        rank_ST = (self.share_ST * batch - 0.5).round().long().clamp(0, batch - 1)
        quantiles_ST = z_BS.sort(0).values.T.gather(1, rank_ST)
        moved_ST = self.thresholds_ST.lerp(quantiles_ST, self.momentum)
        self.thresholds_ST.copy_(torch.where(self.share_ST < 1, moved_ST, OUT_OF_REACH))


class FSQTokens(LatentCodebook):
    """A token of K codes is one scalar of K levels; large K is split into several scalars."""

    def __init__(self, config: FSQCodebook, latent_dim: int):
        super().__init__()
        self.num_codes, self.codebook_size = config.code_length, config.codebook_size
        self.fsq = EqualisedFSQ(fsq_levels(config.codebook_size), latent_dim, config.code_length)

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            quantised_BLD, codes_BL = self.fsq(latents_BLD.float())
        return Quantised(quantised_BLD, codes_BL.long(), quantised_BLD.new_zeros(()))

    def lookup(self, codes_BL: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L)."""
        with torch.autocast(codes_BL.device.type, enabled=False):
            return self.fsq.indices_to_codes(codes_BL)


def fsq_levels(codebook_size: int, most: int = 16) -> list[int]:
    """Factors of at most `most` levels whose product is `codebook_size`, as few and as equal as can be."""
    for count in range(1, 9):
        root = round(codebook_size ** (1 / count))
        for first in sorted(range(2, most + 1), key=lambda level: abs(level - root)):
            if count == 1 and first == codebook_size:
                return [first]
            if count > 1 and codebook_size % first == 0 and codebook_size // first <= most ** (count - 1):
                rest = fsq_levels(codebook_size // first, most) if codebook_size // first > 1 else []
                if rest and len(rest) == count - 1:
                    return [first, *rest]
    raise ValueError(
        f"codebook.codebook_size is {codebook_size}: FSQ needs a product of numbers from 2 to {most}, such as 8 or 64"
    )
