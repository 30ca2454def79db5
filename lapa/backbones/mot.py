"""Mixture-of-transformers: weights of its own for every modality, attention over all tokens (arXiv 2411.04996).

For a token x of modality m, in a layer:

    x = x + Wo_m attention(Wq_m n_m(x), all keys, all values)       each key and value by its own token's Wk, Wv
    x = x + FFN_m(n'_m(x))

There is no router: the modality is known. A token costs what it costs in the dense transformer, and there are as many
times its parameters as there are experts. Tokens are sorted by expert once a forward pass and stay so through all
blocks; only queries, keys and values go back into the order of the sequence.

Shapes: B batch, S sequence, T tokens of an expert in the batch, D width, N heads, G heads of keys and values, H width
of a head, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapa.backbones.base import (
    LATENT_ACTION,
    MODALITY_NAMES,
    NUM_MODALITIES,
    PROPRIOCEPTION,
    ROBOT_ACTION,
    Cache,
    Layout,
    see,
)
from lapa.backbones.dense import DenseTransformer, FeedForward, attend, feed_forward_width, rotary_angles, rotate
from lapa.backbones.routing import Routing, route
from lapa.schema import MoTBackbone

PARTS = ("attention", "feed_forward", "norms")
ACTION_MODALITIES = {LATENT_ACTION, PROPRIOCEPTION, ROBOT_ACTION}


def modality_groups(config: MoTBackbone) -> list[list[int]]:
    """The modalities of each expert: those merged, and every other alone; ValueError for names that do not fit."""
    named = [name for group in config.merged for name in group]
    if not set(named) <= set(MODALITY_NAMES) or len(set(named)) < len(named) or not all(config.merged):
        raise ValueError(
            f"backbone.merged is {config.merged}, expected lists of different names among {list(MODALITY_NAMES)}"
        )
    merged = [sorted(MODALITY_NAMES.index(name) for name in group) for group in config.merged]
    alone = [[modality] for modality in range(NUM_MODALITIES) if MODALITY_NAMES[modality] not in named]
    return sorted(merged + alone)


def expert_widths(config: MoTBackbone) -> list[int]:
    """Width of the residual stream of each expert; ValueError where action_width cannot be had."""
    groups = modality_groups(config)
    if not config.action_width:
        return [config.width] * len(groups)
    if set(config.untie) != set(PARTS):
        raise ValueError(
            f"backbone.action_width is {config.action_width}, but a narrower expert shares no weights with another: "
            f"set untie=[{','.join(PARTS)}], or action_width=0"
        )
    widths = [config.action_width if set(group) <= ACTION_MODALITIES else config.width for group in groups]
    if config.action_width not in widths:
        raise ValueError(
            f"backbone.action_width is {config.action_width}, but merged={config.merged} leaves no expert of actions "
            "alone: merge them with each other only, or set action_width=0"
        )
    return widths


class PerExpert(nn.ModuleList):
    """A module for each expert, or a single one that all share."""

    def forward(self, segments: Sequence[Tensor], *arguments) -> list[Tensor]:
        """Each expert's tokens (T, D) through its module; a module without tokens gets no gradient."""
        return [
            self[expert % len(self)](x_TD, *arguments) if len(x_TD) else x_TD for expert, x_TD in enumerate(segments)
        ]


class MoTAttention(nn.Module):
    """Self-attention over all tokens, with projections and norms of the token's own expert."""

    def __init__(self, config: MoTBackbone, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_key_value_heads = config.num_key_value_heads or config.num_heads
        self.head_width = config.width // config.num_heads
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_width
        widths = expert_widths(config)[: None if "attention" in config.untie else 1]
        self.query_key_value = PerExpert(nn.Linear(width, rows, bias=False) for width in widths)
        self.output = PerExpert(nn.Linear(config.width, width, bias=False) for width in widths)
        num_norms = len(expert_widths(config)) if "norms" in config.untie else 1
        self.query_norm, self.key_norm = (
            nn.ModuleList(nn.RMSNorm(self.head_width) for _ in range(num_norms if config.query_key_norm else 0))
            for _ in range(2)
        )

    def forward(
        self,
        segments: list[Tensor],
        routing: Routing,
        mask_B1SP: Tensor,
        angles_B1SK: Tensor | None,
        cache: Cache | None,
    ) -> list[Tensor]:
        heads, groups = self.num_heads, self.num_key_value_heads
        qkv_BSR = routing.merge(self.query_key_value(segments))
        qkv_BNSH = qkv_BSR.unflatten(-1, (heads + 2 * groups, self.head_width)).transpose(1, 2)
        q_BNSH, k_BGSH, v_BGSH = qkv_BNSH.split([heads, groups, groups], dim=1)
        with torch.autocast(qkv_BSR.device.type, enabled=False):
            q_BNSH = normalise(q_BNSH.float(), self.query_norm, routing.group_ids_BS)
            k_BGSH = normalise(k_BGSH.float(), self.key_norm, routing.group_ids_BS)
            if angles_B1SK is not None:
                q_BNSH, k_BGSH = rotate(q_BNSH, angles_B1SK), rotate(k_BGSH, angles_B1SK)
        if cache is not None:
            k_BGSH, v_BGSH = cache.extend(self.layer, k_BGSH, v_BGSH)
        return self.output(routing.split(attend(q_BNSH, k_BGSH, v_BGSH, mask_B1SP)))


def normalise(x_BNSH: Tensor, norms: nn.ModuleList, expert_ids_BS: Tensor) -> Tensor:
    """RMSNorm with the gains of each token's expert; the input itself where there are no norms."""
    if not len(norms):
        return x_BNSH
    if len(norms) == 1:
        return norms[0](x_BNSH)
    # Normalised in the order of the sequence: one call for all experts, on what was to be copied anyway.
    gains_BSH = F.embedding(expert_ids_BS, torch.stack([norm.get_parameter("weight") for norm in norms]))
    return F.rms_norm(x_BNSH, x_BNSH.shape[-1:]) * gains_BSH[:, None]


class MoTBlock(nn.Module):
    """Global attention, then feed-forward. Norms before each, or after each as in Chameleon's code."""

    def __init__(self, config: MoTBackbone, layer: int):
        super().__init__()
        widths = expert_widths(config)
        norm_widths = widths[: None if "norms" in config.untie else 1]
        self.is_pre_norm = config.norm_placement == "pre"
        self.attention_norm = PerExpert(nn.RMSNorm(width) for width in norm_widths)
        self.attention = MoTAttention(config, layer)
        self.feed_forward_norm = PerExpert(nn.RMSNorm(width) for width in norm_widths)
        self.feed_forward = PerExpert(
            FeedForward(replace(config, width=width))
            for width in widths[: None if "feed_forward" in config.untie else 1]
        )

    def forward(
        self,
        segments: list[Tensor],
        routing: Routing,
        layout: Layout,
        mask_B1SP: Tensor,
        angles_B1SK: Tensor | None,
        cache: Cache | None,
    ) -> list[Tensor]:
        if self.is_pre_norm:
            normed = self.attention_norm(segments)
            segments = add(segments, self.attention(normed, routing, mask_B1SP, angles_B1SK, cache))
            return add(segments, self.feed_forward(self.feed_forward_norm(segments), layout))
        attended = self.attention(segments, routing, mask_B1SP, angles_B1SK, cache)
        segments = add(segments, self.attention_norm(attended))
        return add(segments, self.feed_forward_norm(self.feed_forward(segments, layout)))


def add(segments: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """Each expert's residual stream and its update, added; the update of an expert without tokens is ignored."""
    return [x_TD + y_TD if len(x_TD) else x_TD for x_TD, y_TD in zip(segments, updates, strict=True)]


class MoTTransformer(DenseTransformer):
    """An expert for each group of modalities. See `lapa.backbones.base` for the contract."""

    expert_of_modality: Tensor

    def __init__(self, config: MoTBackbone):
        if not set(config.untie) <= set(PARTS):
            raise ValueError(f"backbone.untie is {config.untie}, expected some of {list(PARTS)}")
        if config.norm_placement not in ("pre", "post"):
            raise ValueError(f"backbone.norm_placement is {config.norm_placement!r}, expected pre or post")
        super().__init__(config)
        self.config: MoTBackbone = config
        widths, groups = expert_widths(config), modality_groups(config)
        del self.norm
        self.norms = PerExpert(nn.RMSNorm(width) for width in widths[: None if "norms" in config.untie else 1])
        self.narrow = PerExpert(self._resize(config.width, width) for width in widths)
        self.widen = PerExpert(self._resize(width, config.width) for width in widths)
        expert_of_modality = [next(e for e, group in enumerate(groups) if m in group) for m in range(NUM_MODALITIES)]
        self.register_buffer("expert_of_modality", torch.tensor(expert_of_modality), persistent=False)

    @staticmethod
    def _resize(width: int, new_width: int) -> nn.Module:
        if width == new_width:
            return nn.Identity()
        linear = nn.Linear(width, new_width, bias=False)
        nn.init.normal_(linear.weight, std=width**-0.5)
        return linear

    def build_block(self, layer: int) -> nn.Module:
        """The block of a layer."""
        return MoTBlock(self.config, layer)

    def initialise(self) -> None:
        """As the dense transformer, each expert by its own width."""
        widths = expert_widths(self.config)
        for block in self.blocks:
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    expert = next(int(part) for part in name.split(".") if part.isdigit())
                    nn.init.normal_(weight, std=widths[expert] ** -0.5)
                    if ".output." in name or ".down." in name:
                        weight.data.mul_((2 * self.config.num_layers) ** -0.5)

    def forward(self, tokens_BSD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D)."""
        config = self.config
        mask_B1SP = see(layout, cache, self.mask)[:, None]
        angles_B1SK = None
        if config.rotary_theta:
            head_width = config.width // config.num_heads
            angles_B1SK = rotary_angles(layout.position_ids_BS, head_width, config.rotary_theta)
        routing = route(self.expert_of_modality[layout.modality_ids_BS], len(self.narrow))
        segments = self.narrow(routing.split(tokens_BSD))
        recompute = config.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (segments, routing, layout, mask_B1SP, angles_B1SK, cache)
            segments = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return routing.merge(self.widen(self.norms(segments)))

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """See the contract."""
        config, length, total = self.config, sum(modality_lengths), 0
        groups = config.num_key_value_heads or config.num_heads
        rows = (config.num_heads + 2 * groups) * (config.width // config.num_heads)
        for modalities, width in zip(modality_groups(config), expert_widths(config), strict=True):
            hidden = feed_forward_width(replace(config, width=width))
            a_token = config.num_layers * 2 * width * (rows + config.width + 3 * hidden)
            if width != config.width:
                a_token += 4 * width * config.width
            total += a_token * sum(modality_lengths[modality] for modality in modalities)
        return total + config.num_layers * 4 * length * length * config.width
