"""Noised frames to patch tokens and hidden states back to frames: linear, or by the halves of a U-Net.

Linear: each k x k patch through one matrix. U-Net: convolutions halve the frame down to the grid of tokens, and after
the trunk others double it again beside what they left behind (Transfusion, arXiv 2408.11039, section 3.3). The
timestep embedding is added to each patch vector; the U-Net's convolutions are modulated by it too.

Shapes: B batch, C channels, H W rows and columns of pixels, P patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.latent_vla.vision import NUM_FREQUENCIES, FilmBlock, cell_centres, position_features
from lapa.schema import FutureFrame


class Patches(nn.Module):
    """A frame of `in_channels` to tokens, and hidden states to a frame of `out_channels`, in [-1, 1] both.

    `embed` returns what `read` needs besides the hidden states: the U-Net's skip connections, or nothing.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, in_channels: int = 3, out_channels: int = 3):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, expected a divisor of image_size, which is {image_size}")
        self.image_size, self.patch_size = image_size, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.side = image_size // patch_size
        self.num_tokens = self.side**2
        self.register_buffer("positions_PF", position_features(cell_centres(self.side)), persistent=False)
        self.position = nn.Linear(2 + 4 * NUM_FREQUENCIES, width)

    def embed(self, noised_BCHW: Tensor, time_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, P, D), row by row."""
        patches_BPD, skips = self.down(noised_BCHW, time_BD)
        return patches_BPD + self.position(self.positions_PF) + time_BD[:, None], skips

    def down(self, noised_BCHW: Tensor, time_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError

    def read(self, hidden_BPD: Tensor, time_BD: Tensor, skips: list[Tensor]) -> Tensor:
        """A prediction (B, out_channels, H, W)."""
        raise NotImplementedError

    def start_at_zero(self) -> None:
        """Let the prediction be zero at first, whatever the hidden states are."""
        for parameter in self.last_layer().parameters():
            nn.init.zeros_(parameter)

    def last_layer(self) -> nn.Module:
        raise NotImplementedError


class LinearPatches(Patches):
    """One matrix in and one out."""

    def __init__(self, image_size: int, patch_size: int, width: int, in_channels: int = 3, out_channels: int = 3):
        super().__init__(image_size, patch_size, width, in_channels, out_channels)
        self.input = nn.Linear(in_channels * patch_size**2, width)
        self.output = nn.Linear(width, out_channels * patch_size**2)

    def down(self, noised_BCHW: Tensor, time_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.input(to_patches(noised_BCHW, self.patch_size)), []

    def read(self, hidden_BPD: Tensor, time_BD: Tensor, skips: list[Tensor]) -> Tensor:
        return to_images(self.output(hidden_BPD), self.patch_size, self.side)

    def last_layer(self) -> nn.Module:
        return self.output


class UNetPatches(Patches):
    """Convolutions at every scale between pixels and tokens, with skip connections around the trunk."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 32,
    ):
        super().__init__(image_size, patch_size, width, in_channels, out_channels)
        num_scales = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 2**num_scales:
            raise ValueError(f"patch_size is {patch_size}, expected 2, 4, 8, ... for patches=unet")
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList(FilmBlock(channels, width) for _ in range(num_scales))
        self.halve = nn.ModuleList(nn.Conv2d(channels, channels, 2, stride=2) for _ in range(num_scales))
        self.input = nn.Linear(channels, width)
        self.output = nn.Linear(width, channels)
        self.merge = nn.ModuleList(nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(num_scales))
        self.up_blocks = nn.ModuleList(FilmBlock(channels, width) for _ in range(num_scales))
        self.last_norm = nn.GroupNorm(8, channels)
        self.last = nn.Conv2d(channels, out_channels, 3, padding=1)

    def down(self, noised_BCHW: Tensor, time_BD: Tensor) -> tuple[Tensor, list[Tensor]]:
        x_BCHW, skips = self.first(noised_BCHW), []
        for block, halve in zip(self.down_blocks, self.halve, strict=True):
            x_BCHW = block(x_BCHW, time_BD)
            skips.append(x_BCHW)
            x_BCHW = halve(x_BCHW)
        return self.input(x_BCHW.flatten(2).transpose(1, 2)), skips

    def read(self, hidden_BPD: Tensor, time_BD: Tensor, skips: list[Tensor]) -> Tensor:
        x_BCHW = self.output(hidden_BPD).transpose(1, 2).unflatten(2, (self.side, self.side))
        for merge, block, skip_BCHW in zip(self.merge, self.up_blocks, reversed(skips), strict=True):
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
            x_BCHW = block(merge(torch.cat([x_BCHW, skip_BCHW], dim=1)), time_BD)
        return self.last(F.silu(self.last_norm(x_BCHW)))

    def last_layer(self) -> nn.Module:
        return self.last


def to_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Patches (B, P, C * k * k), row by row."""
    return F.unfold(images_BCHW, patch_size, stride=patch_size).transpose(1, 2)


def to_images(patches_BPK: Tensor, patch_size: int, side: int) -> Tensor:
    """Images (B, C, side * k, side * k) from patches (B, P, C * k * k)."""
    return F.fold(patches_BPK.transpose(1, 2), side * patch_size, patch_size, stride=patch_size)


def build_patches(config: FutureFrame, width: int, in_channels: int = 3) -> Patches:
    """`config.patches`: linear or unet; ValueError for another name."""
    if config.patches == "linear":
        return LinearPatches(config.image_size, config.patch_size, width, in_channels)
    if config.patches == "unet":
        return UNetPatches(config.image_size, config.patch_size, width, in_channels, channels=config.unet_channels)
    raise ValueError(f"unknown patches {config.patches!r}: known are ['linear', 'unet']")
