"""A dense pre-norm transformer: RMSNorm, SwiGLU, grouped heads, fused attention, rotary positions if wanted (Llama).

The other backbones are this one with some of its parts replaced: they override `build_attention` and
`build_feed_forward`, or the block.

Shapes: B batch, S sequence, P past, D width, N heads, G heads of keys and values, H width of a head, F feed-forward
width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapa.backbones.base import Backbone, Cache, Layout, see
from lapa.schema import DenseBackbone


def rotary_angles(position_ids_BS: Tensor, head_width: int, theta: float) -> Tensor:
    """Angles (B, 1, S, H / 2) float32 of rotary positions (Su et al. 2021, arXiv 2104.09864)."""
    steps = torch.arange(0, head_width, 2, device=position_ids_BS.device) / head_width
    return (position_ids_BS[:, None, :, None].float() / theta**steps).contiguous()


def rotate(x_BNSH: Tensor, angles_B1SK: Tensor) -> Tensor:
    """Turn the pairs (first half, second half) of each head by the angles, as Llama's weights expect."""
    first, second = x_BNSH.chunk(2, dim=-1)
    cos, sin = angles_B1SK.cos(), angles_B1SK.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q_BNSH: Tensor, k_BGPH: Tensor, v_BGPH: Tensor, mask_B1SP: Tensor) -> Tensor:
    """Fused attention (B, S, N * H), N a multiple of G; float32 on CPU."""
    # On CPU the fused attention has a bfloat16 backward pass several times slower than its float32 one.
    dtype = torch.float32 if q_BNSH.device.type == "cpu" else v_BGPH.dtype
    with torch.autocast(q_BNSH.device.type, enabled=False):
        out_BNSH = F.scaled_dot_product_attention(
            q_BNSH.to(dtype),
            k_BGPH.to(dtype),
            v_BGPH.to(dtype),
            attn_mask=mask_B1SP,
            enable_gqa=q_BNSH.shape[1] != k_BGPH.shape[1],
        )
    return out_BNSH.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised, which keeps high learning rates stable."""

    def __init__(self, config: DenseBackbone, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_key_value_heads = config.num_key_value_heads or config.num_heads
        self.head_width = config.width // config.num_heads
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_width
        self.query_key_value = nn.Linear(config.width, rows, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_width) if config.query_key_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_width) if config.query_key_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, mask_B1SP: Tensor, angles_B1SK: Tensor | None, cache: Cache | None) -> Tensor:
        heads, groups = self.num_heads, self.num_key_value_heads
        qkv_BNSH = self.query_key_value(x_BSD).unflatten(-1, (heads + 2 * groups, self.head_width)).transpose(1, 2)
        q_BNSH, k_BGSH, v_BGSH = qkv_BNSH.split([heads, groups, groups], dim=1)
        with torch.autocast(x_BSD.device.type, enabled=False):
            q_BNSH = self.query_norm(q_BNSH.float())
            k_BGSH = self.key_norm(k_BGSH.float())
            if angles_B1SK is not None:
                q_BNSH, k_BGSH = rotate(q_BNSH, angles_B1SK), rotate(k_BGSH, angles_B1SK)
        if cache is not None:
            k_BGSH, v_BGSH = cache.extend(self.layer, k_BGSH, v_BGSH)
        return self.output(attend(q_BNSH, k_BGSH, v_BGSH, mask_B1SP))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: DenseBackbone):
        super().__init__()
        hidden = feed_forward_width(config)
        self.gate_up = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x_BSD: Tensor, layout: Layout) -> Tensor:
        gate_BSF, up_BSF = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BSF) * up_BSF)


def feed_forward_width(config: DenseBackbone) -> int:
    """F: the ratio of the width, in multiples of 8."""
    return 8 * round(config.width * config.feed_forward_ratio / 8)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: DenseBackbone, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.feed_forward = feed_forward

    def forward(
        self, x_BSD: Tensor, layout: Layout, mask_B1SP: Tensor, angles_B1SK: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask_B1SP, angles_B1SK, cache)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD), layout)


class DenseTransformer(Backbone):
    """Every token through the same weights. See `lapa.backbones.base` for the contract."""

    def __init__(self, config: DenseBackbone):
        super().__init__(config)
        self.config: DenseBackbone = config
        if config.width % config.num_heads:
            raise ValueError(
                f"backbone.width is {config.width}, not a multiple of num_heads {config.num_heads}: "
                "choose num_heads that divides it"
            )
        if config.num_key_value_heads and config.num_heads % config.num_key_value_heads:
            raise ValueError(
                f"backbone.num_key_value_heads is {config.num_key_value_heads}, expected a divisor of num_heads "
                f"{config.num_heads}, or 0"
            )
        self.blocks = nn.ModuleList(self.build_block(layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.initialise()

    def build_block(self, layer: int) -> nn.Module:
        """The block of a layer; models with other parts override this."""
        return Block(self.config, Attention(self.config, layer), self.build_feed_forward(layer))

    def build_feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward part of a layer: (B, S, D) and the layout to (B, S, D)."""
        return FeedForward(self.config)

    def initialise(self) -> None:
        """Normal weights; residual branches start small, so that depth does not blow up the sum (GPT-2)."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=self.config.width**-0.5)
                if name.endswith(("output.weight", "down.weight")):
                    weight.data.mul_((2 * self.config.num_layers) ** -0.5)

    def forward(self, tokens_BSD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D)."""
        mask_B1SP = see(layout, cache, self.mask)[:, None]
        angles_B1SK = None
        if self.config.rotary_theta:
            head_width = self.config.width // self.config.num_heads
            angles_B1SK = rotary_angles(layout.position_ids_BS, head_width, self.config.rotary_theta)
        return self.norm(self.run_blocks(tokens_BSD, layout, mask_B1SP, angles_B1SK, cache))

    def run_blocks(
        self, x_BSD: Tensor, layout: Layout, mask_B1SP: Tensor, angles_B1SK: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """The residual stream (B, S, D) after the last block."""
        recompute = self.config.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x_BSD = checkpoint(block, x_BSD, layout, mask_B1SP, angles_B1SK, cache, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, layout, mask_B1SP, angles_B1SK, cache)
        return x_BSD

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """See the contract."""
        length = sum(modality_lengths)
        return sum(self.attention_flops(length) + self.feed_forward_flops(modality_lengths) for _ in self.blocks)

    def attention_flops(self, length: int) -> int:
        """Of one layer: projections, scores and their weighted sum."""
        width, heads = self.config.width, self.config.num_heads
        groups = self.config.num_key_value_heads or heads
        rows = (heads + 2 * groups) * (width // heads)
        return 2 * length * width * (rows + width) + 4 * length * length * width

    def feed_forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """Of one layer."""
        return 6 * sum(modality_lengths) * self.config.width * feed_forward_width(self.config)
