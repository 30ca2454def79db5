"""The released quantizer's architecture (arXiv 2410.11758), for its weights: `lapa import_laq`, `model=laq`.

Parameter names and shapes are the released ones, so that weights load strictly; `laq_reference.py` spells the maths
out plainly, and this file must give the same codes. It is quicker by: fused attention; the position bias from the
(2 G - 1)^2 offsets that occur instead of all P^2 pairs of patches; attention over two frames in closed form;
position convolutions over images instead of padded volumes; both frames in one pass.

With `compat` off, three slips of the released code are put right, which its weights do not survive: the temporal
position convolution reads patches and frames in their order, the quantised latents keep theirs, and temporal
attention is causal as in C-ViViT, so that the first frame's features know nothing of the second.

Shapes: B pairs, T frames, C = 3 colours, H = W = image_size, G patches along a side, P = G * G patches of a frame,
E numbers of a patch, W width, N heads, S head width, Q queries, K keys, F frames or patches that are attended
within, M relative offsets, L code_length, D latent_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.base import LatentActionQuantizer
from lapa.schema import Codebook, LAQQuantizer

ATTENTION_SCALE = 8.0
NUM_NULL_KEYS = 2  # of cross-attention
RELEASED_CODES, CODES = "vq.codebooks", "codebook.codebooks"
# code_length -> patches along a side, and (kernel, stride, padding) of the second convolution, if there is one.
COMPRESSIONS: dict[int, tuple[int, tuple | None]] = {
    1: (8, (4, 1, 0)),
    2: (8, ((3, 4), 1, 0)),
    4: (8, (3, 1, 0)),
    16: (16, (3, 2, 1)),
    64: (16, None),
    256: (32, None),
}


class LAQ(LatentActionQuantizer):
    """Spatial, then temporal encoder; a small CNN on each frame, their difference; decoder with cross-attention."""

    config: LAQQuantizer

    def __init__(self, config: LAQQuantizer, codebook: Codebook):
        grid = config.image_size // config.patch_size
        if codebook.code_length not in COMPRESSIONS:
            raise ValueError(f"codebook.code_length is {codebook.code_length}: model=laq has {sorted(COMPRESSIONS)}")
        if config.image_size % config.patch_size or grid != COMPRESSIONS[codebook.code_length][0]:
            expected = COMPRESSIONS[codebook.code_length][0]
            raise ValueError(
                f"model.image_size is {config.image_size} and model.patch_size {config.patch_size}: code_length "
                f"{codebook.code_length} takes {expected} patches along a side, as image_size="
                f"{expected * config.patch_size} has"
            )
        super().__init__(config, codebook)
        width, numbers = config.width, 3 * config.patch_size**2
        sizes = (width, config.num_heads, config.head_width, grid)
        self.spatial_rel_pos_bias = PositionBias(width, config.num_heads, grid)
        self.to_patch_emb_first_frame = nn.Sequential(
            ToPatches(config.patch_size), nn.LayerNorm(numbers), nn.Linear(numbers, width), nn.LayerNorm(width)
        )
        self.enc_spatial_transformer = Transformer("spatial", config.num_spatial_layers, *sizes)
        self.enc_temporal_transformer = Transformer("temporal", config.num_temporal_layers, *sizes, config.compat)
        self.vq = Compression(width, config.latent_dim, grid, codebook.code_length, config.compat)
        self.dec_spatial_transformer = Transformer("decoder", config.num_decoder_layers, *sizes)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(width, numbers), ToImages(config.patch_size, grid))

    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        batch = len(frames_B2CHW)
        x_FPW = self.to_patch_emb_first_frame(frames_B2CHW.flatten(0, 1))
        x_FPW = self.enc_spatial_transformer(x_FPW, self.spatial_rel_pos_bias())
        x_FTW = x_FPW.unflatten(0, (batch, 2)).transpose(1, 2).flatten(0, 1)
        x_BPTW = self.enc_temporal_transformer(x_FTW).unflatten(0, (batch, -1))
        latents_BTLD = self.vq.compress(x_BPTW.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, 2))
        return latents_BTLD[:, 1] - latents_BTLD[:, 0]

    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        # Detached, as released: the error of the prediction does not shape the embedding.
        x_BPW = self.to_patch_emb_first_frame(first_BCHW).detach()
        context_BLW = self.vq.expand(quantised_BLD)
        return self.to_pixels_first_frame(self.dec_spatial_transformer(x_BPW, self.spatial_rel_pos_bias(), context_BLW))


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the tensors of a released state: `module.` goes, and the codes belong to the codebook."""
    names = {name: name.removeprefix("module.") for name in state}
    return {CODES if names[name] == RELEASED_CODES else names[name]: tensor for name, tensor in state.items()}


class ToPatches(nn.Module):
    """Patches (F, P, E) of images (F, C, H, W), each read colour by colour, row by row."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, frames_FCHW: Tensor) -> Tensor:
        return F.pixel_unshuffle(frames_FCHW, self.patch_size).flatten(2).mT


class ToImages(nn.Module):
    """Images (F, C, H, W) of patches (F, P, E)."""

    def __init__(self, patch_size: int, grid: int):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid

    def forward(self, x_FPE: Tensor) -> Tensor:
        return F.pixel_shuffle(x_FPE.mT.unflatten(2, (self.grid, self.grid)), self.patch_size)


class PositionBias(nn.Module):
    """(N, P, P) float32, added to attention scores: an MLP of the signed logarithmic offset of two patches.

    After arXiv 2111.09883. The MLP sees every offset once, not every pair of patches.
    """

    def __init__(self, width: int, num_heads: int, grid: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1)),
            nn.Linear(width, num_heads),
        )
        offset = torch.arange(1 - grid, grid)
        offsets_M2 = torch.cartesian_prod(offset, offset).float()
        place = torch.arange(grid)
        row_P, column_P = torch.cartesian_prod(place, place).unbind(1)
        row_PP, column_PP = (x[:, None] - x[None, :] + grid - 1 for x in (row_P, column_P))
        self.inputs_M2: Tensor
        self.offset_PP: Tensor
        self.register_buffer("inputs_M2", offsets_M2.sign() * (offsets_M2.abs() + 1).log(), persistent=False)
        self.register_buffer("offset_PP", row_PP * (2 * grid - 1) + column_PP, persistent=False)

    def forward(self) -> Tensor:
        with torch.autocast(self.inputs_M2.device.type, enabled=False):
            return self.net(self.inputs_M2)[self.offset_PP].permute(2, 0, 1)


class GainNorm(nn.Module):
    """Layer norm with a gain; its shift is saved and never trained. Where it is unused, neither is the gain."""

    def __init__(self, width: int, used: bool = True):
        super().__init__()
        self.gamma: Tensor
        self.beta: Tensor
        if used:
            self.gamma = nn.Parameter(torch.ones(width))
        else:
            self.register_buffer("gamma", torch.ones(width))
        self.register_buffer("beta", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PositionConvolution(nn.Module):
    """Adds a depthwise 3 x 3 x 3 convolution to the tokens, causal in time.

    Of one or two frames a causal kernel sees its last two slices only: one convolution of all frames as images,
    and one of the first frame for the second.
    """

    def __init__(self, width: int, grid: int, num_frames: int, patches_first: bool = False):
        super().__init__()
        self.grid, self.num_frames, self.patches_first = grid, num_frames, patches_first
        self.dsconv = nn.Conv3d(width, width, 3, groups=width)

    def forward(self, x_FKW: Tensor) -> Tensor:
        """Args: x_FKW: tokens laid out (pair, frame, patch), or (pair, patch, frame) if `patches_first`."""
        frames, width = self.num_frames, x_FKW.shape[-1]
        x_BTPW = x_FKW.reshape(-1, frames, self.grid**2, width)
        if self.patches_first:
            x_BTPW = x_FKW.reshape(-1, self.grid**2, frames, width).transpose(1, 2)
        images_FWGG = x_BTPW.flatten(0, 1).mT.unflatten(2, (self.grid, self.grid))
        _, before, now = self.dsconv.weight.unbind(2)
        out_FWGG = F.conv2d(images_FWGG, now, self.dsconv.bias, padding=1, groups=width)
        if frames == 2:
            first_BWGG, second_BWGG = out_FWGG.unflatten(0, (-1, 2)).unbind(1)
            carried_BWGG = F.conv2d(images_FWGG[::2], before, padding=1, groups=width)
            out_FWGG = torch.stack([first_BWGG, second_BWGG + carried_BWGG], 1).flatten(0, 1)
        out_BTPW = out_FWGG.flatten(2).mT.unflatten(0, (-1, frames))
        if self.patches_first:
            out_BTPW = out_BTPW.transpose(1, 2)
        return x_FKW + out_BTPW.reshape(x_FKW.shape)


class Attention(nn.Module):
    """softmax(8 q k + bias) v with L2-normalised, scaled q and k; keys and values come from tokens as they are."""

    def __init__(self, width: int, num_heads: int, head_width: int, cross: bool = False):
        super().__init__()
        self.num_heads, self.cross = num_heads, cross
        self.norm, self.context_norm = GainNorm(width), GainNorm(width, used=cross)
        self.null_kv: Tensor
        if cross:
            self.null_kv = nn.Parameter(torch.randn(num_heads, 2 * NUM_NULL_KEYS, head_width))
        else:
            self.register_buffer("null_kv", torch.empty(num_heads, 0, head_width))
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.q_scale = nn.Parameter(torch.ones(head_width))
        self.k_scale = nn.Parameter(torch.ones(head_width))
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x_FQW: Tensor, bias_NQK: Tensor | None = None, context_FKW: Tensor | None = None) -> Tensor:
        """Tokens (F, Q, W) plus what they gather from the context, or from each other where there is none."""
        keys_values = self.to_kv(x_FQW if context_FKW is None else self.context_norm(context_FKW))
        q_FNQS = self.to_q(self.norm(x_FQW)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_FNKS, v_FNKS = keys_values.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, 1)
        if self.cross:
            null_FNKS = self.null_kv.expand(len(x_FQW), -1, -1, -1).to(v_FNKS)
            k_FNKS = torch.cat([null_FNKS[:, :, 0::2], k_FNKS], 2)
            v_FNKS = torch.cat([null_FNKS[:, :, 1::2], v_FNKS], 2)
        q_FNQS = F.normalize(q_FNQS, dim=-1) * self.q_scale
        k_FNKS = F.normalize(k_FNKS, dim=-1) * self.k_scale
        out_FNQS = self.attend(q_FNQS, k_FNKS, v_FNKS, bias_NQK)
        return x_FQW + self.to_out(out_FNQS.transpose(1, 2).flatten(2))

    def attend(self, q_FNQS: Tensor, k_FNKS: Tensor, v_FNKS: Tensor, bias_NQK: Tensor | None) -> Tensor:
        q_FNQS, k_FNKS = q_FNQS.to(v_FNKS), k_FNKS.to(v_FNKS)
        mask = None if bias_NQK is None else bias_NQK.to(v_FNKS)[None]
        return F.scaled_dot_product_attention(q_FNQS, k_FNKS, v_FNKS, attn_mask=mask, scale=ATTENTION_SCALE)


class PairAttention(Attention):
    """Attention over two tokens: the softmax of two scores is a sigmoid of their difference."""

    def __init__(self, width: int, num_heads: int, head_width: int, causal: bool):
        super().__init__(width, num_heads, head_width)
        self.causal = causal

    def attend(self, q_FNQS: Tensor, k_FNKS: Tensor, v_FNKS: Tensor, bias_NQK: Tensor | None) -> Tensor:
        difference_FN1S = k_FNKS[:, :, :1] - k_FNKS[:, :, 1:]
        on_first_FNQ1 = (ATTENTION_SCALE * (q_FNQS * difference_FN1S).sum(-1, keepdim=True)).sigmoid()
        if self.causal:
            on_first_FNQ1 = torch.cat([torch.ones_like(on_first_FNQ1[:, :, :1]), on_first_FNQ1[:, :, 1:]], 2)
        return torch.lerp(v_FNKS[:, :, 1:], v_FNKS[:, :, :1], on_first_FNQ1.to(v_FNKS))


class GatedGELU(nn.Module):
    """x GELU(g) for the halves x, g of the input."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


class Layer(nn.ModuleDict):
    """Position convolution "0", attention "1", cross-attention "2" of the decoder, feed-forward "3", as released."""

    def __init__(self, kind: str, width: int, num_heads: int, head_width: int, grid: int, compat: bool):
        sizes, temporal = (width, num_heads, head_width), kind == "temporal"
        inner = int(4 * (2 / 3) * width)
        num_frames = 1 if kind == "decoder" else 2
        parts = {
            # The released code reads the temporal layers' tokens (pair, patch, frame) as (pair, frame, patch).
            "0": PositionConvolution(width, grid, num_frames, patches_first=temporal and not compat),
            "1": PairAttention(*sizes, causal=not compat) if temporal else Attention(*sizes),
            "3": nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * inner, bias=False),
                GatedGELU(),
                nn.Identity(),
                nn.Linear(inner, width, bias=False),
            ),
        }
        if kind == "decoder":
            parts["2"] = Attention(*sizes, cross=True)
        super().__init__(parts)

    def forward(self, x_FKW: Tensor, bias_NQK: Tensor | None, context_FKW: Tensor | None) -> Tensor:
        x_FKW = self["1"](self["0"](x_FKW), bias_NQK)
        if context_FKW is not None:
            x_FKW = self["2"](x_FKW, None, context_FKW)
        return x_FKW + self["3"](x_FKW)


class Transformer(nn.Module):
    """Layers of one kind (spatial, temporal or decoder) and a norm at the end."""

    def __init__(
        self, kind: str, num_layers: int, width: int, num_heads: int, head_width: int, grid: int, compat: bool = True
    ):
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind, width, num_heads, head_width, grid, compat) for _ in range(num_layers))
        self.norm_out = GainNorm(width)

    def forward(self, x_FKW: Tensor, bias_NQK: Tensor | None = None, context_FKW: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x_FKW = layer(x_FKW, bias_NQK, context_FKW)
        return self.norm_out(x_FKW)


class Compression(nn.Module):
    """A frame's tokens (P, W) down to the latent action's (L, D) by two convolutions, and back to width W."""

    def __init__(self, width: int, latent_dim: int, grid: int, code_length: int, compat: bool):
        super().__init__()
        self.grid, self.compat = grid, compat
        self.project_in, self.project_out = nn.Linear(width, latent_dim), nn.Linear(latent_dim, width)
        second = COMPRESSIONS[code_length][1]
        halve = nn.Conv2d(latent_dim, latent_dim, 3, 2, 1)
        rest = () if second is None else (nn.ReLU(), nn.Conv2d(latent_dim, latent_dim, *second))
        self.cnn_encoder = nn.Sequential(halve, *rest)

    def compress(self, x_FPW: Tensor) -> Tensor:
        """(F, L, D) from tokens (F, P, W)."""
        x_FDGG = self.project_in(x_FPW).mT.unflatten(2, (self.grid, self.grid))
        return self.cnn_encoder(x_FDGG).flatten(2).mT

    def expand(self, quantised_BLD: Tensor) -> Tensor:
        """(B, L, W), what the decoder attends to."""
        if self.compat:
            # The released code takes (B, L, D) for (B, D, L) here.
            batch, length, latent_dim = quantised_BLD.shape
            quantised_BLD = quantised_BLD.reshape(batch, latent_dim, length).mT
        return self.project_out(quantised_BLD)
