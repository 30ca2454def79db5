"""Frozen image features: pretrained vision transformers, or random convolutions where no weights are to be had.

Shapes: B batch, C = 3 colours, H = W = image_size, F feature channels, G patches along a side, P = G * G.

A source is no nn.Module: its weights never change, and neither the optimiser nor a checkpoint should carry them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.schema import FeatureTarget

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenFeatures:
    """Patch features (B, F, G, G) of images in [0, 1], without gradients.

    network: resized and normalised images (B, C, S, S) to patch tokens (B, P, F) or maps (B, F, G, G).
    """

    def __init__(self, network: nn.Module, to_tokens: Callable, input_size: int | None, mean, std):
        self.network, self.to_tokens = network.eval().requires_grad_(False), to_tokens
        self.input_size = input_size
        self.mean_C11, self.std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        device = images_BCHW.device
        self.network.to(device)
        if self.input_size is not None and images_BCHW.shape[-1] != self.input_size:
            images_BCHW = F.interpolate(images_BCHW, self.input_size, mode="bicubic", antialias=True)
        features = self.to_tokens(self.network, (images_BCHW - self.mean_C11.to(device)) / self.std_C11.to(device))
        if features.ndim == 3:
            side = round(features.shape[1] ** 0.5)
            if side**2 != features.shape[1]:
                raise ValueError(f"the model gives {features.shape[1]} patch tokens, expected a square number")
            features = features.mT.unflatten(2, (side, side))
        return features.float()


def build_features(config: FeatureTarget) -> FrozenFeatures:
    """The features that `config.source` names.

    Raises ValueError where the source is unknown, or its model is missing or not in safetensors.
    """
    sources = {
        "random_convolutions": random_convolutions,
        "transformers": transformers_features,
        "timm": timm_features,
    }
    if config.source not in sources:
        raise ValueError(f"target.source is {config.source!r}: expected one of {sorted(sources)}")
    if config.source != "random_convolutions" and config.model is None:
        raise ValueError(f"target.source={config.source} needs target.model=<folder or name of the model>")
    return sources[config.source](config)


class RandomConvolutions(nn.Module):
    """A frozen random network: edges and colours at two scales, as maps (B, F, H / 4, W / 4).

    Random filters that are rectified and pooled keep where things are and blur how they look (Jarrett et al. 2009).
    They know nothing of objects: a stand-in that needs no weights, not a rival of pretrained features.
    """

    def __init__(self, seed: int, channels: int = 32):
        super().__init__()
        self.fine = nn.Conv2d(3, channels, 5, 2, 2, bias=False)
        self.coarse = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.fine, self.coarse):
                layer.weight.normal_(generator=generator)
                # Without a mean over its inputs a filter answers to contrast, not to brightness.
                layer.weight -= layer.weight.mean((1, 2, 3), keepdim=True)
                layer.weight /= layer.weight.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        fine_BFHW = self.fine(images_BCHW).relu()
        return torch.cat([F.avg_pool2d(fine_BFHW, 2), self.coarse(fine_BFHW).relu()], 1)


def random_convolutions(config: FeatureTarget) -> FrozenFeatures:
    network = RandomConvolutions(config.seed)
    return FrozenFeatures(network, lambda network, x_BCHW: network(x_BCHW), config.input_size, (0.5,) * 3, (0.25,) * 3)


def transformers_features(config: FeatureTarget) -> FrozenFeatures:
    """Patch tokens of a DINOv2, DINOv3 or like model, without its class and register tokens."""
    try:
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError:
        raise ValueError(
            "target.source=transformers needs the package transformers: pip install 'lerobot_policy_lapa[transformers]'"
        ) from None
    assert config.model is not None
    try:
        network = AutoModel.from_pretrained(
            config.model, local_files_only=config.local_files_only, use_safetensors=True, trust_remote_code=False
        )
        processor, _ = ImageProcessingMixin.get_image_processor_dict(
            config.model, local_files_only=config.local_files_only
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no image model with safetensors weights and a preprocessor_config.json in {config.model!r}: expected a "
            "folder of transformers such as a downloaded facebook/dinov2-small "
            f"(local_files_only is {config.local_files_only}): {str(error).splitlines()[0]}"
        ) from None
    num_prefix_tokens = 1 + getattr(network.config, "num_register_tokens", 0)

    def to_tokens(network: nn.Module, x_BCHW: Tensor) -> Tensor:
        return network(pixel_values=x_BCHW).last_hidden_state[:, num_prefix_tokens:]

    # Position embeddings may be of a larger image (518 px for DINOv2) than the one that the processor cuts out.
    crop = processor.get("crop_size") or processor.get("size") or {}
    input_size = config.input_size or crop.get("height") or crop.get("shortest_edge") or network.config.image_size
    mean, std = processor.get("image_mean") or IMAGENET_MEAN, processor.get("image_std") or IMAGENET_STD
    return FrozenFeatures(network, to_tokens, input_size, mean, std)


def timm_features(config: FeatureTarget) -> FrozenFeatures:
    """Patch tokens or the last map of a timm model, with weights from a safetensors file."""
    try:
        import timm
    except ImportError:
        raise ValueError("target.source=timm needs the package timm: pip install timm") from None
    from safetensors.torch import load_file

    if config.weights is None or not Path(config.weights).is_file():
        raise ValueError(f"target.source=timm needs target.weights=<safetensors file>, got {config.weights!r}")
    network: Any = timm.create_model(config.model, pretrained=False, num_classes=0, dynamic_img_size=True)
    network.load_state_dict(load_file(config.weights))
    num_prefix_tokens = getattr(network, "num_prefix_tokens", 0)

    def to_tokens(network: Any, x_BCHW: Tensor) -> Tensor:
        features = network.forward_features(x_BCHW)
        return features[:, num_prefix_tokens:] if features.ndim == 3 else features

    about = network.pretrained_cfg
    return FrozenFeatures(network, to_tokens, config.input_size or about["input_size"][-1], about["mean"], about["std"])
