"""The contract of every codebook: latents in, what the forward model reads and the codes out.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, N numbers of a code (num_codes).

All but `shared_nsvq`, the released form, normalise the latents over the batch before quantising. Without that
the latents settle at whatever scale suits the loss early on, one code is nearest to all of them, and the codebook
never recovers.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from lapa.distributed import gather_rows, shard, world_size
from lapa.schema import GROUPS, Codebook


class Quantised(NamedTuple):
    """What a codebook makes of latents.

    latents_BLD: what the forward model reads, float32.
    codes_BN: int64 for a discrete codebook, float32 for a continuous one.
    loss: scalar that the codebook adds to the training loss, 0 where it adds none.
    """

    latents_BLD: Tensor
    codes_BN: Tensor
    loss: Tensor


class LatentCodebook(nn.Module, ABC):
    """Quantises the latents (B, L, D) of a latent action.

    is_discrete: whether codes are indices or numbers. num_codes: columns of the codes. codebook_size: how many
    codes a column chooses from; 0 if continuous.
    """

    is_discrete: bool = True
    num_codes: int
    codebook_size: int

    @abstractmethod
    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Codes of latents (B, L, D), and the latents that the forward model reads instead."""

    @abstractmethod
    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Latents (B, L, D) of codes (B, N): those that `forward` gives in inference mode."""

    def __call__(self, latents_BLD: Tensor) -> Quantised:
        """`forward`; in data parallel training of the latents of all processes, of which this one's come back.

        So batch statistics, quantiles, code usage, replaced codes and noise are those of one process with the whole
        batch, in every codebook and without code of its own. The whole is a few numbers a sample.
        """
        if not self.training or world_size() == 1:
            return super().__call__(latents_BLD)
        whole = super().__call__(gather_rows(latents_BLD))
        rows = shard(len(whole.latents_BLD))
        return Quantised(whole.latents_BLD[rows], whole.codes_BN[rows], whole.loss)


def build_codebook(config: Codebook, latent_dim: int) -> LatentCodebook:
    """The codebook that `config` describes, for latents of width `latent_dim`."""
    from lapa.quantizer.codebooks.continuous import GaussianLatents
    from lapa.quantizer.codebooks.fsq import FSQTokens
    from lapa.quantizer.codebooks.lfq import LookupFree
    from lapa.quantizer.codebooks.nsvq import NSVQ
    from lapa.quantizer.codebooks.shared_nsvq import SharedNSVQ
    from lapa.quantizer.codebooks.vq import VQ
    from lapa.schema import (
        ContinuousCodebook,
        FSQCodebook,
        LFQCodebook,
        NSVQCodebook,
        ResidualCodebook,
        SharedNSVQCodebook,
        VQCodebook,
    )

    smallest = 0 if isinstance(config, ContinuousCodebook) else 2
    if config.code_length < 1 or config.codebook_size < smallest:
        raise ValueError(
            f"codebook has code_length {config.code_length} and codebook_size {config.codebook_size}: "
            "expected at least 1 token of at least 2 codes"
        )
    if isinstance(config, NSVQCodebook):
        return NSVQ(config, latent_dim)
    if isinstance(config, FSQCodebook):
        return FSQTokens(config, latent_dim)
    if isinstance(config, VQCodebook):
        num_levels = config.num_levels if isinstance(config, ResidualCodebook) else 1
        return VQ(config, latent_dim, num_levels)
    if isinstance(config, LFQCodebook):
        return LookupFree(config, latent_dim)
    if isinstance(config, ContinuousCodebook):
        return GaussianLatents(config, latent_dim)
    if isinstance(config, SharedNSVQCodebook):
        return SharedNSVQ(config, latent_dim)
    raise ValueError(f"unknown codebook {config.name!r}: expected one of {sorted(GROUPS['codebook'])}")
