"""Where the patches of a byte latent transformer begin (Pagnoni et al. 2024, arXiv 2412.09871, section 2).

A text is its UTF-8 bytes after one that says "begin". Every patcher gives a bool a byte, True where a patch begins:

    static     every n bytes
    space      after a byte that is neither letter, digit nor part of a longer character, where such a byte ends a word
    entropy    where a small byte model (lapa/backbones/byte_entropy.py) did not know what comes next

The first two starts are forced: the begin byte is a patch of its own, so that the decoder of a language model always
has a finished patch to look at.

Shapes: B batch, S bytes, the begin byte first and padding last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lapa.text import PADDING_ID

BYTE_OFFSET = 4  # specials, then the 256 bytes
VOCABULARY = 256 + BYTE_OFFSET
BEGIN_ID = 1

ENTROPY_RULES = ("global", "monotonic", "combined")


def utf8(text: str, lower_case: bool) -> bytes:
    """The bytes of a text, whatever is in it."""
    return (text.lower() if lower_case else text).encode("utf-8", errors="replace")


def encode_bytes(texts: Sequence[str], max_bytes: int, lower_case: bool = False) -> Tensor:
    """Ids (B, max_bytes + 1) int64: BEGIN_ID, byte + BYTE_OFFSET, then PADDING_ID; what does not fit is cut off."""
    ids_BS = torch.full((len(texts), max_bytes + 1), PADDING_ID, dtype=torch.int64)
    ids_BS[:, 0] = BEGIN_ID
    for row, text in enumerate(texts):
        values = list(utf8(text, lower_case)[:max_bytes])
        ids_BS[row, 1 : len(values) + 1] = torch.tensor(values, dtype=torch.int64) + BYTE_OFFSET
    return ids_BS


def force_starts(starts_BS: Tensor, ids_BS: Tensor) -> Tensor:
    """The first two starts set, none in the padding."""
    starts_BS = starts_BS.clone()
    starts_BS[:, :2] = True
    return starts_BS & (ids_BS != PADDING_ID)


def static_starts(ids_BS: Tensor, stride: int) -> Tensor:
    """Bool (B, S): a patch every `stride` bytes, counted from the first byte of the text."""
    if stride < 1:
        raise ValueError(f"the stride of static patches is {stride}, expected at least 1: set text.mean_patch_bytes")
    at_stride_S = (torch.arange(ids_BS.shape[1], device=ids_BS.device) - 1) % stride == 0
    return force_starts(at_stride_S.expand_as(ids_BS), ids_BS)


def space_starts(ids_BS: Tensor) -> Tensor:
    """Bool (B, S): a patch is a word with the space-like byte that ends it; further spaces belong to the next one."""
    byte_BS = ids_BS - BYTE_OFFSET
    in_word_BS = torch.zeros_like(byte_BS, dtype=torch.bool)
    # Continuation bytes of UTF-8 are 0x80 to 0xBF; a byte that opens a longer character counts as a space.
    for first, last in ((ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF)):
        in_word_BS |= (byte_BS >= first) & (byte_BS <= last)
    starts_BS = torch.zeros_like(in_word_BS)
    starts_BS[:, 2:] = ~in_word_BS[:, 1:-1] & in_word_BS[:, :-2]
    return force_starts(starts_BS, ids_BS)


def boundary_scores(entropy_BS: Tensor, rule: str) -> Tensor:
    """(B, S): a patch begins at byte t + 1 where the score of byte t is above the threshold.

    Args:
        entropy_BS: in nats, of the model's guess at byte t + 1 after byte t.
        rule: global (the entropy), monotonic (its rise since the byte before), combined (the entropy where it rises).
    """
    if rule == "global":
        return entropy_BS
    rise_BS = torch.full_like(entropy_BS, -torch.inf)
    rise_BS[:, 1:] = entropy_BS.diff(dim=1)
    if rule == "monotonic":
        return rise_BS
    if rule == "combined":
        return entropy_BS.masked_fill(rise_BS <= 0, -torch.inf)
    raise ValueError(f"entropy_rule is {rule!r}, expected one of {', '.join(ENTROPY_RULES)}")


def entropy_starts(score_BS: Tensor, theta: float | Tensor, ids_BS: Tensor) -> Tensor:
    """Bool (B, S): patches that begin after the bytes whose score is above theta."""
    starts_BS = torch.zeros_like(score_BS, dtype=torch.bool)
    starts_BS[:, 1:] = score_BS[:, :-1] > theta
    return force_starts(starts_BS, ids_BS)


def choose_theta(score_BS: Tensor, ids_BS: Tensor, mean_patch_bytes: float) -> float:
    """The threshold under which the patches of these texts have `mean_patch_bytes` bytes on average.

    The begin byte is not counted. Where the rule cannot give as many patches as that takes, it gives all it can.
    """
    if mean_patch_bytes < 1:
        raise ValueError(f"text.mean_patch_bytes is {mean_patch_bytes}, expected at least 1")
    is_byte_BS = ids_BS != PADDING_ID
    num_bytes = int(is_byte_BS.sum()) - len(ids_BS)
    num_forced = int(is_byte_BS[:, 1:2].sum())
    # The start at byte 1 is forced, so the score of the begin byte decides nothing.
    scores = score_BS[:, 1:-1][is_byte_BS[:, 2:]]
    scores = scores[scores > -torch.inf].sort(descending=True).values
    wanted = min(max(round(num_bytes / mean_patch_bytes) - num_forced, 0), len(scores))
    if not len(scores):
        return 0.0
    above = scores[wanted - 1] if wanted else scores[0] + 1
    below = scores[wanted] if wanted < len(scores) else scores[-1] - 1
    # Halfway, so that rounding does not move a patch.
    return float((above + below) / 2)


def pack(ids_BS: Tensor, starts_BS: Tensor) -> Tensor:
    """One int64 a byte that tells the byte and whether a patch begins there."""
    return ids_BS + VOCABULARY * starts_BS


def unpack(packed_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and starts of `pack`."""
    return packed_BS % VOCABULARY, packed_BS >= VOCABULARY


def patch_of_byte(starts_BS: Tensor) -> Tensor:
    """(B, S) int64: the number of the patch each byte is in; padding counts to the last one."""
    return starts_BS.long().cumsum(1) - 1
