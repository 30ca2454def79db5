"""The inverse dynamics model of VPT (arXiv 2206.11795): two frames to the actions executed between them.

It looks at a pair as the quantizer's inverse model does (lapa/quantizer/convolutional.py): the displacement of
keypoints, and one linear layer. All the actions of a frame gap are told at once.

Shapes: B batch, C = 3 colours, H = W = image_size, G actions of a frame gap, A action dimensions.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lapa.checkpoint import load_config, load_weights
from lapa.quantizer.convolutional import InverseModel
from lapa.schema import ConvolutionalQuantizer


class InverseDynamicsModel(nn.Module):
    """Normalised actions (B, G, A) from frame pairs; the statistics are saved with the weights."""

    mean_A: Tensor
    std_A: Tensor

    def __init__(self, image_size: int, width: int, num_keypoints: int, frame_gap_frames: int, action_dim: int):
        if image_size % 16:
            raise ValueError(f"image_size is {image_size}: expected a multiple of 16")
        super().__init__()
        self.image_size, self.frame_gap_frames = image_size, frame_gap_frames
        sizes = ConvolutionalQuantizer(
            image_size=image_size, latent_dim=action_dim, width=width, num_keypoints=num_keypoints
        )
        self.inverse_model = InverseModel(sizes, code_length=frame_gap_frames)
        self.register_buffer("mean_A", torch.zeros(action_dim))
        self.register_buffer("std_A", torch.ones(action_dim))

    def forward(self, frames_B2CHW: Tensor) -> Tensor:
        """Normalised actions (B, G, A), from frame pairs in [0, 1]."""
        # Float32: bfloat16 would round positions to a tenth of a pixel.
        with torch.autocast(frames_B2CHW.device.type, enabled=False):
            return self.inverse_model(frames_B2CHW)

    def actions(self, frames_B2CHW: Tensor) -> Tensor:
        """Actions (B, G, A) in the data's units."""
        return self(frames_B2CHW) * self.std_A + self.mean_A

    def loss(self, frames_B2CHW: Tensor, actions_BGA: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of normalised actions, as the policy's own heads have it, and what to log."""
        loss = (self(frames_B2CHW) - (actions_BGA - self.mean_A) / self.std_A).abs().mean()
        return loss, {"action_l1": loss.detach()}


def build_inverse(config: dict) -> InverseDynamicsModel:
    """A model with random weights, from a config.json of `lapa train_inverse`."""
    return InverseDynamicsModel(
        config["image_size"],
        config["width"],
        config["num_keypoints"],
        config["frame_gap_frames"],
        config["action_dim"],
    )


def load_inverse(folder: str | Path) -> InverseDynamicsModel:
    """The trained model in a folder of `lapa train_inverse`, on CPU and in inference mode."""
    model = build_inverse(load_config(folder, "train_inverse"))
    load_weights(folder, model)
    return model.eval()
