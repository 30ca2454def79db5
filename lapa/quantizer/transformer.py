"""A spatio-temporal transformer for large compute, after the paper's quantizer (arXiv 2410.11758, C-ViViT).

Shapes: B pairs, F frames, C = 3 colours, H = W = image_size, G patches along a side, P = G * G patches of a
frame, E = 3 * patch_size ** 2 numbers of a patch, W width, N heads, S width of a head, Q queries, K keys or
keypoints, L code_length, D latent_dim, V = W width of the condition.

Encoder: spatial layers within each frame, then temporal layers at each patch of the second frame, which see
that patch in both frames; the first frame's features know nothing of the second. The latent action is read
from how far keypoints moved between the features of the two frames. Decoder: the first frame's patches attend
to each other, and the latent action moves a copy of the frame, which they see and may show, and scales and
shifts what each block reads (FiLM, arXiv 1709.07871).

What makes it quick: a frame's spatial features are computed once, however many pairs it is in (`encode_clip`);
temporal layers update the second frame only; the softmax over two frames is a sigmoid; the condition costs
nothing a patch, where cross-attention costs two projections; attention has a form of its own for bfloat16 on CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.base import LatentActionQuantizer
from lapa.schema import Codebook, TransformerQuantizer

MOST_KEYS_WRITTEN_OUT = 256  # beyond, scores take more memory than the speed is worth


class TransformerLAQ(LatentActionQuantizer):
    """Spatial and temporal encoder layers; decoder layers that the latent action modulates."""

    config: TransformerQuantizer

    def __init__(self, config: TransformerQuantizer, codebook: Codebook):
        if config.image_size % config.patch_size or config.image_size == config.patch_size:
            raise ValueError(
                f"model.image_size is {config.image_size}: expected a multiple of model.patch_size = "
                f"{config.patch_size}, at least two patches"
            )
        if config.width % config.num_heads:
            raise ValueError(f"model.width is {config.width}: expected a multiple of num_heads = {config.num_heads}")
        super().__init__(config, codebook)
        width, heads = config.width, config.num_heads
        self.grid = config.image_size // config.patch_size
        patch = 3 * config.patch_size**2
        self.embed = nn.Linear(patch, width)
        self.position_PW = nn.Parameter(0.02 * torch.randn(self.grid**2, width))
        self.time_2W = nn.Parameter(0.02 * torch.randn(2, width))
        self.spatial = nn.ModuleList(Layer(width, heads) for _ in range(config.num_spatial_layers))
        temporal = [Layer(width, heads) for _ in range(config.num_temporal_layers)]
        for layer in temporal:
            # So that at first what stands still looks alike in both frames.
            layer.start_as_identity()
        self.temporal = nn.ModuleList(temporal)
        self.norm = nn.LayerNorm(width)
        self.displacement = DisplacementHead(
            width, self.grid, config.num_keypoints, codebook.code_length, config.latent_dim
        )
        self.condition = nn.Sequential(nn.Linear(codebook.code_length * config.latent_dim, width), nn.SiLU())
        self.motion = Motion(codebook.code_length * config.latent_dim, config.image_size, config.motion_radius)
        self.decoder_embed = nn.Linear(2 * patch, width)
        self.decoder = nn.ModuleList(Layer(width, heads, width) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, (3 + 1) * config.patch_size**2)
        # Zero: the first prediction is the first frame, a little moved, so that learning goes to what changes.
        zero_(self.to_pixels)

    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        first_BPW, second_BPW = self.frame_features(frames_B2CHW.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.compare(first_BPW, second_BPW)

    def encode_clip(self, frames_FCHW: Tensor, pairs_B2: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for pairs of these frames, named by index: a frame in two pairs costs its spatial layers once."""
        first_BPW, second_BPW = self.frame_features(frames_FCHW)[pairs_B2].unbind(1)
        quantised = self.codebook(self.compare(first_BPW, second_BPW))
        return quantised.codes_BN, quantised.latents_BLD

    def frame_features(self, frames_FCHW: Tensor) -> Tensor:
        """Features (F, P, W) of frames, each by itself; `compare` turns two of them into latents."""
        x_FPW = self.embed(self._patches(frames_FCHW)) + self.position_PW
        for layer in self.spatial:
            x_FPW = layer(x_FPW)
        return x_FPW

    def compare(self, first_BPW: Tensor, second_BPW: Tensor) -> Tensor:
        """Latents (B, L, D) before quantisation, from the features of first and second frames."""
        first_BPW = self.norm(first_BPW + self.time_2W[0])
        x_BPW = second_BPW + self.time_2W[1]
        for layer in self.temporal:
            x_BPW = layer(x_BPW, first_BPW=first_BPW)
        return self.displacement(first_BPW, self.norm(x_BPW))

    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        latent_BV = quantised_BLD.flatten(1)
        moved_BCHW = self.motion(first_BCHW, latent_BV)
        x_BPW = self.decoder_embed(self._patches(torch.cat([first_BCHW, moved_BCHW], 1))) + self.position_PW
        condition_BV = self.condition(latent_BV)
        for layer in self.decoder:
            x_BPW = layer(x_BPW, condition_BV=condition_BV)
        out_BEGG = self.to_pixels(self.decoder_norm(x_BPW)).float().mT.unflatten(2, (self.grid, self.grid))
        change_BCHW, gate_B1HW = F.pixel_shuffle(out_BEGG, self.config.patch_size).split([3, 1], 1)
        return first_BCHW + (gate_B1HW - 2).sigmoid() * (moved_BCHW - first_BCHW) + change_BCHW

    def _patches(self, frames_FCHW: Tensor) -> Tensor:
        """The pixels (F, P, E) of each patch, from -0.5 to 0.5."""
        return F.pixel_unshuffle(frames_FCHW - 0.5, self.config.patch_size).flatten(2).mT


class Motion(nn.Module):
    """Images (B, C, H, W) under one motion each, the same all over the image (arXiv 1605.07157).

    A pixel is taken from a bell of places at an offset that the latent action gives, sharper or wider as it says.
    Gradients reach the latent action through it from the first step on. Attention and FiLM alone take far longer to
    read the latent action, and until they do nothing teaches the encoder.
    """

    def __init__(self, latent_width: int, image_size: int, radius: float):
        super().__init__()
        self.bells = nn.Linear(latent_width, 4)
        place = torch.arange(image_size) / max(1.0, radius * image_size)
        self.register_buffer("offset_HH", place - place[:, None], persistent=False)

    def forward(self, images_BCHW: Tensor, latent_BV: Tensor) -> Tensor:
        with torch.autocast(images_BCHW.device.type, enabled=False):
            centre_B2, sharpness_B2 = self.bells(latent_BV.float()).chunk(2, -1)
            distance_B2HH = (self.offset_HH - centre_B2[..., None, None]).square()
            bells_B2HH = (-4 * F.softplus(sharpness_B2 + 0.5)[..., None, None] * distance_B2HH).softmax(-1)
            # Bells are separable: one matrix product moves along each axis.
            rows_B1HH, columns_B1HH = bells_B2HH.split(1, 1)
            return rows_B1HH @ images_BCHW @ columns_B1HH.mT


class DisplacementHead(nn.Module):
    """Latents (B, L, D) from how far each keypoint moved between two frames of features (B, P, W).

    A keypoint is the expected place under the softmax of one map over the patches (arXiv 1509.06113). What moves
    takes its share of a map along, so the displacement is the same wherever the motion began, and maps of random
    weights already tell most of it. The gain undoes the 1 / P of weights that spread over all patches: latents
    must be far larger than the epsilon of the codebook's normalisation, or all pairs get one code.
    """

    def __init__(self, width: int, grid: int, num_keypoints: int, code_length: int, latent_dim: int):
        super().__init__()
        self.shape, self.gain = (code_length, latent_dim), grid**2
        self.maps = nn.Linear(width, num_keypoints, bias=False)
        nn.init.normal_(self.maps.weight, std=width**-0.5)
        side = torch.linspace(-1, 1, grid)
        self.register_buffer("place_P2", torch.cartesian_prod(side, side), persistent=False)
        self.out = nn.Linear(2 * num_keypoints, code_length * latent_dim, bias=False)

    def forward(self, first_BPW: Tensor, second_BPW: Tensor) -> Tensor:
        moved_BK2 = self.keypoints(second_BPW) - self.keypoints(first_BPW)
        return self.out(self.gain * moved_BK2.flatten(1)).unflatten(1, self.shape)

    def keypoints(self, x_BPW: Tensor) -> Tensor:
        """Places (B, K, 2), row and column from -1 to 1, in float32."""
        weights_BPK = self.maps(x_BPW).float().softmax(1)
        return weights_BPK.mT @ self.place_P2


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward block; a condition may scale and shift what each of them reads."""

    def __init__(self, width: int, num_heads: int, condition_width: int = 0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.film = nn.Linear(condition_width, 4 * width) if condition_width else None

    def start_as_identity(self) -> None:
        zero_(self.attention.out)
        zero_(self.narrow)

    def forward(self, x_BPW: Tensor, *, first_BPW: Tensor | None = None, condition_BV: Tensor | None = None) -> Tensor:
        """Patches that attend to each other; with `first_BPW`, each to itself and to its like in the first frame."""
        attention_film = feed_forward_film = None
        if self.film is not None:
            attention_film, feed_forward_film = self.film(condition_BV)[:, None].chunk(2, -1)
        x_BPW = x_BPW + self.attention(modulate(self.attention_norm(x_BPW), attention_film), first_BPW)
        normed_BPW = modulate(self.feed_forward_norm(x_BPW), feed_forward_film)
        return x_BPW + self.narrow(F.gelu(self.widen(normed_BPW)))


def zero_(linear: nn.Linear) -> None:
    """Zero weights and bias."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)


def modulate(x_BPW: Tensor, scale_and_shift_B1U: Tensor | None) -> Tensor:
    """x (1 + scale) + shift, from U = 2 W numbers a pair; x itself where there are none."""
    if scale_and_shift_B1U is None:
        return x_BPW
    scale_B1W, shift_B1W = scale_and_shift_B1U.chunk(2, -1)
    return torch.addcmul(shift_B1W, x_BPW, 1 + scale_B1W)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (arXiv 2302.05442)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        # One gain does for both: only the product of query and key is ever read.
        self.query_norm = nn.LayerNorm(width // num_heads, bias=False)
        self.key_norm = nn.LayerNorm(width // num_heads, elementwise_affine=False)

    def forward(self, x_BPW: Tensor, first_BPW: Tensor | None = None) -> Tensor:
        """What patches read (B, P, W): from each other, or with `first_BPW` from themselves and their like there."""
        q_BPNS, k_BPNS, v_BPNS = self.query_key_value(x_BPW).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q_BPNS, k_BPNS = self.query_norm(q_BPNS).to(v_BPNS), self.key_norm(k_BPNS).to(v_BPNS)
        if first_BPW is None:
            read_BNPS = attend(q_BPNS.transpose(1, 2), k_BPNS.transpose(1, 2), v_BPNS.transpose(1, 2))
            return self.out(read_BNPS.transpose(1, 2).flatten(2))
        key_value = self.query_key_value.weight[x_BPW.shape[-1] :]
        k1_BPNS, v1_BPNS = F.linear(first_BPW, key_value).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        k1_BPNS = self.key_norm(k1_BPNS).to(v1_BPNS)
        return self.out(attend_to_two(q_BPNS, k1_BPNS, v1_BPNS, k_BPNS, v_BPNS).flatten(2))


def attend(q_BNQS: Tensor, k_BNKS: Tensor, v_BNKS: Tensor) -> Tensor:
    """Softmax attention (B, N, Q, S) at scale S ** -0.5.

    By the fused kernel, except in bfloat16 on CPU: forward and backward of that kernel take seven times as long
    there as plain matrix products do.
    """
    plain = q_BNQS.device.type == "cpu" and q_BNQS.dtype == torch.bfloat16
    if not plain or k_BNKS.shape[2] > MOST_KEYS_WRITTEN_OUT:
        return F.scaled_dot_product_attention(q_BNQS, k_BNKS, v_BNKS)
    scores_BNQK = (q_BNQS * q_BNQS.shape[-1] ** -0.5) @ k_BNKS.mT
    return scores_BNQK.softmax(-1) @ v_BNKS


def attend_to_two(q_BPNS: Tensor, k1_BPNS: Tensor, v1_BPNS: Tensor, k2_BPNS: Tensor, v2_BPNS: Tensor) -> Tensor:
    """Softmax attention (B, P, N, S) of every patch to two keys of its own: the softmax of two is a sigmoid."""
    score_BPN1 = (q_BPNS * (k2_BPNS - k1_BPNS)).sum(-1, keepdim=True) * q_BPNS.shape[-1] ** -0.5
    return torch.lerp(v1_BPNS, v2_BPNS, score_BPN1.sigmoid())
