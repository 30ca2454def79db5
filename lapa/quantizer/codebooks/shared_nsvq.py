"""Noise substitution in vector quantisation around one codebook for all tokens: the form of the released weights.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes (codebook_size).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import SharedNSVQCodebook


class SharedNSVQ(LatentCodebook):
    """The released quantizer's codebook (arXiv 2410.11758): K codes that every token of a latent action shares.

    Training adds noise as long as the quantisation error (Vali and Baeckstroem 2022). Latents are not normalised
    and unused codes are not replaced: training goes on well from codes that are spread already, as released ones
    are. From random weights this form collapses; take `codebook=nsvq` or `codebook=fsq` there.
    """

    def __init__(self, config: SharedNSVQCodebook, latent_dim: int):
        super().__init__()
        self.num_codes, self.codebook_size = config.code_length, config.codebook_size
        # The released name, plural and without shape suffix; `laq.from_released` relies on it.
        self.codebooks = nn.Parameter(torch.randn(config.codebook_size, latent_dim))

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            z_BLD = latents_BLD.float()
            # Without the term |z|^2, which is the same for every code.
            distance_BLK = self.codebooks.square().sum(-1) - 2 * z_BLD @ self.codebooks.T
            codes_BL = distance_BLK.argmin(-1)
            quantised_BLD = self.lookup(codes_BL)
            if self.training:
                noise_BLD = F.normalize(torch.randn_like(z_BLD), dim=-1)
                quantised_BLD = z_BLD + (z_BLD - quantised_BLD).norm(dim=-1, keepdim=True) * noise_BLD
        return Quantised(quantised_BLD, codes_BL, quantised_BLD.new_zeros(()))

    def lookup(self, codes_BL: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L)."""
        return self.codebooks[codes_BL]
