"""The released quantizer spelled out: plain and slow, the yardstick for parity (`laq.py`) and speed (`benchmark.py`).

The maths of the released LAQ (arXiv 2410.11758, repository LatentActionPretraining/LAPA, folder laq) with its
parameter names, explicit softmax attention and no fused kernel. It shares no code with `laq.py`, so that an error
in one shows in the other. Nothing but tests and the benchmark builds it.

Shapes: B pairs, T = 2 frames, C = 3 colours, H = W = image_size, G patches along a side, P = G * G patches,
E = 3 * patch_size ** 2 numbers of a patch, W width, N heads, S head width, Q queries, K keys, F frames or patches
that are attended within, L code_length, D latent_dim.

What a reader would not guess:
  - Queries are made from normalised tokens, keys and values of self-attention from tokens that are not; the
    context norm of self-attention exists and is never used.
  - Queries and keys (null keys too) are L2-normalised, scaled per channel, and their product is multiplied by 8.
  - Cross-attention sees two learned null keys and values, stored as k0 v0 k1 v1; they get no position bias.
  - Before every self-attention stands a depthwise 3x3x3 convolution, causal in time. In the temporal layers it
    reads memory laid out (patch, frame) as if it were (frame, patch).
  - Temporal attention is not causal.
  - The quantised latents (B, L, D) are reshaped to (B, D, L) and transposed: a scramble, not a transpose.
  - The decoder starts from the detached patch embedding of the first frame, which has passed no encoder layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_SCALE = 8
NUM_NULL_KEYS = 2


class ReferenceLAQ(nn.Module):
    """The released architecture at any size; the defaults are those of `laq_openx.pt` (343,864,688 numbers)."""

    def __init__(
        self,
        *,
        image_size: int = 256,
        patch_size: int = 32,
        width: int = 1024,
        num_heads: int = 16,
        head_width: int = 64,
        num_spatial_layers: int = 8,
        num_temporal_layers: int = 8,
        num_decoder_layers: int = 8,
        code_length: int = 4,
        codebook_size: int = 8,
        latent_dim: int = 32,
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, image_size // patch_size
        numbers = 3 * patch_size**2
        self.spatial_rel_pos_bias = ReferencePositionBias(width, num_heads)
        self.to_patch_emb_first_frame = nn.ModuleDict(
            {"1": nn.LayerNorm(numbers), "2": nn.Linear(numbers, width), "3": nn.LayerNorm(width)}
        )
        sizes = (width, num_heads, head_width)
        self.enc_spatial_transformer = ReferenceTransformer(*sizes, num_spatial_layers)
        self.enc_temporal_transformer = ReferenceTransformer(*sizes, num_temporal_layers)
        self.vq = ReferenceCodebook(width, self.grid, code_length, codebook_size, latent_dim)
        self.dec_spatial_transformer = ReferenceTransformer(*sizes, num_decoder_layers, cross=True)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(width, numbers))

    def forward(self, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Training: mean squared error of the second frame, with noise for the quantisation error, and codes (B, L)."""
        z_BLD = self.latents(frames_BTCHW)
        codes_BL = self.vq.nearest(z_BLD)
        reconstruction_BCHW = self.decode(frames_BTCHW[:, 0], self.vq.with_noise(z_BLD, codes_BL))
        return F.mse_loss(reconstruction_BCHW, frames_BTCHW[:, 1]), codes_BL

    def infer(self, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Inference: codes (B, L) and the second frame (B, C, H, W) that they give."""
        codes_BL = self.label(frames_BTCHW)
        return codes_BL, self.decode(frames_BTCHW[:, 0], self.vq.codebooks[codes_BL])

    def label(self, frames_BTCHW: Tensor) -> Tensor:
        """Codes (B, L) of frame pairs in [0, 1]."""
        return self.vq.nearest(self.latents(frames_BTCHW))

    def latents(self, frames_BTCHW: Tensor) -> Tensor:
        """Latents (B, L, D) before quantisation: the difference of the frames after projection and convolutions."""
        batch, side = len(frames_BTCHW), self.grid
        x_FPW = torch.stack([self.embed(frame) for frame in frames_BTCHW.unbind(1)], 1).flatten(0, 1)
        video = (batch, 2, side, side)
        x_FPW = self.enc_spatial_transformer(x_FPW, video, position_bias_NPP=self.spatial_rel_pos_bias(side))
        x_BTPW = x_FPW.reshape(batch, 2, side**2, -1)
        x_FTW = x_BTPW.transpose(1, 2).reshape(batch * side**2, 2, -1)
        x_FTW = self.enc_temporal_transformer(x_FTW, video)
        x_BPTW = x_FTW.reshape(batch, side**2, 2, -1)
        return self.vq.compress(x_BPTW[:, :, 1]) - self.vq.compress(x_BPTW[:, :, 0])

    def decode(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        """The second frame (B, C, H, W)."""
        batch, side, patch = len(first_BCHW), self.grid, self.patch_size
        x_BPW = self.dec_spatial_transformer(
            self.embed(first_BCHW).detach(),
            (batch, 1, side, side),
            position_bias_NPP=self.spatial_rel_pos_bias(side),
            context_BKW=self.vq.expand(quantised_BLD),
        )
        x_BPE = self.to_pixels_first_frame(x_BPW)
        return x_BPE.reshape(batch, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(first_BCHW.shape)

    def embed(self, frame_BCHW: Tensor) -> Tensor:
        """Tokens (B, P, W) of the patches of one frame; a patch is read colour by colour, row by row."""
        batch, side, patch = len(frame_BCHW), self.grid, self.patch_size
        x_BCGpGp = frame_BCHW.reshape(batch, 3, side, patch, side, patch)
        x_BPE = x_BCGpGp.permute(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
        for layer in self.to_patch_emb_first_frame.values():
            x_BPE = layer(x_BPE)
        return x_BPE


class ReferencePositionBias(nn.Module):
    """(N, P, P): an MLP of the signed logarithmic distances (rows, columns) between each two patches."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        first = nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.1))
        second = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1))
        self.net = nn.Sequential(first, second, nn.Linear(width, num_heads))

    def forward(self, grid: int) -> Tensor:
        side = torch.arange(grid, device=next(self.parameters()).device)
        place_P2 = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
        distance_PP2 = (place_P2[:, None] - place_P2[None, :]).float()
        return self.net(distance_PP2.sign() * (distance_PP2.abs() + 1).log()).permute(2, 0, 1)


class ReferenceTransformer(nn.Module):
    """Layers of position convolution, self-attention, perhaps cross-attention, and feed-forward; a norm at the end."""

    def __init__(self, width: int, num_heads: int, head_width: int, num_layers: int, cross: bool = False):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            convolution = nn.ModuleDict({"dsconv": nn.Conv3d(width, width, 3, groups=width)})
            layer: dict[str, nn.Module] = {"0": convolution}
            layer["1"] = ReferenceAttention(width, num_heads, head_width, 0)
            if cross:
                layer["2"] = ReferenceAttention(width, num_heads, head_width, NUM_NULL_KEYS)
            layer["3"] = ReferenceFeedForward(width)
            self.layers.append(nn.ModuleDict(layer))
        self.norm_out = GainNorm(width)

    def forward(
        self,
        x_FKW: Tensor,
        video: tuple[int, int, int, int],
        position_bias_NPP: Tensor | None = None,
        context_BKW: Tensor | None = None,
    ) -> Tensor:
        """Args: video: (pairs, frames, rows, columns), as which the position convolution reads the tokens."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            convolution, attention = layer["0"], layer["1"]
            assert isinstance(convolution, nn.ModuleDict)
            x_BTGGW = x_FKW.reshape(*video, -1)
            x_BWTGG = F.pad(x_BTGGW.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
            x_BTGGW = convolution["dsconv"](x_BWTGG).permute(0, 2, 3, 4, 1)
            x_FKW = x_FKW + x_BTGGW.reshape(x_FKW.shape)
            x_FKW = x_FKW + attention(x_FKW, x_FKW, position_bias_NPP)
            if context_BKW is not None:
                cross_attention = layer["2"]
                assert isinstance(cross_attention, ReferenceAttention)
                x_FKW = x_FKW + cross_attention(x_FKW, cross_attention.context_norm(context_BKW), None)
            x_FKW = x_FKW + layer["3"](x_FKW)
        return self.norm_out(x_FKW)


class ReferenceAttention(nn.Module):
    """softmax(8 q k + bias) v with L2-normalised, scaled q and k."""

    def __init__(self, width: int, num_heads: int, head_width: int, num_null_keys: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.context_norm = GainNorm(width), GainNorm(width)
        self.null_kv = nn.Parameter(torch.randn(num_heads, 2 * num_null_keys, head_width))
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.q_scale = nn.Parameter(torch.ones(head_width))
        self.k_scale = nn.Parameter(torch.ones(head_width))
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x_BQW: Tensor, context_BKW: Tensor, bias_NQK: Tensor | None) -> Tensor:
        batch = len(x_BQW)
        k_BKW, v_BKW = self.to_kv(context_BKW).chunk(2, -1)
        q_BNQS, k_BNKS, v_BNKS = (
            h.reshape(batch, -1, self.num_heads, h.shape[-1] // self.num_heads).transpose(1, 2)
            for h in (self.to_q(self.norm(x_BQW)), k_BKW, v_BKW)
        )
        null_BNKS = self.null_kv.expand(batch, -1, -1, -1)
        k_BNKS = torch.cat([null_BNKS[:, :, 0::2], k_BNKS], 2)
        v_BNKS = torch.cat([null_BNKS[:, :, 1::2], v_BNKS], 2)
        q_BNQS = F.normalize(q_BNQS, dim=-1) * self.q_scale
        k_BNKS = F.normalize(k_BNKS, dim=-1) * self.k_scale
        score_BNQK = torch.einsum("bnqs,bnks->bnqk", q_BNQS, k_BNKS) * ATTENTION_SCALE
        if bias_NQK is not None:
            score_BNQK = score_BNQK + bias_NQK
        out_BNQS = torch.einsum("bnqk,bnks->bnqs", score_BNQK.softmax(-1), v_BNKS)
        return self.to_out(out_BNQS.transpose(1, 2).reshape(batch, x_BQW.shape[1], -1))


class ReferenceFeedForward(nn.Module):
    """Norm, then a gated linear unit: x GELU(g), two thirds of four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        inner = int(4 * (2 / 3) * width)
        self.add_module("0", nn.LayerNorm(width))
        self.add_module("1", nn.Linear(width, 2 * inner, bias=False))
        self.add_module("4", nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        norm, widen, narrow = self.children()
        value, gate = widen(norm(x)).chunk(2, -1)
        return narrow(value * F.gelu(gate))


class GainNorm(nn.Module):
    """Layer norm with a gain; beta is saved and always zero."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta: Tensor
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class ReferenceCodebook(nn.Module):
    """Noise substitution in vector quantisation (Vali and Baeckstroem 2022) around one codebook for all tokens."""

    def __init__(self, width: int, grid: int, code_length: int, codebook_size: int, latent_dim: int):
        super().__init__()
        self.grid = grid
        self.codebooks = nn.Parameter(torch.randn(codebook_size, latent_dim))
        self.project_in = nn.Linear(width, latent_dim)
        self.project_out = nn.Linear(latent_dim, width)
        halve = nn.Conv2d(latent_dim, latent_dim, 3, 2, 1)
        second: dict[int, tuple] = {1: (4, 1, 0), 2: ((3, 4), 1, 0), 4: (3, 1, 0), 16: (3, 2, 1)}
        if code_length in (64, 256):
            self.cnn_encoder = nn.Sequential(halve)
        else:
            last = nn.Conv2d(latent_dim, latent_dim, *second[code_length])
            self.cnn_encoder = nn.Sequential(halve, nn.ReLU(), last)

    def compress(self, x_BPW: Tensor) -> Tensor:
        """(B, L, D): the tokens of one frame, projected and convolved down to the tokens of a latent action."""
        x_BDGG = self.project_in(x_BPW).transpose(1, 2).reshape(len(x_BPW), -1, self.grid, self.grid)
        return self.cnn_encoder(x_BDGG).flatten(2).transpose(1, 2)

    def nearest(self, z_BLD: Tensor) -> Tensor:
        """Codes (B, L)."""
        z_MD = z_BLD.flatten(0, 1)
        distance_MK = (z_MD**2).sum(1, keepdim=True) - 2 * z_MD @ self.codebooks.t() + (self.codebooks**2).sum(1)
        return distance_MK.argmin(1).reshape(z_BLD.shape[:2])

    def with_noise(self, z_BLD: Tensor, codes_BL: Tensor) -> Tensor:
        """z plus noise as long as the quantisation error, which lets gradients reach latents and codes."""
        noise_BLD = torch.randn_like(z_BLD)
        error_BL1 = (z_BLD - self.codebooks[codes_BL]).square().sum(-1, keepdim=True).sqrt()
        return z_BLD + (error_BL1 / noise_BLD.square().sum(-1, keepdim=True).sqrt() + 1e-12) * noise_BLD

    def expand(self, quantised_BLD: Tensor) -> Tensor:
        """(B, L, W): what the decoder attends to."""
        batch, length, latent_dim = quantised_BLD.shape
        return self.project_out(quantised_BLD.reshape(batch, latent_dim, length).transpose(1, 2))
