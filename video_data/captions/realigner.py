"""A captioner that edits: frames and a noisy title in, a caption out (after Altogether, arXiv 2410.17251).

    [prefix | title, padded on the left | <begin> caption <end>]

An image encoder gives a few visual tokens; they and as many learned constants go through a small transformer (the
mapper), and what the constants become is the prefix of a decoder-only transformer that reads the title and writes the
caption, greedily. There, the image encoder is a pretrained one and the decoder a language model; here both are small
and trained from nothing, because they must be to run anywhere.

A vocabulary of words, in which a word that it lacks gets a number: the first unknown word of a title is <name 0> on
both sides, the next <name 1>. So a name never met in training is kept letter by letter, and only whether it is worth
keeping is learned (after Luong et al., arXiv 1410.8206); sentences of words are also five times shorter than ones of
letters, which is what a CPU pays for.

Shapes: B clips, F frames shown, H height, W width, V visual tokens, P prefix, T title, C caption, S sequence,
D width, K width of the image encoder, N words of the vocabulary.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from video_data.captions.frames import spread
from video_data.captions.text import clean_caption
from video_data.captions.titles import split_words
from video_data.clips import ClipRequest

ORIGIN = "realigned"
NUM_NAMES = 6
SPECIAL = ("<pad>", "<begin>", "<end>", "<unknown>", *(f"<name {i}>" for i in range(NUM_NAMES)))
PAD, BEGIN, END, UNKNOWN, FIRST_NAME = range(5)


class Vocabulary:
    """Words and numbers for the words that it lacks.

    words: in lower case, without the special ones.
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words, start=len(SPECIAL))}

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int) -> "Vocabulary":
        """The words that the texts use at least `min_count` times."""
        counts = Counter(word.lower() for text in texts for word in split_words(text))
        return cls(sorted(word for word, count in counts.items() if count >= min_count))

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def names(self, title: str) -> list[str]:
        """The words of a title that have numbers, as they are written there."""
        unknown: dict[str, str] = {}
        for word in split_words(title):
            if word.lower() not in self._ids:
                unknown.setdefault(word.lower(), word)
        return list(unknown.values())[:NUM_NAMES]

    def encode(self, text: str, names: Sequence[str]) -> list[int]:
        numbers = {name.lower(): FIRST_NAME + i for i, name in enumerate(names)}
        words = [word.lower() for word in split_words(text)]
        return [self._ids.get(word, numbers.get(word, UNKNOWN)) for word in words]

    def decode(self, ids: Iterable[int], names: Sequence[str]) -> str:
        """The text up to <end>; a number without a name says nothing."""
        known = dict(enumerate(names, start=FIRST_NAME)) | dict(enumerate(self.words, start=len(SPECIAL)))
        said = itertools.takewhile(lambda i: i != END, ids)
        return " ".join(known[i] for i in said if i in known)


class ImageEncoder(nn.Module):
    """Frames of a clip, stacked, to visual tokens: attention maps pick where to look, at a quarter of the size.

    Convolutions see all frames at once, so what moved between them shows at once. The last token is what there is
    anywhere (the maximum over the picture): it learns first, while the maps still look everywhere.
    """

    def __init__(self, num_frames: int, width: int, num_tokens: int):
        super().__init__()
        if num_tokens < 2:
            raise ValueError(f"num_visual_tokens is {num_tokens}, expected at least 2: a map, and what is anywhere")
        self.layers = nn.Sequential(
            nn.Conv2d(3 * num_frames, width // 2, 5, stride=2, padding=2),
            nn.GroupNorm(4, width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        )
        self.maps = nn.Conv2d(width, num_tokens - 1, 1)
        self.output_width = width + 2

    def forward(self, frames: Tensor) -> Tensor:
        """Visual tokens (B, V, K) of frames (B, F, 3, H, W) in [0, 1]: features there, and where (x, y) in [-1, 1]."""
        features_BKHW = self.layers(frames.flatten(1, 2) - 0.5)
        weights_BVX = self.maps(features_BKHW).flatten(2).softmax(dim=-1)
        rows, columns = (torch.linspace(-1, 1, n, device=frames.device) for n in features_BKHW.shape[-2:])
        places_2X = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
        places_B2X = places_2X.to(features_BKHW.dtype).expand(len(frames), -1, -1)
        content_BKX = torch.cat([features_BKHW.flatten(2), places_B2X], dim=1)
        found_BVK = weights_BVX @ content_BKX.mT
        anywhere_BK = F.pad(features_BKHW.amax(dim=(2, 3)), (0, 2))  # at no place
        return torch.cat([found_BVK, anywhere_BK[:, None]], dim=1)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, S, S) bool, True where a position may look; None: everywhere."""
        heads = self.queries_keys_values(self.attention_norm(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x_BSD = x_BSD + self.attention_output(seen.transpose(1, 2).flatten(2))
        return x_BSD + self.feed_forward(x_BSD)


@dataclass(frozen=True)
class RealignerOptions:
    """What a saved realigner is built from (`realigner` of lapa.schema.TrainRealignerConfig, and the frames' size)."""

    image_size: int
    num_frames: int
    encoder_width: int
    num_visual_tokens: int
    num_prefix_tokens: int
    width: int
    num_heads: int
    num_mapper_layers: int
    num_layers: int
    max_title_words: int
    max_caption_words: int


class Realigner(nn.Module):
    """Visual tokens and title to caption.

    sees_frames: False is the control that can only copy: its visual tokens are zeros.
    """

    def __init__(self, options: RealignerOptions, num_words: int, sees_frames: bool = True):
        super().__init__()
        self.options, self.sees_frames = options, sees_frames
        width = options.width
        self.encoder = ImageEncoder(options.num_frames, options.encoder_width, options.num_visual_tokens)
        self.visual_projection = nn.Linear(self.encoder.output_width, width)
        self.constants = nn.Parameter(0.02 * torch.randn(options.num_prefix_tokens, width))
        self.mapper = nn.ModuleList(Block(width, options.num_heads) for _ in range(options.num_mapper_layers))
        self.embedding = nn.Embedding(num_words, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # <begin> takes a place of its own beside the caption's words.
        length = options.num_prefix_tokens + options.max_title_words + options.max_caption_words + 1
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, options.num_heads) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, visual_BVK: Tensor, titles_BT: Tensor, written_BC: Tensor) -> Tensor:
        """Logits (B, C, N) of the word that follows each of `written_BC`, which opens with <begin>."""
        if not self.sees_frames:
            visual_BVK = torch.zeros_like(visual_BVK)
        mapped_BSD = torch.cat(
            [self.visual_projection(visual_BVK), self.constants.expand(len(visual_BVK), -1, -1)], dim=1
        )
        for block in self.mapper:
            mapped_BSD = block(mapped_BSD)
        num_prefix = len(self.constants)
        text_BS = torch.cat([titles_BT, written_BC], dim=1)
        # Places are counted so that the caption begins at the same one, however long the titles of a batch are.
        begin = num_prefix + self.options.max_title_words - titles_BT.shape[1]
        places = torch.cat([self.positions[:num_prefix], self.positions[begin : begin + text_BS.shape[1]]])
        x_BSD = torch.cat([mapped_BSD[:, -num_prefix:], self.embedding(text_BS)], dim=1) + places
        length = x_BSD.shape[1]
        is_word_BS = F.pad(text_BS != PAD, (num_prefix, 0), value=True)
        causal_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device).tril()
        mask = causal_SS & is_word_BS[:, None, None, :]
        for block in self.blocks:
            x_BSD = block(x_BSD, mask)
        last = x_BSD[:, -written_BC.shape[1] :]
        return self.norm(last) @ self.embedding.weight.T

    @torch.inference_mode()
    def write(self, visual_BVK: Tensor, titles_BT: Tensor) -> Tensor:
        """Captions (B, C) by greedy decoding; what stands behind <end> means nothing."""
        written_BC = torch.full((len(titles_BT), 1), BEGIN, device=titles_BT.device)
        # Words that no text can be made of: a name that the title does not have among them.
        has_name = torch.stack([(titles_BT == FIRST_NAME + i).any(dim=1) for i in range(NUM_NAMES)], dim=1)
        forbidden_BX = F.pad(~has_name, (FIRST_NAME, 0), value=True)
        forbidden_BX[:, END] = False
        for _ in range(self.options.max_caption_words):
            logits_BN = self(visual_BVK, titles_BT, written_BC)[:, -1]
            logits_BN[:, : len(SPECIAL)].masked_fill_(forbidden_BX, -torch.inf)
            written_BC = torch.cat([written_BC, logits_BN.argmax(dim=-1, keepdim=True)], dim=1)
            if (written_BC == END).any(dim=1).all():
                break
        return written_BC[:, 1:]


def title_tokens(titles: Sequence[str], vocabulary: Vocabulary, max_words: int) -> tuple[np.ndarray, list[list[str]]]:
    """(B, T) int64, padded on the left, and the names in each title; words past `max_words` are cut off."""
    names = [vocabulary.names(title) for title in titles]
    rows = [vocabulary.encode(title, known)[:max_words] for title, known in zip(titles, names, strict=True)]
    longest = max(map(len, rows))
    return np.array([[PAD] * (longest - len(row)) + row for row in rows], np.int64), names


def caption_tokens(
    captions: Sequence[str], names: Sequence[Sequence[str]], vocabulary: Vocabulary, max_words: int
) -> np.ndarray:
    """(B, C + 1) int64: <begin>, the words, <end> where there is room, padding."""
    known = zip(captions, names, strict=True)
    rows = [[BEGIN, *vocabulary.encode(caption, own), END][: max_words + 1] for caption, own in known]
    longest = max(map(len, rows))
    return np.array([row + [PAD] * (longest - len(row)) for row in rows], np.int64)


def shown_to_model(frames: np.ndarray, num_frames: int, size: int) -> np.ndarray:
    """(F, H, W, 3) uint8: `num_frames` of a clip, first to last, the centre square of each at `size` pixels."""
    picked = spread(len(frames), num_frames)
    # A clip of fewer frames shows its last one again.
    picked += picked[-1:] * (num_frames - len(picked))
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    squares = [frames[i, top : top + side, left : left + side] for i in picked]
    if side == size:
        return np.stack(squares)
    scaling = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return np.stack([cv2.resize(square, (size, size), interpolation=scaling) for square in squares])


def to_float(frames: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float().div_(255)


def rewrite(
    model: Realigner, vocabulary: Vocabulary, visual_BVK: Tensor, titles: Sequence[str], num_rounds: int = 1
) -> list[str]:
    """Captions for clips with these visual tokens and titles; each round edits what the one before wrote."""
    texts = list(titles)
    for _ in range(num_rounds):
        tokens, names = title_tokens(texts, vocabulary, model.options.max_title_words)
        written = model.write(visual_BVK, torch.from_numpy(tokens).to(visual_BVK.device)).tolist()
        texts = [vocabulary.decode(ids, known) for ids, known in zip(written, names, strict=True)]
    return texts


def load_realigner(folder: Path) -> tuple[Realigner, Vocabulary]:
    """The model in a folder that `lapa train_realigner` wrote; ValueError for another folder."""
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"no config.json and model.safetensors in {folder}: name a model of `lapa train_realigner`")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"realigner", "words", "sees_frames"} <= config.keys():
        raise ValueError(f"{path} is not of a realigner: name a model of `lapa train_realigner`")
    vocabulary = Vocabulary(config["words"])
    model = Realigner(RealignerOptions(**config["realigner"]), len(vocabulary), config["sees_frames"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), vocabulary


class RealigningCaptioner:
    """Edits the captions that clips came with, by what their frames show.

    options: the fields of lapa.schema.Captioner. Raises ValueError for a folder without such a model.
    """

    def __init__(self, options):
        if not options.model:
            raise ValueError("captioner.name=realigner needs captioner.model: a model folder of `lapa train_realigner`")
        if options.only_missing:
            raise ValueError(
                "captioner.name=realigner edits the captions that clips came with: set captioner.only_missing=false"
            )
        if options.num_rounds < 1:
            raise ValueError(f"captioner.num_rounds is {options.num_rounds}, expected at least 1")
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.options, self.device = options, torch.device(device)
        model, self.vocabulary = load_realigner(Path(options.model).expanduser())
        self.model = model.to(self.device)
        if options.num_frames < model.options.num_frames:
            raise ValueError(
                f"captioner.num_frames is {options.num_frames}, the realigner looks at {model.options.num_frames}"
            )

    def caption(self, frames: np.ndarray, request: ClipRequest) -> tuple[str, str]:
        return self.caption_batch([frames], [request])[0]

    def caption_batch(self, frames: Sequence[np.ndarray], requests: Sequence[ClipRequest]) -> list[tuple[str, str]]:
        """(caption, origin) of clips whose frames are (T, H, W, 3) uint8 each."""
        options = self.model.options
        captions = []
        for batch in itertools.batched(zip(frames, requests, strict=True), self.options.batch_size):
            shown = np.stack([shown_to_model(clip, options.num_frames, options.image_size) for clip, _ in batch])
            with torch.inference_mode():
                visual_BVK = self.model.encoder(to_float(shown).to(self.device))
            titles = [clean_caption(request.caption) for _, request in batch]
            captions += rewrite(self.model, self.vocabulary, visual_BVK, titles, self.options.num_rounds)
        return [(caption, ORIGIN if caption else "none") for caption in captions]
