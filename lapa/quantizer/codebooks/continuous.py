"""Continuous latent actions, kept small by a Gaussian prior instead of a codebook.

Shapes: B batch, L tokens of a latent action (code_length), D latent_dim, N = L * D.
"""

import torch
from torch import Tensor, nn

from lapa.quantizer.codebooks.base import LatentCodebook, Quantised
from lapa.schema import ContinuousCodebook


class GaussianLatents(LatentCodebook):
    """A beta-VAE (Higgins et al. 2017) on latents, as in AdaWorld (arXiv 2503.18938) and CLAM (arXiv 2505.04999).

    The posterior is N(mean, exp(log_variance)) a dimension, the prior N(0, 1); training reads a sample of the
    posterior, inference its mean, which is the code. The loss is beta times the divergence of the two in nats,
    of which each dimension has `free_bits` free (Kingma et al. 2016), averaged over the batch.
    """

    is_discrete = False
    codebook_size = 0

    def __init__(self, config: ContinuousCodebook, latent_dim: int):
        super().__init__()
        if config.codebook_size:
            raise ValueError(
                f"codebook.codebook_size is {config.codebook_size}, but continuous latent actions have no codes: "
                "leave it at 0, or choose another codebook"
            )
        if config.beta < 0 or config.free_bits < 0:
            raise ValueError(
                f"codebook.beta is {config.beta} and codebook.free_bits {config.free_bits}, expected at least 0"
            )
        self.beta, self.free_bits = config.beta, config.free_bits
        self.shape = (config.code_length, latent_dim)
        self.num_codes = config.code_length * latent_dim
        self.norm = nn.BatchNorm1d(self.num_codes, affine=False)
        self.posterior = nn.Linear(latent_dim, 2 * latent_dim)
        with torch.no_grad():
            # Starts as the normalised latents with a tenth of the prior's spread: a latent action that is mostly
            # noise at first would teach the forward model to ignore it.
            self.posterior.weight.copy_(torch.cat([torch.eye(latent_dim), torch.zeros(latent_dim, latent_dim)]))
            self.posterior.bias.zero_()
            self.posterior.bias[latent_dim:] = 2 * torch.tensor(0.1).log()

    def forward(self, latents_BLD: Tensor) -> Quantised:
        """A sample in training, else the mean, of the posterior (B, L, D); its means (B, L * D), both float32."""
        with torch.autocast(latents_BLD.device.type, enabled=False):
            z_BLD = self.norm(latents_BLD.float().flatten(1)).view(latents_BLD.shape)
            mean_BLD, log_variance_BLD = self.posterior(z_BLD).chunk(2, -1)
            # Within what exp can square: a log-variance out of this range has no meaning beside a unit prior.
            log_variance_BLD = log_variance_BLD.clamp(-20, 10)
            if not self.training:
                return Quantised(mean_BLD, mean_BLD.flatten(1), mean_BLD.new_zeros(()))
            sample_BLD = mean_BLD + (log_variance_BLD / 2).exp() * torch.randn_like(mean_BLD)
            nats_BLD = (mean_BLD.square() + log_variance_BLD.exp() - 1 - log_variance_BLD) / 2
            loss = self.beta * nats_BLD.mean(0).clamp(min=self.free_bits).sum()
        return Quantised(sample_BLD, mean_BLD.flatten(1), loss)

    def lookup(self, codes_BN: Tensor) -> Tensor:
        """Latents (B, L, D) whose means are the codes (B, L * D)."""
        return codes_BN.float().unflatten(1, self.shape)
