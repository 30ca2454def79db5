"""The paper's quantizer for large compute: a spatio-temporal transformer (arXiv 2410.11758, after C-ViViT).

Shapes: B batch, T = 2 frames, C = 3 colours, H = W = image_size, G patches along a side, P = G * G patches of
a frame, W width, N heads, S width of a head, L code_length, D latent_dim, Q queries, K keys.

Encoder: spatial layers within each frame, then temporal layers across the two frames at each patch, causal,
so that the first frame's features know nothing of the second. The latent action is read from the difference
of the two frames' features. Decoder: the first frame's patches attend to each other and to the latent action.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.base import LatentActionQuantizer
from lapa.schema import Codebook, TransformerQuantizer


class TransformerLAQ(LatentActionQuantizer):
    """Spatial and temporal encoder layers; decoder layers with cross-attention to the latent action."""

    config: TransformerQuantizer

    def __init__(self, config: TransformerQuantizer, codebook: Codebook):
        if config.image_size % (4 * config.patch_size):
            raise ValueError(
                f"model.image_size is {config.image_size}: expected a multiple of {4 * config.patch_size}, "
                "that is 4 patches"
            )
        if config.width % config.num_heads:
            raise ValueError(f"model.width is {config.width}: expected a multiple of num_heads = {config.num_heads}")
        super().__init__(config, codebook)
        width, heads = config.width, config.num_heads
        self.grid = config.image_size // config.patch_size
        self.embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_PW = nn.Parameter(0.02 * torch.randn(self.grid**2, width))
        self.time_TW = nn.Parameter(0.02 * torch.randn(2, width))
        self.spatial = nn.ModuleList(Layer(width, heads) for _ in range(config.num_spatial_layers))
        self.temporal = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(config.num_temporal_layers))
        self.norm = nn.LayerNorm(width)
        self.difference = DifferenceHead(width, self.grid, codebook.code_length, config.latent_dim)
        self.condition = nn.Linear(config.latent_dim, width)
        self.token_LW = nn.Parameter(0.02 * torch.randn(codebook.code_length, width))
        self.decoder_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.decoder = nn.ModuleList(Layer(width, heads, cross=True) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * config.patch_size**2)
        # Zero: the first prediction repeats the first frame, so that all learning goes to what changes.
        nn.init.zeros_(self.to_pixels.weight)
        assert self.to_pixels.bias is not None
        nn.init.zeros_(self.to_pixels.bias)

    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        x_BPW = self.embed(frames_B2CHW.flatten(0, 1) - 0.5).flatten(2).mT + self.position_PW
        for layer in self.spatial:
            x_BPW = layer(x_BPW)
        x_BTPW = x_BPW.unflatten(0, (-1, 2)) + self.time_TW[:, None]
        batch = len(x_BTPW)
        x_BTW = x_BTPW.transpose(1, 2).flatten(0, 1)
        for layer in self.temporal:
            x_BTW = layer(x_BTW)
        first_BPW, second_BPW = self.norm(x_BTW).unflatten(0, (batch, -1)).unbind(2)
        return self.difference(second_BPW - first_BPW)

    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        action_BLW = self.condition(quantised_BLD) + self.token_LW
        x_BPW = self.decoder_embed(first_BCHW - 0.5).flatten(2).mT + self.position_PW
        for layer in self.decoder:
            x_BPW = layer(x_BPW, action_BLW)
        change_BEP = self.to_pixels(self.decoder_norm(x_BPW)).mT
        change_BEGG = change_BEP.unflatten(2, (self.grid, self.grid))
        return first_BCHW + F.pixel_shuffle(change_BEGG, self.config.patch_size)


class DifferenceHead(nn.Module):
    """Latents (B, L, D) from the difference of two frames' features (B, P, W): two strided convolutions."""

    def __init__(self, width: int, grid: int, code_length: int, latent_dim: int):
        super().__init__()
        self.grid, self.shape = grid, (code_length, latent_dim)
        narrow = min(width, 64)
        self.convolutions = nn.Sequential(
            nn.Conv2d(width, narrow, 1),
            nn.Conv2d(narrow, narrow, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(narrow, narrow, 3, 2, 1),
        )
        self.out = nn.Linear(narrow * (grid // 4) ** 2, code_length * latent_dim)

    def forward(self, difference_BPW: Tensor) -> Tensor:
        x_BWGG = difference_BPW.mT.unflatten(2, (self.grid, self.grid))
        return self.out(self.convolutions(x_BWGG).flatten(1)).unflatten(1, self.shape)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys, by the fused kernel."""

    def __init__(self, width: int, num_heads: int, causal: bool = False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = nn.RMSNorm(width // num_heads)
        self.key_norm = nn.RMSNorm(width // num_heads)

    def forward(self, x_BQW: Tensor, context_BKW: Tensor) -> Tensor:
        split = (self.num_heads, -1)
        q_BNQS = self.query(x_BQW).unflatten(-1, split).transpose(1, 2)
        k_BKW, v_BKW = self.key_value(context_BKW).chunk(2, -1)
        k_BNKS, v_BNKS = (h.unflatten(-1, split).transpose(1, 2) for h in (k_BKW, v_BKW))
        q_BNQS, k_BNKS = self.query_norm(q_BNQS).to(v_BNKS), self.key_norm(k_BNKS).to(v_BNKS)
        out_BNQS = F.scaled_dot_product_attention(q_BNQS, k_BNKS, v_BNKS, is_causal=self.causal)
        return self.out(out_BNQS.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm self-attention, optionally cross-attention, and a feed-forward block."""

    def __init__(self, width: int, num_heads: int, causal: bool = False, cross: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, num_heads) if cross else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BQW: Tensor, context_BKW: Tensor | None = None) -> Tensor:
        normed_BQW = self.attention_norm(x_BQW)
        x_BQW = x_BQW + self.attention(normed_BQW, normed_BQW)
        if self.cross_attention is not None:
            assert self.cross_norm is not None and context_BKW is not None
            x_BQW = x_BQW + self.cross_attention(self.cross_norm(x_BQW), context_BKW)
        return x_BQW + self.feed_forward(x_BQW)
