"""What is read from the trunk: latent action tokens or numbers, binned actions, or continuous or denoised chunks.

Shapes: B batch, L codes of a latent action (num_codes), K choices of a code, D width, T chunk size (of actions, or of
latent actions), A action dimensions, N bins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.latent_vla.diffusion import TimeEmbedding, build_noise_process
from lapa.schema import FinetuneConfig

UNKNOWN = -1  # in place of a code


class LatentHead(nn.Module):
    """Latent action tokens in order, each from the ones before it (arXiv 2410.11758).

    Beside the chain, all tokens are predicted at once from the readout token alone. The chain asks the
    readout only about the first token; what an action head inherits should know the whole latent action.

    Args:
        chunk_size: latent actions that the readout tells at once, each a frame gap after the one before.
    """

    def __init__(self, width: int, num_codes: int, codebook_size: int, chunk_size: int = 1):
        super().__init__()
        self.num_codes, self.codebook_size, self.chunk_size = num_codes, codebook_size, chunk_size
        self.code_embedding = nn.Parameter(torch.randn(num_codes - 1, codebook_size, width) * width**-0.5)
        self.at_once = nn.Linear(width, chunk_size * num_codes * codebook_size)
        self.in_order = nn.Parameter(torch.randn(num_codes, width, codebook_size) * width**-0.5)

    def tokens(self, readout_D: Tensor, latent_BL: Tensor) -> Tensor:
        """Inputs (B, l + 1, D): the readout token, then the l <= L - 1 tokens known so far."""
        known = latent_BL.shape[1]
        embedded_BLD = self.code_embedding[torch.arange(known, device=latent_BL.device), latent_BL]
        return torch.cat([readout_D.expand(len(latent_BL), 1, -1), embedded_BLD], dim=1)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """(B, l, K) for the tokens that follow hidden states (B, l, D)."""
        return torch.einsum("bld,ldk->blk", hidden_BLD, self.in_order[: hidden_BLD.shape[1]])

    def loss(self, hidden_BLD: Tensor, latent_BTL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats a token, of the chain and of the readout, added.

        Args:
            latent_BTL: the chunk's latent actions, UNKNOWN where the episode has ended; the first is always known.
        """
        logits_BLK, latent_BL = self.logits(hidden_BLD).float(), latent_BTL[:, 0]
        chain = F.cross_entropy(logits_BLK.flatten(0, 1), latent_BL.flatten())
        at_once = self.readout_cross_entropy(hidden_BLD[:, 0], latent_BTL).sum() / (latent_BTL != UNKNOWN).sum()
        accuracy = (logits_BLK.argmax(-1) == latent_BL).float().mean()
        return chain + at_once, {
            "token_cross_entropy": chain.detach(),
            "readout_cross_entropy": at_once.detach(),
            "token_accuracy": accuracy.detach(),
        }

    def readout_cross_entropy(self, hidden_BD: Tensor, latent_BTL: Tensor) -> Tensor:
        """Cross-entropy (B, T, L) of the chunk's tokens from the readout's hidden state, zero where UNKNOWN."""
        shape = (self.chunk_size, self.num_codes, self.codebook_size)
        logits_BTLK = self.at_once(hidden_BD).float().unflatten(-1, shape)
        return F.cross_entropy(logits_BTLK.movedim(-1, 1), latent_BTL, ignore_index=UNKNOWN, reduction="none")


class ContinuousLatentHead(nn.Module):
    """The normalised numbers of a continuous latent action, all at once from the readout token, by L1 regression.

    Linear, so that what an action head inherits lies in the trunk.
    """

    def __init__(self, width: int, num_codes: int):
        super().__init__()
        self.output = nn.Linear(width, num_codes)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return self.output(hidden_BD).float()

    def loss(self, hidden_BD: Tensor, latent_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error."""
        loss = (self(hidden_BD) - latent_BL).abs().mean()
        return loss, {"latent_l1": loss.detach()}


class ChunkActionHead(nn.Module):
    """A continuous chunk of normalised actions by L1 regression."""

    def __init__(self, width: int, chunk_size: int, action_dim: int):
        super().__init__()
        self.chunk_size, self.action_dim = chunk_size, action_dim
        # Linear: on twenty demonstrations a hidden layer fits the training set better and the rest worse.
        self.output = nn.Linear(width, chunk_size * action_dim)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        return self.output(hidden_BD).float().unflatten(-1, (self.chunk_size, self.action_dim))

    def decode(self, hidden_BD: Tensor) -> Tensor:
        """Normalised actions (B, T, A)."""
        return self(hidden_BD)

    def loss(self, hidden_BD: Tensor, actions_BTA: Tensor, is_pad_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error a sample (B,), over the actions that are not padding."""
        error_BT = (self(hidden_BD) - actions_BTA).abs().mean(-1)
        loss_B = masked_mean(error_BT, is_pad_BT)
        return loss_B, {"action_l1": loss_B.detach().mean()}


class BinnedActionHead(nn.Module):
    """Each action dimension as one of up to `num_bins` bins of equal count, decoded to the bin's midpoint.

    The edges are quantiles of the finetuning set, duplicates dropped (arXiv 2410.11758), so a dimension
    may have fewer bins; logits of the others are masked out. Actions outside the edges belong to the
    nearest bin.
    """

    edges_AN: Tensor
    num_bins_A: Tensor

    def __init__(self, width: int, chunk_size: int, action_dim: int, num_bins: int):
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins is {num_bins}, expected at least 2")
        self.chunk_size, self.action_dim, self.num_bins = chunk_size, action_dim, num_bins
        self.output = nn.Linear(width, chunk_size * action_dim * num_bins)
        self.register_buffer("edges_AN", torch.zeros(action_dim, num_bins + 1))
        self.register_buffer("num_bins_A", torch.zeros(action_dim, dtype=torch.int64))

    @torch.no_grad()
    def fit_bins(self, actions_NA: Tensor) -> None:
        """Take the edges from normalised actions (N, A)."""
        if actions_NA.ndim != 2 or actions_NA.shape[1] != self.action_dim or not len(actions_NA):
            raise ValueError(f"bins need actions (N, {self.action_dim}), got {tuple(actions_NA.shape)}")
        levels = torch.linspace(0, 1, self.num_bins + 1, dtype=torch.float64)
        for dim in range(self.action_dim):
            edges = torch.quantile(actions_NA[:, dim].double(), levels).unique().float().unique()
            if len(edges) == 1:
                # A constant dimension is one bin whose midpoint is the constant.
                edges = edges.repeat(2)
            self.num_bins_A[dim] = len(edges) - 1
            self.edges_AN[dim, : len(edges)] = edges
            self.edges_AN[dim, len(edges) :] = edges[-1]

    def encode(self, actions_BTA: Tensor) -> Tensor:
        """Bin indices (B, T, A) int64 of normalised actions."""
        self._require_bins()
        columns = []
        for dim in range(self.action_dim):
            inner = self.edges_AN[dim, 1 : int(self.num_bins_A[dim])].contiguous()
            columns.append(torch.bucketize(actions_BTA[..., dim].contiguous(), inner, right=True))
        return torch.stack(columns, dim=-1)

    def midpoints(self, bins_BTA: Tensor) -> Tensor:
        """Normalised actions (B, T, A) from bin indices."""
        middle_AN = (self.edges_AN[:, :-1] + self.edges_AN[:, 1:]) / 2
        return middle_AN[torch.arange(self.action_dim, device=bins_BTA.device), bins_BTA]

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Logits (B, T, A, N), minus infinity where the dimension has no such bin."""
        self._require_bins()
        shape = (self.chunk_size, self.action_dim, self.num_bins)
        logits_BTAN = self.output(hidden_BD).float().unflatten(-1, shape)
        missing_AN = torch.arange(self.num_bins, device=hidden_BD.device) >= self.num_bins_A[:, None]
        return logits_BTAN.masked_fill(missing_AN, -torch.inf)

    def decode(self, hidden_BD: Tensor) -> Tensor:
        """Normalised actions (B, T, A): the midpoint of the likeliest bin."""
        return self.midpoints(self(hidden_BD).argmax(-1))

    def loss(self, hidden_BD: Tensor, actions_BTA: Tensor, is_pad_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats a sample (B,), over the actions that are not padding."""
        logits_BTAN, bins_BTA = self(hidden_BD), self.encode(actions_BTA)
        entropy_BT = F.cross_entropy(logits_BTAN.movedim(-1, 1), bins_BTA, reduction="none").mean(-1)
        loss_B = masked_mean(entropy_BT, is_pad_BT)
        error_BT = (self.midpoints(logits_BTAN.detach().argmax(-1)) - actions_BTA).abs().mean(-1)
        return loss_B, {
            "bin_cross_entropy": loss_B.detach().mean(),
            "action_l1": masked_mean(error_BT, is_pad_BT).mean(),
        }

    def _require_bins(self) -> None:
        # A program that is exported cannot ask its tensors.
        if not torch.compiler.is_exporting() and not bool((self.num_bins_A > 0).all()):
            raise ValueError(
                "the binned action head has no bin edges: `lapa finetune` takes them from its data set; "
                "elsewhere call fit_bins first, or use action_head=chunk"
            )


class DenoisingActionHead(nn.Module):
    """A chunk of normalised actions as T tokens of the trunk, from noise to actions in a few steps.

    After Transfusion (arXiv 2408.11039), with actions in place of patches; pi0 (arXiv 2410.24164) does so by flow.

    Args:
        process: diffusion or flow.
        num_sampling_steps: passes of the chunk through the trunk; the prefix takes one.
    """

    limit_A: Tensor

    def __init__(self, width: int, chunk_size: int, action_dim: int, process: str, num_sampling_steps: int):
        super().__init__()
        if num_sampling_steps < 1:
            raise ValueError(f"num_sampling_steps is {num_sampling_steps}, expected at least 1")
        self.chunk_size, self.action_dim, self.num_sampling_steps = chunk_size, action_dim, num_sampling_steps
        self.process = build_noise_process(process)
        self.time = TimeEmbedding(width)
        self.input = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(chunk_size, width) * 0.5)
        self.output = nn.Linear(width, action_dim)
        self.register_buffer("limit_A", torch.full((action_dim,), torch.inf))

    def fit_limits(self, actions_NA: Tensor) -> None:
        """Take the largest of normalised actions (N, A) as the bounds of what is sampled."""
        self.limit_A.copy_(actions_NA.abs().amax(0))

    def tokens(self, noised_BTA: Tensor, time_B: Tensor) -> Tensor:
        """(B, T, D) for the trunk."""
        return self.input(noised_BTA) + self.position + self.time(time_B)[:, None]

    def read(self, hidden_BTD: Tensor) -> Tensor:
        """The prediction (B, T, A): the chunk itself."""
        return self.output(hidden_BTD).float()


def masked_mean(values_BT: Tensor, is_pad_BT: Tensor) -> Tensor:
    """Mean over T where not padding, a sample (B,)."""
    kept_BT = (~is_pad_BT).to(values_BT.dtype)
    return (values_BT * kept_BT).sum(1) / kept_BT.sum(1).clamp(min=1)


ReadoutActionHead = ChunkActionHead | BinnedActionHead
ActionHead = ReadoutActionHead | DenoisingActionHead


def build_action_head(
    name: str,
    width: int,
    chunk_size: int,
    action_dim: int,
    num_bins: int,
    num_sampling_steps: int = FinetuneConfig.num_sampling_steps,
) -> ActionHead:
    """`chunk` (continuous), `bins` (quantile bins), `diffusion` or `flow`; ValueError for another name."""
    if name == "chunk":
        return ChunkActionHead(width, chunk_size, action_dim)
    if name == "bins":
        return BinnedActionHead(width, chunk_size, action_dim, num_bins)
    if name in ("diffusion", "flow"):
        return DenoisingActionHead(width, chunk_size, action_dim, name, num_sampling_steps)
    raise ValueError(f"unknown action_head {name!r}: known are ['bins', 'chunk', 'diffusion', 'flow']")
