"""Instructions as word ids by stable hashing: no vocabulary file, no unknown words.

id = crc32(word) mod (TEXT_VOCABULARY - 1) + 1; 0 is padding. Two words share an id once in some four
thousand pairs, which a few hundred words of instructions can bear.
"""

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TEXT_VOCABULARY = 4096
PADDING_ID = 0

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case words; punctuation separates and goes."""
    return _WORD.findall(text.lower())


def word_id(word: str) -> int:
    return zlib.crc32(word.encode("utf-8")) % (TEXT_VOCABULARY - 1) + 1


def word_ids(text: str, max_text_tokens: int) -> list[int]:
    """The ids of a text's first words."""
    return [word_id(word) for word in words_of(text)[:max_text_tokens]]


def encode_text(texts: Sequence[str], max_text_tokens: int) -> "Tensor":
    """Word ids (B, W) int64, padded with 0; W = max_text_tokens, and words past it are cut off."""
    import torch  # here, so that a robot without torch can make ids

    ids_BW = torch.full((len(texts), max_text_tokens), PADDING_ID, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = word_ids(text, max_text_tokens)
        ids_BW[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return ids_BW


def count_longer(texts: Sequence[str], max_text_tokens: int) -> int:
    """How many texts have more words than fit."""
    return sum(len(words_of(text)) > max_text_tokens for text in texts)
