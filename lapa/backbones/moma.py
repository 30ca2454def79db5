"""MoMa: a mixture of modality-aware experts (arXiv 2407.21770), and mixture-of-depths on top if wanted.

Attention and norms are those of the dense transformer. In place of the feed-forward, experts in groups of modalities:

    y = sum over the experts j of x's group that took x of sigmoid(x W_g)_j SwiGLU_j(x)

In training each expert takes the best k = ceil(capacity_factor * b / E) of the batch's b tokens of its group (expert
choice, arXiv 2202.09368): the load is even, and a token may be taken by several experts or by none. So routes depend
on later tokens and on other samples. In evaluation `lapa.backbones.auxiliary_router` decides for each token by itself:
causal, and the same for a sample alone. A group with one expert needs no router: it takes all tokens, with weight 1.

The dense transformer's pre-norm is kept; the paper follows Chameleon's post-norm.

Shapes: B batch, S sequence, T tokens of the batch, D width, F feed-forward width, E experts of a group, b tokens of a
group, k tokens of an expert.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.auxiliary_router import AuxiliaryRouter, Routed, auxiliary_loss
from lapa.backbones.base import MODALITY_NAMES, NUM_MODALITIES, Cache, Layout
from lapa.backbones.dense import DenseTransformer, feed_forward_width
from lapa.backbones.mixture_of_depths import DepthRoutedBlock, depth_capacity
from lapa.backbones.routing import Routing, grouped_linear, route
from lapa.schema import MoMaBackbone


def expert_groups(config: MoMaBackbone) -> list[list[int]]:
    """The modalities of each group; ValueError where a modality has no group or two, or a group no expert."""
    named = [name for group in config.groups for name in group]
    if sorted(named) != sorted(MODALITY_NAMES):
        raise ValueError(
            f"backbone.groups is {config.groups}, expected every one of {list(MODALITY_NAMES)} in exactly one group"
        )
    if len(config.num_experts) != len(config.groups) or min(config.num_experts) < 1:
        raise ValueError(
            f"backbone.num_experts is {config.num_experts}, expected a positive number for each of the "
            f"{len(config.groups)} groups {config.groups}"
        )
    return [[MODALITY_NAMES.index(name) for name in group] for group in config.groups]


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """k: tokens that each of a group's experts takes."""
    return min(num_tokens, math.ceil(capacity_factor * num_tokens / num_experts))


def best_tokens(score_bE: Tensor, num_best: int) -> Tensor:
    """(E, k) indices into b, each expert's best tokens."""
    return score_bE.detach().t().topk(num_best, dim=1).indices


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """A layout with its tokens sorted by group of experts. Padding is in a group of its own, the last: no expert's."""

    routing: Routing


class Experts(nn.Module):
    """The SwiGLU experts of a group, as matrices that are multiplied together."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        """(T, D): the first lengths[0] rows through the first expert, the next lengths[1] through the second, ..."""
        if len(set(lengths)) == 1:
            gate_EkF, up_EkF = torch.bmm(x_TD.unflatten(0, (len(lengths), -1)), self.gate_up).chunk(2, dim=-1)
            return torch.bmm(F.silu(gate_EkF) * up_EkF, self.down).flatten(0, 1)
        gate_TF, up_TF = grouped_linear(x_TD, self.gate_up, lengths).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate_TF) * up_TF, self.down, lengths)


class MixtureOfExperts(Routed):
    """The feed-forward of one layer: every token through the experts of its group that take it."""

    group_of_modality: Tensor

    def __init__(self, config: MoMaBackbone):
        super().__init__()
        groups = expert_groups(config)
        self.num_experts = list(config.num_experts)
        self.capacity_factor, self.router_noise = config.capacity_factor, config.router_noise
        hidden = feed_forward_width(config)
        self.experts = nn.ModuleList(Experts(number, config.width, hidden) for number in self.num_experts)
        # One router for all groups, of which each token uses its group's outputs; none for an expert that is alone.
        self.num_routed = [number if number > 1 else 0 for number in self.num_experts]
        self.router = nn.Linear(config.width, sum(self.num_routed), bias=False) if any(self.num_routed) else None
        self.auxiliary = nn.ModuleDict(
            {str(group): AuxiliaryRouter(config.width, n) for group, n in enumerate(self.num_routed) if n}
        )
        group_of_modality = [next(g for g, group in enumerate(groups) if m in group) for m in range(NUM_MODALITIES)]
        self.register_buffer("group_of_modality", torch.tensor(group_of_modality), persistent=False)

    def grouped(self, layout: Layout) -> GroupedLayout:
        """The layout with its tokens sorted by group, if they are not."""
        if isinstance(layout, GroupedLayout):
            return layout
        group_ids_BS = self.group_of_modality[layout.modality_ids_BS]
        group_ids_BS = group_ids_BS.masked_fill(~layout.is_token_BS, len(self.num_experts))
        return GroupedLayout(
            layout.modality_ids_BS,
            layout.document_ids_BS,
            layout.block_ids_BS,
            layout.position_ids_BS,
            route(group_ids_BS, len(self.num_experts) + 1),
        )

    def forward(self, x_BSD: Tensor, layout: Layout) -> Tensor:
        routing = self.grouped(layout).routing
        x_TD = x_BSD.flatten(0, 1)
        score_TE = None
        if self.router is not None:
            with torch.autocast(x_TD.device.type, enabled=False):
                # In float32: rounded scores would be equal, and the choice among them arbitrary.
                score_TE = self.router(x_TD.float())
        choose = self.choose if self.sees_the_batch else self.ask
        indices, weights, lengths = [], [], []
        first_expert = 0
        for group, index_b in enumerate(routing.order_T.split(routing.lengths)[:-1]):
            number = self.num_routed[group]
            if not number:
                taken_T, weight_T, length = index_b, x_TD.new_ones(len(index_b)), [len(index_b)]
            else:
                assert score_TE is not None
                score_bE = score_TE[:, first_expert : first_expert + number].index_select(0, index_b)
                taken_T, weight_T, length = choose(group, x_TD, index_b, score_bE)
            first_expert += number
            indices.append(taken_T)
            weights.append(weight_T)
            lengths.append(length)
        # One gather and one scatter for all experts of all groups.
        index_T = torch.cat(indices)
        rows = x_TD.index_select(0, index_T).split([len(taken_T) for taken_T in indices])
        pairs = zip(self.experts, rows, lengths, strict=True)
        y_TD = torch.cat([experts(rows_TD, length) for experts, rows_TD, length in pairs if len(rows_TD)] or [x_TD[:0]])
        y_TD = y_TD * torch.cat(weights)[:, None].to(y_TD.dtype)
        return torch.zeros_like(x_TD, dtype=y_TD.dtype).index_add(0, index_T, y_TD).view_as(x_BSD)

    def choose(self, group: int, x_TD: Tensor, index_b: Tensor, score_bE: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Expert choice: flat indices of the tokens, expert by expert, their weights, and how many each takes."""
        num_best = expert_capacity(len(index_b), self.num_experts[group], self.capacity_factor)
        token_Ek = best_tokens(score_bE, num_best)
        is_chosen_Eb = torch.zeros_like(score_bE.t(), dtype=torch.bool).scatter(1, token_Ek, True)
        # What is learned is the choice without noise: that is what evaluation is to repeat.
        auxiliary = self.auxiliary[str(group)]
        assert isinstance(auxiliary, AuxiliaryRouter)
        auxiliary.observe(x_TD, index_b, is_chosen_Eb.t())
        if self.router_noise and self.training and torch.is_grad_enabled():
            # The difference of two Gumbel variables is logistic: with it the sigmoid is a Gumbel-sigmoid.
            uniform_bE = torch.rand_like(score_bE).clamp(1e-6, 1 - 1e-6)
            score_bE = score_bE + self.router_noise * uniform_bE.logit()
            token_Ek = best_tokens(score_bE, num_best)
        weight_Ek = score_bE.t().gather(1, token_Ek).sigmoid()
        return index_b[token_Ek.flatten()], weight_Ek.flatten(), [num_best] * self.num_experts[group]

    def ask(self, group: int, x_TD: Tensor, index_b: Tensor, score_bE: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """As `choose`, by the auxiliary router: each token for itself."""
        if not len(index_b):
            return index_b, score_bE.new_zeros(0), [0] * self.num_experts[group]
        is_taken_Eb = self.auxiliary[str(group)](x_TD.index_select(0, index_b)).t() > 0
        expert_T, token_T = is_taken_Eb.nonzero(as_tuple=True)
        return index_b[token_T], score_bE[token_T, expert_T].sigmoid(), is_taken_Eb.sum(1).tolist()


class MoMaTransformer(DenseTransformer):
    """Feed-forward experts by modality. See `lapa.backbones.base` for the contract."""

    def __init__(self, config: MoMaBackbone):
        if config.capacity_factor <= 0:
            raise ValueError(f"backbone.capacity_factor is {config.capacity_factor}, expected more than 0")
        if not 0 <= config.depth_capacity < 1:
            raise ValueError(f"backbone.depth_capacity is {config.depth_capacity}, expected a share in [0, 1); 0: off")
        super().__init__(config)
        self.config: MoMaBackbone = config

    def build_block(self, layer: int) -> nn.Module:
        """The block of a layer; with mixture-of-depths, every other one behind a router."""
        block, config = super().build_block(layer), self.config
        if not self.is_depth_routed(layer):
            return block
        return DepthRoutedBlock(config, block, config.depth_capacity, presence_slot=config.num_layers + layer)

    def is_depth_routed(self, layer: int) -> bool:
        """Whether most tokens skip the layer: every other one from the first, where mixture-of-depths is on."""
        return self.config.depth_capacity > 0 and layer % 2 == 0

    def build_feed_forward(self, layer: int) -> nn.Module:
        """The experts of a layer."""
        return MixtureOfExperts(self.config)

    def initialise(self) -> None:
        """As the dense transformer, each expert for itself."""
        super().initialise()
        for name, weight in self.named_parameters():
            if weight.ndim == 3:
                nn.init.normal_(weight, std=self.config.width**-0.5)
                if name.endswith("down"):
                    weight.data.mul_((2 * self.config.num_layers) ** -0.5)

    def forward(self, tokens_BSD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D).

        ValueError for a cache while routes are chosen over the batch: those of earlier tokens cannot be changed.
        """
        if cache is not None and any(part.sees_the_batch for part in self.modules() if isinstance(part, Routed)):
            raise ValueError("a cache works with the auxiliary routers alone: call eval(), outside of expert_choice")
        return super().forward(tokens_BSD, layout, cache)

    def run_blocks(
        self, x_BSD: Tensor, layout: Layout, mask_B1SP: Tensor, angles_B1SK: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """The residual stream (B, S, D) after the last block; the tokens are sorted by group once."""
        mixture = next(module for module in self.modules() if isinstance(module, MixtureOfExperts))
        return super().run_blocks(x_BSD, mixture.grouped(layout), mask_B1SP, angles_B1SK, cache)

    def auxiliary_loss(self) -> Tensor | None:
        """Of the auxiliary routers, on the last forward pass in training; it changes nothing but them."""
        return auxiliary_loss(self)

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """Of a forward pass in training, where capacities fix the load.

        With mixture-of-depths, which modalities the chosen tokens have depends on their content: they are taken to
        be a fair sample. In evaluation the load depends on the auxiliary routers, which cost `auxiliary_flops` more.
        """
        length, total = sum(modality_lengths), 0
        for layer in range(self.config.num_layers):
            lengths: Sequence[int] = modality_lengths
            if self.is_depth_routed(layer):
                num_chosen = depth_capacity(self.config.depth_capacity, length)
                lengths = fair_sample(modality_lengths, num_chosen)
                total += 2 * length * self.config.width
            total += self.attention_flops(sum(lengths)) + self.feed_forward_flops(lengths)
        return total

    def feed_forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """Of one layer: the router, and every expert's tokens."""
        config, total = self.config, 0
        num_routed = sum(number for number in config.num_experts if number > 1)
        total += 2 * sum(modality_lengths) * config.width * num_routed
        for modalities, number in zip(expert_groups(config), config.num_experts, strict=True):
            num_tokens = sum(modality_lengths[modality] for modality in modalities)
            num_best = expert_capacity(num_tokens, number, config.capacity_factor if number > 1 else 1.0)
            total += 6 * number * num_best * config.width * feed_forward_width(config)
        return total

    def auxiliary_flops(self, modality_lengths: Sequence[int]) -> int:
        """What the auxiliary routers of all layers add in evaluation (at capacity, with mixture-of-depths)."""
        config, total, length = self.config, 0, sum(modality_lengths)
        half = config.width // 2
        for layer in range(config.num_layers):
            lengths: Sequence[int] = modality_lengths
            if self.is_depth_routed(layer):
                lengths = fair_sample(modality_lengths, depth_capacity(config.depth_capacity, length))
                total += 2 * length * half * (config.width + 1)
            for modalities, number in zip(expert_groups(config), config.num_experts, strict=True):
                if number > 1:
                    total += 2 * sum(lengths[m] for m in modalities) * half * (config.width + number)
        return total


def fair_sample(lengths: Sequence[int], number: int) -> list[int]:
    """So many of all tokens, by modality as they are in all, rounded so that the sum is right."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    places = [round(bound * number / max(1, bounds[-1])) for bound in bounds]
    return [after - before for before, after in pairwise(places)]
