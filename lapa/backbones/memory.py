"""Memory+ layers: a feed-forward that looks up a few rows of one large table (arXiv 2412.09764).

    q = query(x)                          a query for each head, in two halves (product keys, arXiv 1907.05242)
    slot (i, j) scores q_1 . k_1i + q_2 . k_2j; the best of all N * N slots are found from the best of each half
    y = sum over heads and best slots of softmax(score) * value[slot]
    output = down(y * silu(gate(x)))      plain memory: y

The values are one table for all memory layers of a model; keys, queries and projections belong to each layer. A
token pays for N scores a half and for the rows it mixes, whatever the table holds: many parameters, few operations.
Values get gradients in few steps each, so they learn at a rate of their own and are clipped apart.

Shapes: B batch, S sequence, T = B * S tokens, D width, P heads, H width of half a key, N keys of a half, K best slots,
C candidates for them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.base import Layout
from lapa.backbones.dense import DenseTransformer
from lapa.backbones.mot import MoTTransformer, PerExpert
from lapa.schema import MemoryBackbone, MoTMemoryBackbone

Config = MemoryBackbone | MoTMemoryBackbone


class ValueTable(nn.Module):
    """The values (N * N, D) that all memory layers of one model read."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_half_keys**2, config.width))
        self.weight.learning_rate_ratio = config.value_learning_rate_ratio  # type: ignore[attr-defined]

    def initialise(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of rows (T, D) float32, for slots of all heads together."""
        # Not sparse: AdamW takes dense gradients only.
        return F.embedding_bag(slots_TK, self.weight, mode="sum", per_sample_weights=weights_TK)


class MemoryLayer(nn.Module):
    """A feed-forward: tokens of any leading shape (..., D) to the same shape, each token for itself."""

    rank_2C: Tensor

    def __init__(self, config: Config, values: ValueTable):
        super().__init__()
        self.num_heads, self.num_half_keys = config.num_memory_heads, config.num_half_keys
        self.num_best = config.num_best_slots
        half_width = config.key_width // 2
        self.query = nn.Linear(config.width, self.num_heads * config.key_width, bias=False)
        self.keys = nn.Parameter(torch.empty(self.num_heads, 2, self.num_half_keys, half_width))
        # Queries are normalised without a gain of their own: it would multiply the same products as the keys'.
        self.key_norm = nn.RMSNorm(half_width) if config.memory_query_key_norm else None
        self.gate = nn.Linear(config.width, config.width, bias=False) if config.memory_gate else None
        self.down = nn.Linear(config.width, config.width, bias=False) if config.memory_gate else None
        # In a tuple, so that the table is a part of the model alone: its state has it once, whoever reads it.
        self.shared = (values,)
        self.register_buffer("rank_2C", candidates(self.num_best), persistent=False)

    def initialise(self) -> None:
        """Keys uniform, queries Xavier, as published; gate and down are those of the model."""
        nn.init.uniform_(self.keys, -((2 * self.keys.shape[-1]) ** -0.5), (2 * self.keys.shape[-1]) ** -0.5)
        nn.init.xavier_uniform_(self.query.weight)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        x_TD = x.flatten(0, -2)
        slots_TK, weights_TK = self.select(x_TD)
        with torch.autocast(x.device.type, enabled=False):
            y_TD = self.shared[0](slots_TK, weights_TK)
        if self.gate is not None and self.down is not None:
            y_TD = self.down(y_TD * F.silu(self.gate(x_TD)))
        return y_TD.view(x.shape)

    def select(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Slots (T, P * K) int64 and their weights (T, P * K) float32, which add up to 1 a head."""
        q_P2TH = self.query(x_TD).unflatten(-1, (self.num_heads, 2, -1)).permute(1, 2, 0, 3)
        # In float32: rounding would decide which slots are the best.
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_P2TN = self.scores(q_P2TH.float())
            with torch.no_grad():
                halves_P2TK = self.best_pairs(scores_P2TN)
            weights_PTK = scores_P2TN.gather(-1, halves_P2TK).sum(1).softmax(-1)
        slots_PTK = halves_P2TK[:, 0] * self.num_half_keys + halves_P2TK[:, 1]
        return slots_PTK.transpose(0, 1).flatten(1), weights_PTK.transpose(0, 1).flatten(1)

    def scores(self, q_P2TH: Tensor) -> Tensor:
        """Products (P, 2, T, N) of half queries and half keys; of unit size where they are normalised."""
        keys_P2NH = self.keys
        if self.key_norm is not None:
            half_width = q_P2TH.shape[-1]
            q_P2TH = F.rms_norm(q_P2TH, (half_width,))
            keys_P2NH = self.key_norm(keys_P2NH) * half_width**-0.5
        return q_P2TH @ keys_P2NH.transpose(-1, -2)

    def best_pairs(self, scores_P2TN: Tensor) -> Tensor:
        """Both halves (P, 2, T, K) of the K best slots; exactly those that all N * N sums would give."""
        best_P2TK, index_P2TK = scores_P2TN.topk(self.num_best, dim=-1)
        rank_P2TC = self.rank_2C[:, None].expand(*best_P2TK.shape[:-1], -1)
        chosen_PTK = best_P2TK.gather(-1, rank_P2TC).sum(1).topk(self.num_best, dim=-1, sorted=False).indices
        rank_P2TK = rank_P2TC.gather(-1, chosen_PTK[:, None].expand_as(index_P2TK))
        return index_P2TK.gather(-1, rank_P2TK)


def candidates(num_best: int) -> Tensor:
    """Ranks (2, C) in the first and the second half of the pairs that can be among the best.

    The pair of ranks (i, j), from 0, is beaten by the (i + 1) * (j + 1) - 1 pairs with no lower rank in either half, so
    most of the num_best**2 pairs need no look.
    """
    pairs = [(i, j) for i in range(num_best) for j in range(num_best) if (i + 1) * (j + 1) <= num_best]
    return torch.tensor(pairs).t().contiguous()


def layers_with_memory(config: Config) -> list[int]:
    """The layers whose feed-forward is a memory: those that are named, or spread evenly around the middle.

    Every second layer at most: attention and feed-forward of the others have to make the queries. Raises ValueError for
    a layer that there is not.
    """
    if config.memory_layers:
        wrong = [layer for layer in config.memory_layers if not 0 <= layer < config.num_layers]
        if wrong or len(set(config.memory_layers)) < len(config.memory_layers):
            raise ValueError(
                f"backbone.memory_layers is {list(config.memory_layers)}, expected different layers from 0 to "
                f"{config.num_layers - 1}: a layer less than num_layers each"
            )
        return sorted(config.memory_layers)
    count = max(1, min(config.num_memory_layers, config.num_layers // 2))
    stride = config.num_layers // count
    return [(config.num_layers + stride * (2 * index - count + 1)) // 2 for index in range(count)]


def memory_flops(config: Config, length: int) -> int:
    """Of one memory layer: queries, scores of the half keys, gate and projection; look-ups are free."""
    queries = config.num_memory_heads * config.key_width * (config.width + config.num_half_keys)
    return 2 * length * (queries + (2 * config.width**2 if config.memory_gate else 0))


class WithMemory(DenseTransformer):
    """What a transformer with memory layers has beside its own parts: the table."""

    config: Config  # type: ignore[assignment]

    def build_memory_layer(self) -> MemoryLayer:
        """A memory layer that reads the model's one table."""
        if not hasattr(self, "memory"):
            check(self.config)
            self.memory = ValueTable(self.config)
        return MemoryLayer(self.config, self.memory)

    def initialise(self) -> None:
        super().initialise()
        for module in self.modules():
            if isinstance(module, (ValueTable, MemoryLayer)):
                module.initialise()

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """See the contract."""
        saved = self.feed_forward_flops(modality_lengths) - memory_flops(self.config, sum(modality_lengths))
        return super().forward_flops(modality_lengths) - len(layers_with_memory(self.config)) * saved


class MemoryTransformer(WithMemory):
    """A dense transformer with memory layers. See `lapa.backbones.base` for the contract."""

    def build_feed_forward(self, layer: int) -> nn.Module:
        if layer in layers_with_memory(self.config):
            return self.build_memory_layer()
        return super().build_feed_forward(layer)


class MoTMemoryTransformer(WithMemory, MoTTransformer):
    """A mixture-of-transformers with memory layers: keys, queries and projections of each expert, values of all."""

    config: MoTMemoryBackbone  # type: ignore[assignment]

    def build_block(self, layer: int) -> nn.Module:
        if self.config.action_width:
            raise ValueError("backbone.action_width needs values of two widths, the table has one: set it to 0")
        block = super().build_block(layer)
        if layer in layers_with_memory(self.config):
            assert isinstance(block.feed_forward, PerExpert)
            block.feed_forward = PerExpert(self.build_memory_layer() for _ in block.feed_forward)
        return block


def check(config: Config) -> None:
    """ValueError for sizes that do not fit each other."""
    if config.key_width < 2 or config.key_width % 2:
        raise ValueError(f"backbone.key_width is {config.key_width}, expected an even number: a key has two halves")
    if not 1 <= config.num_best_slots <= config.num_half_keys:
        raise ValueError(
            f"backbone.num_best_slots is {config.num_best_slots}, expected 1 to num_half_keys {config.num_half_keys}: "
            "a half can give no more"
        )
    if config.num_memory_heads < 1 or config.value_learning_rate_ratio <= 0:
        raise ValueError(
            f"backbone.num_memory_heads is {config.num_memory_heads} and value_learning_rate_ratio "
            f"{config.value_learning_rate_ratio}: expected at least 1, and more than 0"
        )
