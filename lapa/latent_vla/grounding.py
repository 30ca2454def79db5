"""What an instruction is about, learned from video without actions: where the picture will have changed in the end.

Pretraining on actions, latent or true, says two numbers a frame, and needs tens of thousands of frames before keypoints
leave the robot for the block that the instruction names. Here every cell of the picture says something: whether it
will look different in the clip's last frame. The stem and the text encoder that tell it go on to pretraining
(`pretrain.grounding`), where half of the keypoints begin where changes are expected.

Shapes: B batch, S image size, C channels, D width, P cells of the stem's features, 4 pixels wide.
"""

from dataclasses import asdict

import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.text import build_text_encoder
from lapa.checkpoint import load_config, load_weights
from lapa.latent_vla.model import VisionLanguageTrunk
from lapa.latent_vla.vision import FEATURE_STRIDE, ConvolutionalStem, InstructedMaps, KeypointTokenizer


class GroundingModel(nn.Module):
    """Image and instruction to the logits (B, P) that a cell will have changed."""

    def __init__(self, text: schema.TextEncoder, width: int):
        super().__init__()
        self.text_encoder = build_text_encoder(text, width)
        # Those of `KeypointTokenizer`.
        self.stem = ConvolutionalStem(width // 2, num_blocks=2, instruction_width=width)
        self.maps = InstructedMaps(width // 2, width, num_maps=1)

    def forward(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        instruction_BD = self.text_encoder(ids_BW).summary_BD
        return self.maps(self.stem(images_BCHW, instruction_BD), instruction_BD)[:, 0]


def changes(present_BCHW: Tensor, last_BCHW: Tensor, full_change: float) -> Tensor:
    """How much each cell changes (B, P), in [0, 1]: its mean absolute difference, `full_change` and more being 1."""
    change_B1HW = (last_BCHW - present_BCHW).abs().mean(1, keepdim=True)
    return (F.avg_pool2d(change_B1HW, FEATURE_STRIDE) / full_change).clamp(max=1).flatten(1)


def start_grounded(trunk: VisionLanguageTrunk, folder: str, text: schema.TextEncoder) -> None:
    """Give the trunk what `lapa ground` learned; ValueError where that was another text encoder, width or size."""
    config, tokenizer = load_config(folder, "ground"), trunk.image_tokenizer
    if not isinstance(tokenizer, KeypointTokenizer):
        raise ValueError(f"grounding={folder} needs image_tokenizer=keypoints, the only one that reads the instruction")
    own = {"text": asdict(text), "width": trunk.width, "image_size": tokenizer.image_size}
    other = {name: (config[name], value) for name, value in own.items() if config[name] != value}
    if other:
        told = ", ".join(f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in other.items())
        raise ValueError(f"the grounding in {folder} has {told}: run `lapa ground` with this model's options")
    model = GroundingModel(text, trunk.width)
    load_weights(folder, model)
    trunk.text_encoder.load_state_dict(model.text_encoder.state_dict())
    tokenizer.stem.load_state_dict(model.stem.state_dict())
    tokenizer.look_for(model.maps)
