"""Language conditioning: what has nothing to do with the task is soaked up first (UniVLA, arXiv 2505.06111).

Shapes: B batch, L code_length, D latent_dim, W words of an instruction.

First the forward model sees the instruction beside codes of a second inverse model. What the instruction tells need
not be in these codes, so they keep what is left: change that has nothing to do with the task. Then these codes are
frozen, the instruction goes, and the quantizer's own codes have to make up for it: they become task-centric.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lapa import distributed
from lapa.quantizer.base import build_quantizer
from lapa.schema import Codebook, LanguageConditioning, QuantizerModel
from lapa.text import PADDING_ID, TEXT_VOCABULARY

EMBEDDING_WIDTH = 32


class Context(NamedTuple):
    """What the forward model sees beside the quantizer's own latent action.

    latents_BLD: added to its latents; it spans few of their D dimensions, so a sum can be told apart. codebook_loss
    and is_first_part: whether the instruction is in it, and the quantizer's own latent action has to be left out.
    """

    latents_BLD: Tensor
    codebook_loss: Tensor
    is_first_part: bool


class TaskIrrelevant(nn.Module):
    """The codes of task-irrelevant change, and the instruction that keeps the rest out of them.

    num_first_steps: training steps of the first part; the module counts them itself, so that a resumed run goes on
    in the right part.
    """

    def __init__(self, model: QuantizerModel, codebook: Codebook, num_first_steps: int):
        super().__init__()
        self.num_first_steps = num_first_steps
        # Only its inverse model and codebook are used; the forward model is that of the quantizer in training.
        self.inverse = build_quantizer(model, codebook)
        self.shape = self.inverse.latent_shape
        size = self.shape[0] * self.shape[1]
        self.project = nn.Linear(size, size)
        self.words = nn.EmbeddingBag(TEXT_VOCABULARY, EMBEDDING_WIDTH, mode="mean", padding_idx=PADDING_ID)
        self.instruction = nn.Sequential(nn.Linear(EMBEDDING_WIDTH, size), nn.SiLU(), nn.Linear(size, size))
        self.mean_LD: Tensor
        self.steps_seen: Tensor
        self.register_buffer("mean_LD", torch.zeros(self.shape))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, frames_B2CHW: Tensor, words_BW: Tensor) -> Context:
        is_first_part = int(self.steps_seen) < self.num_first_steps
        if self.training:
            self.steps_seen += 1
        if is_first_part:
            quantised = self.inverse.quantise(frames_B2CHW)
            told_BLD = self.instruction(self.words(words_BW)).float().view(-1, *self.shape)
            return Context(self.projected(quantised.latents_BLD) + told_BLD, quantised.loss, True)
        self.inverse.eval()
        with torch.no_grad():
            quantised = self.inverse.quantise(frames_B2CHW)
        latents_BLD = self.projected(quantised.latents_BLD)
        if self.training:
            self.mean_LD.lerp_(distributed.mean(latents_BLD.mean(0)), 0.05)
        return Context(latents_BLD, latents_BLD.new_zeros(()), False)

    def projected(self, latents_BLD: Tensor) -> Tensor:
        return self.project(latents_BLD.flatten(1)).float().view(-1, *self.shape)


def build_language(
    config: LanguageConditioning, model: QuantizerModel, codebook: Codebook, num_steps: int
) -> TaskIrrelevant | None:
    """None where `config.share_of_steps` is 0; ValueError where it leaves no step for the codes that are kept."""
    if config.share_of_steps == 0:
        return None
    num_first_steps = round(config.share_of_steps * num_steps)
    if not 0 < num_first_steps < num_steps:
        raise ValueError(
            f"language.share_of_steps is {config.share_of_steps}, {num_first_steps} of {num_steps} steps: "
            "expected a share that leaves steps for both parts, such as 0.3"
        )
    return TaskIrrelevant(model, codebook, num_first_steps)
