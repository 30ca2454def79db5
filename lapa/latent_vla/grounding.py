"""What an instruction is about, learned from video without actions: what will have left its place in the end.

Pretraining on actions, latent or true, says two numbers a frame, and needs tens of thousands of frames before
keypoints leave the robot for the block that the instruction names. Here every cell of the picture says something, on
two maps: whether what is in it will have left by the clip's last frame, and whether it will have a moment from now. The
body that moves is on both. The second is learned only from frames in which something that stands still now will have
left in the end, so that it comes to mean the body alone, and what the first has beyond it is the object, even while it
is pushed.

The stem and the text encoder that tell it go on to pretraining (`pretrain.grounding`), where a quarter of the keypoints
begin on the first map, that is on the body, and a quarter on the object. There they learn slowly at first
(`pretrain.grounding_warmup_steps`): the gradients of a trunk that is still random drive keypoints off the object (a
pretrained network is distorted by a new head: Kumar et al. 2022, arXiv 2202.10054).

Shapes: B batch, S image size, C channels, D width, P cells of the stem's features, 4 pixels wide.
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema
from lapa.backbones.text import build_text_encoder
from lapa.checkpoint import load_config, load_weights
from lapa.latent_vla.model import VisionLanguageTrunk
from lapa.latent_vla.vision import FEATURE_STRIDE, ConvolutionalStem, InstructedMaps, KeypointTokenizer

MAPS = ("leaves by the end", "leaves next")
WAITS = 0.5  # how much of a cell has to stand still now and leave later, for a frame to say what the body is


class GroundingModel(nn.Module):
    """Image and instruction to the logits (B, 2, P) that what is in a cell will have left, by the end and next."""

    def __init__(self, text: schema.TextEncoder, width: int):
        super().__init__()
        self.text_encoder = build_text_encoder(text, width)
        # Those of `KeypointTokenizer`.
        self.stem = ConvolutionalStem(width // 2, num_blocks=2, instruction_width=width)
        self.maps = InstructedMaps(width // 2, width, num_maps=len(MAPS))

    def forward(self, images_BCHW: Tensor, ids_BW: Tensor) -> Tensor:
        instruction_BD = self.text_encoder(ids_BW).summary_BD
        return self.maps(self.stem(images_BCHW, instruction_BD), instruction_BD)


def leaves(present_BCHW: Tensor, later_BCHW: Tensor, full_change: float) -> Tensor:
    """How much of each cell's content (B, P) has left it, in [0, 1].

    That is the mean absolute difference of the pixels that stand out less than before, `full_change` and more being 1.
    A pixel stands out by its distance from the present picture's median colour.
    """
    background_BC11 = present_BCHW.flatten(2).median(-1).values[..., None, None]
    now_B1HW, then_B1HW = ((x - background_BC11).abs().mean(1, keepdim=True) for x in (present_BCHW, later_BCHW))
    return by_cell(differences(present_BCHW, later_BCHW) * (now_B1HW > then_B1HW), full_change).flatten(1)


def differences(present_BCHW: Tensor, later_BCHW: Tensor) -> Tensor:
    return (later_BCHW - present_BCHW).abs().mean(1, keepdim=True)


def by_cell(change_B1HW: Tensor, full_change: float) -> Tensor:
    return (F.avg_pool2d(change_B1HW, FEATURE_STRIDE) / full_change).clamp(max=1)


def targets(images_B9HW: Tensor, full_change: float) -> tuple[Tensor, Tensor]:
    """What leaves (B, 2, P), in [0, 1], and whether a map is learned from a frame (B, 2), 1 or 0.

    Args:
        images_B9HW: the present frame, the clip's last one and the next one.
    """
    present_BCHW, last_BCHW, next_BCHW = images_B9HW.split(3, dim=1)
    left_B2P = torch.stack([leaves(present_BCHW, then, full_change) for then in (last_BCHW, next_BCHW)], dim=1)
    moving_B1HW = by_cell(differences(present_BCHW, next_BCHW), full_change)
    moving_BP = F.max_pool2d(moving_B1HW, 3, stride=1, padding=1).flatten(1)  # and the cells around
    waits_B = ((left_B2P[:, 0] - moving_BP).amax(1) > WAITS).float()
    return left_B2P, torch.stack([torch.ones_like(waits_B), waits_B], dim=1)


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
    if config.get("maps") != list(MAPS):
        raise ValueError(
            f"the grounding in {folder} has maps {config.get('maps', ['changes'])}, expected {list(MAPS)}: an earlier "
            "version made it, whose keypoints all began on the robot; run `lapa ground` again, in another folder"
        )
    model = GroundingModel(text, trunk.width)
    load_weights(folder, model)
    trunk.text_encoder.load_state_dict(model.text_encoder.state_dict())
    tokenizer.stem.load_state_dict(model.stem.state_dict())
    tokenizer.look_for(model.maps)


def grounded_prefixes(model: nn.Module, trunk: VisionLanguageTrunk) -> list[str]:
    """How the names of the parameters begin, in a model with this trunk, that `start_grounded` gave their weights."""
    tokenizer = trunk.image_tokenizer
    grounded = (trunk.text_encoder, tokenizer.stem, tokenizer.maps)
    return [f"{name}." for name, module in model.named_modules() if any(module is part for part in grounded)]
