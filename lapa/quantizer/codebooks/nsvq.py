"""Noise substitution in vector quantisation.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes of a token (codebook_size).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import NSVQCodebook


class NSVQ(LatentCodebook):
    """Noise substitution in vector quantisation (Vali and Baeckstroem 2022), as in LAPA but without collapse.

    Training replaces the quantisation error by random noise of the same length, z + |z - e| n / |n|, which
    carries gradients to latents and codes alike; inference returns the nearest code. Each of the L tokens has
    its own K codes. Every `replace_every_steps`, codes that took less than `discard_threshold` of the uniform
    share of the latents since the last replacement move to latents drawn from the batch.
    """

    def __init__(self, config: NSVQCodebook, latent_dim: int):
        super().__init__()
        self.config = config
        length, size = config.code_length, config.codebook_size
        self.num_codes, self.codebook_size = length, size
        self.norm = nn.BatchNorm1d(length * latent_dim, affine=False)
        self.codes_LKD = nn.Parameter(torch.randn(length, size, latent_dim))
        self.usage_LK: Tensor
        self.steps_seen: Tensor
        self.register_buffer("usage_LK", torch.zeros(length, size))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            z_BLD = self.norm(latents_BLD.float().flatten(1)).view(latents_BLD.shape)
            codes_BL = torch.cdist(z_BLD.transpose(0, 1), self.codes_LKD).argmin(-1).T
            quantised_BLD = self.lookup(codes_BL)
            if self.training:
                self._count_and_replace(z_BLD.detach(), codes_BL)
                noise_BLD = F.normalize(torch.randn_like(z_BLD), dim=-1)
                error_BL1 = (z_BLD - quantised_BLD).norm(dim=-1, keepdim=True)
                quantised_BLD = z_BLD + error_BL1 * noise_BLD
        return Quantised(quantised_BLD, codes_BL, quantised_BLD.new_zeros(()))

    def lookup(self, codes_BL: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L)."""
        return self.codes_LKD[torch.arange(codes_BL.shape[1], device=codes_BL.device), codes_BL]

    @torch.no_grad()
    def _count_and_replace(self, z_BLD: Tensor, codes_BL: Tensor) -> None:
        config, size = self.config, self.config.codebook_size
        self.usage_LK += F.one_hot(codes_BL, size).sum(0)
        self.steps_seen += 1
        step = int(self.steps_seen)
        if step % config.replace_every_steps or step > config.replace_until_step:
            return
        share_LK = self.usage_LK / self.usage_LK.sum(1, keepdim=True)
        unused_LK1 = (share_LK < config.discard_threshold / size)[..., None]
        picks_K = torch.randint(len(z_BLD), (size,), device=z_BLD.device)
        # Perturbed by a tenth of the latents' spread: two codes on one spot would stay together for good.
        drawn_LKD = z_BLD[picks_K].transpose(0, 1) + 0.1 * torch.randn_like(self.codes_LKD)
        self.codes_LKD.copy_(torch.where(unused_LK1, drawn_LKD, self.codes_LKD))
        self.usage_LK.zero_()
