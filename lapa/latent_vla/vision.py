"""Images to tokens: keypoints that the instruction picks, or a grid of patches.

Keypoints: convolutions modulated by the instruction (FiLM, Perez et al. 2017, arXiv 1709.07871; in a robot
policy, RT-1, arXiv 2212.06817), then a few maps of attention over the image, each one a token that says
where its map looks (spatial softmax, Levine et al. 2016, arXiv 1504.00702). Positions are values here, not
indices, so the difference "target minus tip" is learned in hundreds of steps. Tokens do not also say what
they see: with the looks of the blocks to memorise, training did not find the positions at all.

Grid: the same convolutions without the instruction, one token an 8x8 patch with its position, for backbones
that should find the words in the image by themselves.

Shapes: B batch, C channels, H W rows and columns of features, P = H * W, I image tokens, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURE_STRIDE = 4
NUM_KEYPOINTS = 16
NUM_GROUNDED_KEYPOINTS = NUM_KEYPOINTS // 2  # the first ones, where there is a grounding
NUM_FREQUENCIES = 4
SHARPNESS = 6.0  # standard deviation of a keypoint's weights at first, times the root of their number
GROUNDED_GAIN = 2.0  # how much sharper a keypoint looks than the map that it begins as
BODY_SHARE = 0.8  # of the second map that is taken from the first, for the object


def cell_centres(side: int) -> Tensor:
    """(side * side, 2): x and y of each cell of a square grid, in [-1, 1], row by row."""
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def position_features(xy: Tensor) -> Tensor:
    """(..., 2) in [-1, 1] to (..., 2 + 4 * NUM_FREQUENCIES): themselves, and their sines and cosines."""
    angles = (xy[..., None, :] * (2.0 ** torch.arange(NUM_FREQUENCIES))[:, None] * (torch.pi / 2)).flatten(-2)
    return torch.cat([xy, angles.sin(), angles.cos()], dim=-1)


def convolution(channels: int, is_separable: bool) -> nn.Module:
    """3x3 convolution; separable: 3x3 in each channel alone, then 1x1 across them, at an eighth of the FLOPs.

    Separable ones are those of MobileNets (Howard et al. 2017, arXiv 1704.04861).
    """
    if not is_separable:
        return nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1))


class FilmBlock(nn.Module):
    """A residual pair of 3x3 convolutions; the instruction scales and shifts the channels between them."""

    def __init__(self, channels: int, instruction_width: int, is_separable: bool = False):
        super().__init__()
        self.first_norm = nn.GroupNorm(8, channels)
        self.first = convolution(channels, is_separable)
        self.second_norm = nn.GroupNorm(8, channels)
        self.second = convolution(channels, is_separable)
        self.scale_shift = nn.Linear(instruction_width, 2 * channels) if instruction_width else None
        *_, last = self.second.modules()
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)

    def forward(self, x_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        hidden_BCHW = self.second_norm(self.first(F.silu(self.first_norm(x_BCHW))))
        if self.scale_shift is not None:
            scale_BC11, shift_BC11 = self.scale_shift(instruction_BD)[:, :, None, None].chunk(2, dim=1)
            hidden_BCHW = hidden_BCHW * (1 + scale_BC11) + shift_BC11
        return x_BCHW + self.second(F.silu(hidden_BCHW))


class ConvolutionalStem(nn.Module):
    """Images (B, 3, S, S) in [0, 1] to features (B, C, S / 4, S / 4)."""

    def __init__(self, channels: int, num_blocks: int, instruction_width: int):
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, channels // 2, 4, stride=2, padding=1),
            nn.GroupNorm(4, channels // 2),
            nn.SiLU(),
            nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1),
        )
        self.blocks = nn.ModuleList(FilmBlock(channels, instruction_width, True) for _ in range(num_blocks))
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, images_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        x_BCHW = self.patches((images_BCHW * 2 - 1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x_BCHW = block(x_BCHW, instruction_BD)
        return F.silu(self.norm(x_BCHW))


class InstructedMaps(nn.Module):
    """Logits (B, K, P) of K maps over the image: what each looks for, and what the instruction adds to that."""

    def __init__(self, channels: int, width: int, num_maps: int):
        super().__init__()
        self.plain = nn.Conv2d(channels, num_maps, 1)
        # Zero at first: a map that another instruction sends elsewhere at random learns nothing.
        self.query = nn.Linear(width, num_maps * channels)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, features_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        query_BKC = self.query(instruction_BD).unflatten(-1, (self.plain.out_channels, -1))
        return self.plain(features_BCHW).flatten(2) + query_BKC @ features_BCHW.flatten(2)


class KeypointTokenizer(nn.Module):
    """Tokens (B, 16, D): where each map of attention looks."""

    def __init__(self, image_size: int, width: int):
        super().__init__()
        channels = width // 2
        self.image_size, self.num_tokens = image_size, NUM_KEYPOINTS
        self.stem = ConvolutionalStem(channels, num_blocks=2, instruction_width=width)
        self.maps = InstructedMaps(channels, width, NUM_KEYPOINTS)
        # Sharp maps from the start: nearly uniform ones all look at the centre and learn nothing for long.
        nn.init.normal_(self.maps.plain.weight, std=SHARPNESS * channels**-0.5)
        self.register_buffer("xy_P2", cell_centres(image_size // FEATURE_STRIDE), persistent=False)
        self.position = nn.Linear(2, width)
        nn.init.normal_(self.position.weight)
        self.identity = nn.Parameter(torch.randn(NUM_KEYPOINTS, width) * 0.5)

    def forward(self, images_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        xy_BI2 = self.places(images_BCHW, instruction_BD)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            return self.position(xy_BI2) + self.identity

    def places(self, images_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        """Where each map looks: x and y (B, I, 2) in [-1, 1], right and down."""
        features_BCHW = self.stem(images_BCHW, instruction_BD)
        # Float32: bfloat16 would round positions to a tenth of a pixel and more.
        with torch.autocast(images_BCHW.device.type, enabled=False):
            weights_BIP = self.maps(features_BCHW.float(), instruction_BD.float()).softmax(-1)
            return weights_BIP @ self.xy_P2

    @torch.no_grad()
    def look_for(self, maps: InstructedMaps) -> None:
        """Let keypoints begin where the two maps of `lapa ground` look, each a little beside it.

        A quarter on the first map, of all that moves, the body first; a quarter on what it has beyond the second, the
        object that the instruction names.
        """
        channels, quarter = self.maps.plain.in_channels, NUM_GROUNDED_KEYPOINTS // 2
        for first, body_share in ((0, 0.0), (quarter, BODY_SHARE)):
            keypoints = slice(first, first + quarter)
            rows = slice(first * channels, (first + quarter) * channels)
            plain, weight, bias = (
                GROUNDED_GAIN * (own[0] - body_share * own[1])
                for own in (of.unflatten(0, (2, -1)) for of in (maps.plain.weight, maps.query.weight, maps.query.bias))
            )
            self.maps.plain.weight[keypoints] = self.maps.plain.weight[keypoints] / SHARPNESS + plain
            self.maps.query.weight[rows] = weight.repeat(quarter, 1)
            self.maps.query.bias[rows] = bias.repeat(quarter)


class GridTokenizer(nn.Module):
    """Tokens (B, (S / 8) ** 2, D): features and position of each 8x8 patch."""

    def __init__(self, image_size: int, width: int):
        super().__init__()
        channels = width // 2
        side = image_size // (2 * FEATURE_STRIDE)
        self.image_size, self.num_tokens = image_size, side * side
        self.stem = ConvolutionalStem(channels, num_blocks=2, instruction_width=0)
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.register_buffer("positions_IF", position_features(cell_centres(side)), persistent=False)
        self.position = nn.Linear(2 + 4 * NUM_FREQUENCIES, width)

    def forward(self, images_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        patches_BDHW = self.patches(self.stem(images_BCHW, instruction_BD))
        return patches_BDHW.flatten(2).transpose(1, 2) + self.position(self.positions_IF)


def build_image_tokenizer(name: str, image_size: int, width: int) -> nn.Module:
    """`keypoints` or `grid`: a module (images (B, 3, S, S), instruction (B, D)) -> tokens (B, I, D)."""
    known = {"keypoints": KeypointTokenizer, "grid": GridTokenizer}
    if name not in known:
        raise ValueError(f"unknown image_tokenizer {name!r}: known are {sorted(known)}")
    if image_size % (2 * FEATURE_STRIDE):
        raise ValueError(f"image_size is {image_size}, expected a multiple of {2 * FEATURE_STRIDE}")
    if width % 32:
        raise ValueError(f"backbone.width is {width}, expected a multiple of 32")
    return known[name](image_size, width)


def random_shift(frames: np.ndarray, pixels: int, generator: np.random.Generator) -> np.ndarray:
    """Each image of (B, H, W, C) moved by up to `pixels` along both axes; the border repeats.

    The augmentation of Kostrikov et al. 2020 (arXiv 2004.13649); displacements do not change under it.
    """
    if pixels == 0:
        return frames
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    tops, lefts = generator.integers(0, 2 * pixels + 1, (2, len(frames)))
    return np.stack([image[y : y + height, x : x + width] for image, y, x in zip(padded, tops, lefts, strict=True)])
