"""Lookup-free quantisation.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes of a token (codebook_size),
S signs of a code (log2 K).
"""

import torch
from torch import Tensor, nn

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import LFQCodebook


class LookupFree(LatentCodebook):
    """A token's code is the signs of S numbers (arXiv 2310.05737, section 3); gradients pass straight through.

    The numbers are normalised over the batch, after the projection and not before, so that each sign is as often
    plus as minus. The loss is `entropy_weight` times the entropy of a sample's code less that of the batch's codes
    (equation 5): each sample sure of its code, all codes in use. The code of a sample is probable by
    softmax(2 x . c) over codes c in {-1, 1}^S, soft enough to have a gradient for most numbers of unit variance.

    Written here because the library's LFQ (vector-quantize-pytorch 1.32) takes the batch's entropy of a process's own
    probabilities divided by the number of processes.
    """

    def __init__(self, config: LFQCodebook, latent_dim: int):
        super().__init__()
        length, size = config.code_length, config.codebook_size
        if size & (size - 1):
            raise ValueError(
                f"codebook.codebook_size is {size}: lookup-free quantisation needs a power of two, such as 8 or 64"
            )
        num_signs = size.bit_length() - 1
        self.num_codes, self.codebook_size = length, size
        self.entropy_weight = config.entropy_weight
        self.project_in = nn.Linear(latent_dim, num_signs)
        self.norm = nn.BatchNorm1d(length * num_signs, affine=False)
        self.project_out = nn.Linear(num_signs, latent_dim)
        self.place_S: Tensor
        self.signs_KS: Tensor
        self.register_buffer("place_S", 2 ** torch.arange(num_signs), persistent=False)
        is_plus_KS = torch.arange(size)[:, None] & self.place_S > 0
        self.register_buffer("signs_KS", 2.0 * is_plus_KS - 1, persistent=False)

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            projected_BLS = self.project_in(latents_BLD.float())
            x_BLS = self.norm(projected_BLS.flatten(1)).view(projected_BLS.shape)
            codes_BL = ((x_BLS > 0) * self.place_S).sum(-1)
            signs_BLS = self.signs_KS[codes_BL]
            if not self.training:
                return Quantised(self.project_out(signs_BLS), codes_BL, x_BLS.new_zeros(()))
            loss = self.entropy_weight * self._entropy_gap(x_BLS)
            quantised_BLD = self.project_out(x_BLS + (signs_BLS - x_BLS).detach())
        return Quantised(quantised_BLD, codes_BL, loss)

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L)."""
        with torch.autocast(codes_BN.device.type, enabled=False):
            return self.project_out(self.signs_KS[codes_BN])

    def _entropy_gap(self, x_BLS: Tensor) -> Tensor:
        """Entropy of a sample's code less that of the batch's, in nats, mean over tokens."""
        log_p_BLK = (2 * x_BLS @ self.signs_KS.T).log_softmax(-1)
        p_BLK = log_p_BLK.exp()
        sample = -(p_BLK * log_p_BLK).sum(-1).mean()
        p_LK = p_BLK.mean(0)
        return sample + (p_LK * p_LK.clamp(min=1e-8).log()).sum(-1).mean()
