"""A dense pre-norm transformer: RMSNorm, SwiGLU and fused attention (Llama without rotary positions).

Positions come with the embeddings, because images have two of them.

Shapes: B batch, S sequence, D width, N heads, H width of a head, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.schema import DenseBackbone


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised, which keeps high learning rates stable."""

    def __init__(self, config: DenseBackbone):
        super().__init__()
        self.num_heads = config.num_heads
        head_width = config.width // config.num_heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = nn.RMSNorm(head_width) if config.query_key_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width) if config.query_key_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor) -> Tensor:
        q_BNSH, k_BNSH, v_BNSH = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.query_key_value(x_BSD).chunk(3, dim=-1)
        )
        # On CPU the fused attention has a bfloat16 backward pass several times slower than its float32 one.
        dtype = torch.float32 if x_BSD.device.type == "cpu" else v_BNSH.dtype
        with torch.autocast(x_BSD.device.type, enabled=False):
            q_BNSH = self.query_norm(q_BNSH.float()).to(dtype)
            k_BNSH = self.key_norm(k_BNSH.float()).to(dtype)
            out_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH.to(dtype), attn_mask=mask_B1SS)
        return self.output(out_BNSH.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: DenseBackbone):
        super().__init__()
        hidden = 8 * round(config.width * config.feed_forward_ratio / 8)
        self.gate_up = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BSF) * up_BSF)


class Block(nn.Module):
    def __init__(self, config: DenseBackbone):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask_B1SS)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


class DenseTransformer(nn.Module):
    """Every token through the same weights. See `lapa.backbones.base` for the contract."""

    def __init__(self, config: DenseBackbone):
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(
                f"backbone.width is {config.width}, not a multiple of num_heads {config.num_heads}: "
                "choose num_heads that divides it"
            )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=config.width**-0.5)
                # Residual branches start small, so that depth does not blow up the sum (GPT-2).
                if name.endswith(("output.weight", "down.weight")):
                    weight.data.mul_((2 * config.num_layers) ** -0.5)

    def forward(self, tokens_BSD: Tensor, modality_ids_BS: Tensor, attention_mask_BSS: Tensor) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D); the modality ids are not used."""
        mask_B1SS = attention_mask_BSS[:, None]
        x_BSD = tokens_BSD
        for block in self.blocks:
            x_BSD = block(x_BSD, mask_B1SS)
        return self.norm(x_BSD)
