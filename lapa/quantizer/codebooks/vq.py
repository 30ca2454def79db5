"""Vector quantisation with moving averages, in one level or in several residual ones.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, K codes of a token (codebook_size),
R levels, N = L * R.
"""

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import VQCodebook


class VQ(LatentCodebook):
    """Each of the L tokens has its own K codes a level, which follow the mean of the latents that take them.

    A level is one `VectorQuantize` with a head a token, and not a module a token or the library's `ResidualVQ`,
    which has no heads: all tokens are quantised by one product. The gradient skips all levels at once; a
    straight-through step in every level would count it R times.
    """

    def __init__(self, config: VQCodebook, latent_dim: int, num_levels: int):
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"codebook.num_levels is {num_levels}, expected at least 1")
        length, size = config.code_length, config.codebook_size
        self.num_codes, self.codebook_size = length * num_levels, size
        self.discard_threshold = config.discard_threshold
        self.norm = nn.BatchNorm1d(length * latent_dim, affine=False)
        levels = [
            VectorQuantize(
                dim=length * latent_dim,
                codebook_size=size,
                codebook_dim=latent_dim,
                heads=length,
                separate_codebook_per_head=True,
                decay=config.decay,
                commitment_weight=config.commitment_weight,
                kmeans_init=True,
                threshold_ema_dead_code=1,  # set for the size of the batch in `forward`
                route_gradients_to_input=False,
                sync_codebook=False,  # every process sees the whole batch
            )
            for _ in range(num_levels)
        ]
        self.levels: list[VectorQuantize] = nn.ModuleList(levels)  # type: ignore[assignment]

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """Quantised latents (B, L, D) float32, codes (B, L * R) int64, the levels of a token side by side."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            z_B1F = self.norm(latents_BLD.float().flatten(1))[:, None]
            total_B1F, codes, loss = torch.zeros_like(z_B1F), [], z_B1F.new_zeros(())
            for level in self.levels:
                codebook = level._codebook
                uniform_share = len(z_B1F) / self.codebook_size
                codebook.threshold_ema_dead_code = self.discard_threshold * uniform_share
                codebook.reset_cluster_size = uniform_share
                quantised_B1F, codes_B1L, commitment = level(z_B1F - total_B1F)
                total_B1F = total_B1F + quantised_B1F.detach()
                codes.append(codes_B1L.flatten(1))
                loss = loss + commitment
            if self.training:
                total_B1F = z_B1F + (total_B1F - z_B1F).detach()
        return Quantised(total_B1F.view(latents_BLD.shape), torch.stack(codes, -1).flatten(1), loss)

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Quantised latents (B, L, D) of codes (B, L * R)."""
        codes_BLR = codes_BN.unflatten(1, (-1, len(self.levels)))
        tokens_L = torch.arange(codes_BLR.shape[1], device=codes_BN.device)
        return sum(
            (level.codebook[tokens_L, codes_BLR[..., index]] for index, level in enumerate(self.levels)),
            start=torch.zeros((), device=codes_BN.device),
        )
