"""Codebooks behind one interface: latents in, quantised latents and codes out.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes of a token (codebook_size).

Both normalise the latents over the batch before quantising. Without that the latents settle at whatever
scale suits the loss early on, one code is nearest to all of them, and the codebook never recovers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from lapa.schema import Codebook, FSQCodebook, NSVQCodebook

OUT_OF_REACH = 1e6  # finite, since the moving average of weights subtracts thresholds


class NSVQ(nn.Module):
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
        self.norm = nn.BatchNorm1d(length * latent_dim, affine=False)
        self.codes_LKD = nn.Parameter(torch.randn(length, size, latent_dim))
        self.usage_LK: Tensor
        self.steps_seen: Tensor
        self.register_buffer("usage_LK", torch.zeros(length, size))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, latents_BLD: Tensor) -> tuple[Tensor, Tensor]:
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
        return quantised_BLD, codes_BL

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
