"""Codebooks behind one interface: latents in, quantised latents and codes out.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes of a token (codebook_size).

Both normalise the latents over the batch before quantising. Without that the latents settle at whatever
scale suits the loss early on, one code is nearest to all of them, and the codebook never recovers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from lapa.schema import Codebook, FSQCodebook, NSVQCodebook


class NSVQ(nn.Module):
    """Noise substitution in vector quantisation (Vali and Baeckstroem 2022), as in LAPA but without collapse.

    Training replaces the quantisation error by random noise of the same length, z + |z - e| n / |n|, which
    carries gradients to latents and codes alike; inference returns the nearest code. All tokens share the
    K codes. Every `replace_every_steps`, codes used less than `discard_threshold` of the uniform share since
    the last replacement move to latents drawn from the batch.
    """

    def __init__(self, config: NSVQCodebook, latent_dim: int):
        super().__init__()
        self.config = config
        self.norm = nn.BatchNorm1d(config.code_length * latent_dim, affine=False)
        self.codes_KD = nn.Parameter(torch.randn(config.codebook_size, latent_dim))
        self.usage_K: Tensor
        self.steps_seen: Tensor
        self.register_buffer("usage_K", torch.zeros(config.codebook_size))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, latents_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            z_BLD = self.norm(latents_BLD.float().flatten(1)).view(latents_BLD.shape)
            distances_BLK = torch.cdist(z_BLD, self.codes_KD[None])
            codes_BL = distances_BLK.argmin(-1)
            quantised_BLD = self.codes_KD[codes_BL]
            if self.training:
                self._count_and_replace(z_BLD.detach(), codes_BL)
                noise_BLD = F.normalize(torch.randn_like(z_BLD), dim=-1)
                error_BL1 = (z_BLD - quantised_BLD).norm(dim=-1, keepdim=True)
                quantised_BLD = z_BLD + error_BL1 * noise_BLD
        return quantised_BLD, codes_BL

    def lookup(self, codes_BL: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L)."""
        return self.codes_KD[codes_BL]

    @torch.no_grad()
    def _count_and_replace(self, z_BLD: Tensor, codes_BL: Tensor) -> None:
        size, config = self.config.codebook_size, self.config
        self.usage_K += torch.bincount(codes_BL.flatten(), minlength=size)
        self.steps_seen += 1
        step = int(self.steps_seen)
        if step % config.replace_every_steps or step > config.replace_until_step:
            return
        share_K = self.usage_K / self.usage_K.sum()
        unused_K = share_K < config.discard_threshold / size
        candidates_ND = z_BLD.flatten(0, 1)
        picks = torch.randint(len(candidates_ND), (size,), device=z_BLD.device)
        # In place through `where`, so that the optimiser's moments and the shape of the update stay put.
        self.codes_KD.copy_(torch.where(unused_K[:, None], candidates_ND[picks], self.codes_KD))
        self.usage_K.zero_()


class EqualisedFSQ(FSQ):
    """Finite scalar quantisation (arXiv 2309.15505) whose levels are equally used by normal latents.

    The library bounds latents by tanh, which leaves the outer levels half used or worse; here batch-normalised
    latents go through the normal distribution function instead, so that each level takes 1 / levels of them.
    """

    def __init__(self, levels: list[int], latent_dim: int, code_length: int):
        super().__init__(levels, dim=latent_dim, preserve_symmetry=True)
        self.norm = nn.BatchNorm1d(code_length * len(levels), affine=False)

    def symmetry_preserving_bound(self, z, hard_clamp: bool = False):
        """Level values in [-1, 1] for latents (B, L, 1, num levels); gradients pass straight through."""
        z = self.norm(z.flatten(1)).view(z.shape)
        uniform = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        last = self._levels - 1
        level = torch.minimum(torch.floor(uniform.detach() * self._levels), last)
        centred = uniform * self._levels - 0.5  # of level k in [k - 0.5, k + 0.5]
        return (centred + (level - centred).detach()) * (2 / last) - 1


class FSQTokens(nn.Module):
    """A token of K codes is one scalar of K levels; large K is split into several scalars."""

    def __init__(self, config: FSQCodebook, latent_dim: int):
        super().__init__()
        self.config = config
        self.fsq = EqualisedFSQ(fsq_levels(config.codebook_size), latent_dim, config.code_length)

    def forward(self, latents_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latents (B, L, D) float32 and codes (B, L) int64."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            quantised_BLD, codes_BL = self.fsq(latents_BLD.float())
        return quantised_BLD, codes_BL.long()

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


def build_codebook(config: Codebook, latent_dim: int) -> NSVQ | FSQTokens:
    """The codebook that `config` describes, for latents of width `latent_dim`."""
    if config.code_length < 1 or config.codebook_size < 2:
        raise ValueError(
            f"codebook has code_length {config.code_length} and codebook_size {config.codebook_size}: "
            "expected at least 1 token of at least 2 codes"
        )
    if isinstance(config, NSVQCodebook):
        return NSVQ(config, latent_dim)
    if isinstance(config, FSQCodebook):
        return FSQTokens(config, latent_dim)
    raise ValueError(f"unknown codebook {config.name!r}: expected nsvq or fsq")
