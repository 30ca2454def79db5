"""A small quantizer for small compute: keypoints tell what moved, and a forward model moves pixels.

Shapes: B batch, C = 3 colours, H = W = image_size, L code_length, D latent_dim, F features, P keypoints,
M motions, R = 2 r + 1 positions that a motion can reach along one axis.

The inverse model reads the displacement of keypoints, the spatial softmax of Finn et al. 2016 (Deep Spatial
Autoencoders, arXiv 1509.06113): a difference of positions is nearly linear in the action from the first step
on, and blind to what stands still. The forward model follows dynamic neural advection (Finn, Goodfellow and
Levine 2016, arXiv 1605.07157): the latent action gives M motion kernels that are the same all over the image,
and a U-Net that sees the first frame and its moved copies chooses, a pixel, between staying, one of the
motions, and a new colour. So a latent action says where things go, and means the same anywhere in the image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.quantizer.base import LatentActionQuantizer
from lapa.schema import Codebook, ConvolutionalQuantizer


class ConvolutionalLAQ(LatentActionQuantizer):
    """Inverse model over both frames; U-Net over the first frame and its moved copies."""

    config: ConvolutionalQuantizer

    def __init__(self, config: ConvolutionalQuantizer, codebook: Codebook):
        if config.image_size % 16:
            raise ValueError(f"model.image_size is {config.image_size}: expected a multiple of 16")
        super().__init__(config, codebook)
        self.inverse_model = InverseModel(config, codebook.code_length)
        self.forward_model = ForwardModel(config, codebook.code_length)

    def infer(self, frames_B2CHW: Tensor) -> Tensor:
        return self.inverse_model(frames_B2CHW)

    def predict(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        return self.forward_model(first_BCHW, quantised_BLD)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip; `condition` scales and shifts between them (FiLM)."""

    def __init__(self, width: int, condition_width: int = 0):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.film = nn.Linear(condition_width, 2 * width) if condition_width else None
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BFHW: Tensor, condition_BD: Tensor | None = None) -> Tensor:
        h_BFHW = self.conv1(self.norm(x_BFHW))
        if self.film is not None:
            scale_BF11, shift_BF11 = self.film(condition_BD)[..., None, None].chunk(2, 1)
            h_BFHW = h_BFHW * (1 + scale_BF11) + shift_BF11
        return x_BFHW + self.conv2(F.silu(h_BFHW))


class InverseModel(nn.Module):
    """Latents (B, L, D) from frame pairs: how far each keypoint moved from one frame to the other."""

    def __init__(self, config: ConvolutionalQuantizer, code_length: int):
        super().__init__()
        width = config.width
        self.shape = (code_length, config.latent_dim)
        self.stem = nn.Conv2d(12, width, 3, 1, 1)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.block = ResidualBlock(2 * width)
        self.keypoints = nn.Conv2d(2 * width, config.num_keypoints, 1)
        self.head = nn.Linear(2 * config.num_keypoints, code_length * config.latent_dim)

    def forward(self, frames_B2CHW: Tensor) -> Tensor:
        frames_NCHW = frames_B2CHW.flatten(0, 1) - 0.5
        x_NFHW = F.pixel_unshuffle(frames_NCHW, 2).contiguous(memory_format=torch.channels_last)
        x_NFHW = F.silu(self.down(F.silu(self.stem(x_NFHW))))
        maps_NPHW = self.keypoints(self.block(x_NFHW)).float()
        positions_NP2 = spatial_softmax(maps_NPHW)
        first_BP2, second_BP2 = positions_NP2.unflatten(0, (-1, 2)).unbind(1)
        return self.head((second_BP2 - first_BP2).flatten(1)).unflatten(1, self.shape)


def spatial_softmax(maps_NPHW: Tensor) -> Tensor:
    """Expected position (N, P, 2), x and y from -1 to 1, under the softmax of each map."""
    height, width = maps_NPHW.shape[-2:]
    weights_NPHW = maps_NPHW.flatten(2).softmax(-1).view_as(maps_NPHW)
    x_W = torch.linspace(-1, 1, width, device=maps_NPHW.device)
    y_H = torch.linspace(-1, 1, height, device=maps_NPHW.device)
    return torch.stack([weights_NPHW.sum(2) @ x_W, weights_NPHW.sum(3) @ y_H], -1)


class ForwardModel(nn.Module):
    """The second frame from the first and the latent action, by motion kernels and a U-Net that composes."""

    def __init__(self, config: ConvolutionalQuantizer, code_length: int):
        super().__init__()
        width, self.num_motions = config.width, config.num_motions
        self.radius = max(1, round(config.motion_radius * config.image_size))
        self.reach = 2 * self.radius + 1
        condition = 4 * width
        self.embed = nn.Sequential(nn.Linear(code_length * config.latent_dim, condition), nn.SiLU())
        self.kernels = nn.Linear(condition, self.num_motions * 2 * (2 + self.reach))
        self.register_buffer("position_R", torch.linspace(-1, 1, self.reach), persistent=False)
        images = 1 + self.num_motions
        self.stem = nn.Conv2d(4 * 3 * images, width, 3, 1, 1)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.block = ResidualBlock(2 * width, condition)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.merge = nn.Conv2d(width, width, 3, 1, 1)
        self.head = nn.Conv2d(width, 4 * (images + 1 + 3), 3, 1, 1)
        # Starting from the copy of the first frame keeps early gradients on the pixels that change.
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[:4] = 1.0

    def forward(self, first_BCHW: Tensor, quantised_BLD: Tensor) -> Tensor:
        condition_BD = self.embed(quantised_BLD.flatten(1))
        images_BMCHW = torch.cat([first_BCHW[:, None], self.move(first_BCHW, condition_BD)], 1)
        x_BFHW = F.pixel_unshuffle(images_BMCHW.flatten(1, 2) - 0.5, 2).contiguous(memory_format=torch.channels_last)
        fine_BFHW = F.silu(self.stem(x_BFHW))
        coarse_BFHW = self.block(F.silu(self.down(fine_BFHW)), condition_BD)
        merged_BFHW = fine_BFHW + F.interpolate(self.up(coarse_BFHW), scale_factor=2)
        out_BFHW = self.head(F.silu(self.merge(merged_BFHW)))
        out_BFHW = F.pixel_shuffle(out_BFHW, 2).float()
        choices_BMHW, colour_BCHW = out_BFHW.split([out_BFHW.shape[1] - 3, 3], 1)
        choices_BM1HW = choices_BMHW.softmax(1)[:, :, None]
        sources_BMCHW = torch.cat([images_BMCHW, (colour_BCHW + 0.5)[:, None]], 1)
        return (choices_BM1HW * sources_BMCHW).sum(1)

    def move(self, first_BCHW: Tensor, condition_BD: Tensor) -> Tensor:
        """The first frame under each motion (B, M, C, H, W)."""
        size, reach = first_BCHW.shape[-1], self.reach
        with torch.autocast(first_BCHW.device.type, enabled=False):
            parameters_BM2S = self.kernels(condition_BD.float()).unflatten(1, (self.num_motions, 2, 2 + reach))
            centre_BM21, sharpness_BM21, logits_BM2R = parameters_BM2S.split([1, 1, reach], -1)
            # A bell that slides learns a displacement in a tenth of the steps that free weights alone need.
            bell_BM2R = -4 * F.softplus(sharpness_BM21 + 0.5) * (self.position_R - centre_BM21).square()
            kernels_BM2R = (bell_BM2R + logits_BM2R).softmax(-1)
            # A motion is separable, so it is a banded matrix along each axis: two matrix products move the image.
            offset_HK = torch.arange(size + reach - 1, device=first_BCHW.device) - torch.arange(
                size, device=first_BCHW.device
            ).unsqueeze(1)
            inside_HK = (offset_HK >= 0) & (offset_HK < reach)
            bands_BM2HK = kernels_BM2R[..., offset_HK.clamp(0, reach - 1)] * inside_HK
            rows_BM1HK, columns_BM1HK = bands_BM2HK.split(1, 2)
        padded_B1CKK = F.pad(first_BCHW, [self.radius] * 4, mode="replicate")[:, None]
        return rows_BM1HK @ padded_B1CKK @ columns_BM1HK.mT
