"""Text encoders behind one contract: instructions to token embeddings of the backbone's width.

    ids_BW = encoder.encode_text(texts)     on the CPU, padded with 0: what a batch carries
    text = encoder(ids_BW)                  tokens with their positions, and one vector of the whole instruction

Shapes: B batch, W ids of a text, T tokens (words, bytes or patches; T <= W), D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa import schema, text
from lapa.backbones.base import TEXT, Layout
from lapa.backbones.dense import DenseTransformer
from lapa.text import PADDING_ID, TEXT_VOCABULARY

# The name in the configuration, the module that holds the encoder, and its class.
TEXT_ENCODERS: dict[str, tuple[str, str]] = {
    "words": ("lapa.backbones.text", "WordEncoder"),
    "bytes": ("lapa.backbones.blt", "ByteEncoder"),
    "blt": ("lapa.backbones.blt", "BltEncoder"),
    "huggingface": ("lapa.backbones.huggingface_inputs", "HuggingFaceText"),
}


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a batch of instructions, and a summary: one vector by which an image tokenizer knows what to look for.

    tokens_BTD: embeddings with positions. is_token_BT: bool, False for padding. summary_BD: RMS-normalised.
    """

    tokens_BTD: Tensor
    is_token_BT: Tensor
    summary_BD: Tensor


class TextEncoder(nn.Module):
    """What every text encoder is."""

    def fit(self, texts: Sequence[str], seed: int) -> None:
        """Learn from the data's texts what `encode_text` needs; before training from random weights, not after."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, W) int64 on the CPU, 0 for padding; what does not fit is cut off."""
        raise NotImplementedError

    def count_longer(self, texts: Sequence[str]) -> int:
        """How many texts `encode_text` cuts off."""
        raise NotImplementedError

    def forward(self, ids_BW: Tensor) -> EncodedText:
        raise NotImplementedError


class WordEncoder(TextEncoder):
    """One token a word, by stable hashing (lapa/text.py).

    The summary is a sum of words that have seen each other. A sum of plain words is the same for "the red star to the
    blue cube" as for "the blue star to the red cube", so that the image tokenizer would not know which block to move.
    """

    def __init__(self, config: schema.WordText, width: int):
        super().__init__()
        self.max_words, self.width = config.max_words, width
        self.embedding = nn.Embedding(TEXT_VOCABULARY, width, padding_idx=PADDING_ID)
        self.position = nn.Parameter(torch.randn(config.max_words, width) * 0.02)
        self.context = None
        if config.num_layers:
            # As large as words, so that a word's place is heard from the first step on.
            self.place = nn.Parameter(torch.randn(config.max_words, width))
            self.context = DenseTransformer(summary_layers(config, width))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return text.encode_text(texts, self.max_words)

    def count_longer(self, texts: Sequence[str]) -> int:
        return text.count_longer(texts, self.max_words)

    def forward(self, ids_BW: Tensor) -> EncodedText:
        ids_BT = without_empty_columns(ids_BW)
        words_BTD, is_token_BT = self.embedding(ids_BT), ids_BT != PADDING_ID
        summed_BTD = words_BTD
        if self.context is not None:
            # An instruction without words has its first padding to look at: attention to nothing is not a number.
            is_seen_BT = is_token_BT | (torch.arange(ids_BT.shape[1], device=ids_BT.device) == 0)
            layout = Layout.of(torch.full_like(ids_BT, TEXT), is_token_BS=is_seen_BT)
            summed_BTD = self.context(words_BTD + self.place[: ids_BT.shape[1]], layout) * is_token_BT[..., None]
        return EncodedText(
            tokens_BTD=words_BTD + self.position[: ids_BT.shape[1]],
            is_token_BT=is_token_BT,
            summary_BD=F.rms_norm(summed_BTD.sum(1), (self.width,)),
        )


def summary_layers(config: schema.WordText, width: int) -> schema.DenseBackbone:
    """The layers in which words see each other."""
    heads = max(1, width // 32)
    return schema.DenseBackbone(width=width, num_layers=config.num_layers, num_heads=heads, mask="bidirectional")


def without_empty_columns(ids_BW: Tensor) -> Tensor:
    """The ids without the columns that are padding in every row: they cost time and change nothing."""
    if torch.compiler.is_exporting():
        return ids_BW  # a program of fixed shapes
    return ids_BW[:, : max(1, int((ids_BW != PADDING_ID).sum(1).max()))]


def build_text_encoder(config: schema.TextEncoder, width: int) -> TextEncoder:
    """The text encoder that `config.name` names, with random weights; ValueError for a name we do not know."""
    if config.name not in TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {config.name!r}: known are {sorted(TEXT_ENCODERS)}")
    module, class_name = TEXT_ENCODERS[config.name]
    return getattr(import_module(module), class_name)(config, width)
