"""Vocabulary and vision tower of a vision-language model of transformers, as text encoder and image tokenizer.

A model has seen image and instruction in one form in training, its prompt: where the image stands, and which special
tokens surround both. `PROMPTS` holds that form for the models that are tested.

Shapes: B batch, W ids, T tokens, C channels, H W pixels, I image tokens, D width, F numbers of a patch.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.huggingface import (
    Parts,
    read_model_file,
    recompute_activations,
    require_transformers,
    set_learning_rate_ratio,
)
from lapa.backbones.text import EncodedText, TextEncoder
from lapa.schema import HuggingFaceText as HuggingFaceTextConfig
from lapa.text import PADDING_ID

TOKENIZER_FILE = "tokenizer.json"
_QWEN = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{instruction}<|im_end|>\n<|im_start|>assistant\n"
_QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# By transformers' model_type: one picture and one request, then the model's turn.
PROMPTS = {
    "smolvlm": (
        "<|im_start|>User:<fake_token_around_image><global-img>{image}<fake_token_around_image>{instruction}"
        "<end_of_utterance>\nAssistant:"
    ),
    "qwen2_vl": _QWEN_SYSTEM + _QWEN,
    "qwen2_5_vl": _QWEN_SYSTEM + _QWEN,
    "qwen3_vl": _QWEN,
    "paligemma": "{image}<bos>{instruction}\n",
}
DEFAULT_PROMPT = "{image}{instruction}"
# How `get_image_features` wants its pixels, by model_type; all others take (B, C, H, W).
PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NUMBERED_IMAGES = ("smolvlm", "idefics3")  # (B, 1, C, H, W)
PATCHES_INPUT_SIZE = 224  # pixels, where the model takes any size


class HuggingFaceText(TextEncoder):
    """The model's prompt with the instruction in it, through its tokenizer and embeddings.

    Ids are the tokenizer's plus one, 0 is padding. What stands before the image and what stands behind it fill two
    ranges of columns, each padded at its end. The tokenizer's file is kept as a tensor among the weights, so that a
    saved model needs no other file.
    """

    def __init__(self, config: HuggingFaceTextConfig, width: int, parts: Parts | None = None):
        super().__init__()
        if parts is None:
            raise ValueError("text=huggingface is the vocabulary of a model: it needs backbone=huggingface")
        self.config, self.width = config, width
        self.embedding = parts.embedding
        set_learning_rate_ratio(self.embedding, parts.config.learning_rate_ratio)
        model_type = (parts.config.model_config or {}).get("model_type", "")
        self.prompt = parts.config.prompt or PROMPTS.get(model_type, DEFAULT_PROMPT)
        if self.prompt.count("{image}") != 1 or self.prompt.count("{instruction}") != 1:
            raise ValueError(f"backbone.prompt is {self.prompt!r}, expected {{image}} and {{instruction}} once each")
        self.before, self.after = self.prompt.split("{image}")
        self.register_buffer("tokenizer_bytes", torch.zeros(0, dtype=torch.uint8))
        self._tokenizer: Any = None
        source = config.tokenizer or parts.source
        content = read_tokenizer(source, parts.config.local_files_only) if source else None
        if content is not None:
            self.tokenizer_bytes = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._check_vocabulary(check_prompt=parts.config.prompt is None)
        elif parts.source:
            raise ValueError(
                f"no {TOKENIZER_FILE} in {source}: set text.tokenizer to a folder that has one; transformers writes it "
                "with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )

    @property
    def tokenizer(self) -> Any:
        """A tokenizers.Tokenizer; ValueError where neither a folder nor loaded weights brought one."""
        if self._tokenizer is None:
            if not self.tokenizer_bytes.numel():
                raise ValueError("there is no tokenizer yet: set text.tokenizer to a folder with tokenizer.json")
            require_transformers()
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.tokenizer_bytes.cpu().numpy().tobytes().decode("utf-8"))
        return self._tokenizer

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        rows = [self._ids(text)[0] for text in texts]
        ids_BW = torch.full((len(texts), 2 * self.config.max_tokens), PADDING_ID, dtype=torch.int64)
        for row, parts in enumerate(rows):
            for start, ids in zip((0, self.config.max_tokens), parts, strict=True):
                ids_BW[row, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
        return ids_BW

    def count_longer(self, texts: Sequence[str]) -> int:
        return sum(self._ids(text)[1] for text in texts)

    def forward(self, ids_BW: Tensor) -> EncodedText:
        return self.split(ids_BW)[0]

    def split(self, ids_BW: Tensor) -> tuple[EncodedText, int]:
        """The tokens, and how many of them stand before the image."""
        # A column that is padding in every row costs time and changes nothing.
        is_used_W = (ids_BW != PADDING_ID).any(0)
        is_token_BT = (ids_BW != PADDING_ID)[:, is_used_W]
        tokens_BTD = self.embedding((ids_BW[:, is_used_W] - 1).clamp(min=0)).float()
        summary_BD = F.rms_norm((tokens_BTD * is_token_BT[..., None]).sum(1), (self.width,))
        return EncodedText(tokens_BTD, is_token_BT, summary_BD), int(is_used_W[: self.config.max_tokens].sum())

    def _ids(self, text: str) -> tuple[tuple[list[int], list[int]], bool]:
        """Ids before and behind the image, and whether the instruction was cut off at its last words."""
        words, count = text.split(), len(text.split())
        while True:
            # Unless it has to be cut, the instruction stays as it is, line breaks and all.
            shown = text if len(words) == count else " ".join(words)
            parts = tuple(
                self.tokenizer.encode(part.replace("{instruction}", shown), add_special_tokens=False).ids
                for part in (self.before, self.after)
            )
            if max(map(len, parts)) <= self.config.max_tokens:
                return (parts[0], parts[1]), len(words) < count
            if not words:
                raise ValueError(
                    f"text.max_tokens is {self.config.max_tokens}, the prompt alone takes {max(map(len, parts))}"
                )
            words.pop()

    def _check_vocabulary(self, check_prompt: bool) -> None:
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        if max(ids.values()) >= self.embedding.num_embeddings:
            raise ValueError(
                f"the tokenizer has ids up to {max(ids.values())}, the model {self.embedding.num_embeddings} "
                "embeddings: it is the tokenizer of another model"
            )
        missing = [mark for mark in re.findall(r"<[^<>{}\s]+>", self.prompt) if mark not in ids]
        if check_prompt and missing:
            raise ValueError(f"the tokenizer lacks {missing} of the prompt {self.prompt!r}: set backbone.prompt")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        saved = state_dict.get(f"{prefix}tokenizer_bytes")
        if saved is not None:
            # Tokenizers differ in size, and this one may not have been read yet.
            self.tokenizer_bytes = torch.empty_like(saved, device=self.tokenizer_bytes.device)
            self._tokenizer = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def read_tokenizer(source: str, local_files_only: bool) -> bytes | None:
    """The content of tokenizer.json, in a folder, a hub repository or itself; None where there is none."""
    source = str(Path(source).expanduser())
    if Path(source).is_file():
        return Path(source).read_bytes()
    require_transformers()
    from transformers.utils import cached_file

    try:
        file = cached_file(
            source, TOKENIZER_FILE, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False
        )
    except OSError:
        return None
    return None if file is None else Path(file).read_bytes()


class HuggingFaceImages(nn.Module):
    """The model's vision tower and connector: tokens (B, I, D) of the language model's width.

    Images are resized to what the tower was trained on and normalised by its own mean and standard deviation. One
    view, not the crops and tiles that some processors add.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, parts: Parts, image_size: int):
        super().__init__()
        if parts.vision is None or not hasattr(parts.vision, "get_image_features"):
            raise ValueError(
                "image_tokenizer=huggingface needs a model with a vision tower, this one is "
                f"{type(parts.language_model).__name__}: set image_tokenizer=keypoints or grid"
            )
        inputs = inspect.signature(parts.vision.get_image_features).parameters.values()
        required = [p.name for p in inputs if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if required != ["pixel_values"]:
            raise ValueError(
                f"the vision tower of {type(parts.vision).__name__} also wants {required[1:]} (it cuts images into "
                "several views): set image_tokenizer=keypoints or grid, or take another model"
            )
        self.vision, self.image_size = parts.vision, image_size
        self.model_type = self.vision.config.model_type
        vision_config: Any = self.vision.config.vision_config
        own_size = getattr(vision_config, "image_size", 0)
        if isinstance(own_size, list | tuple):
            own_size = max(own_size)
        self.input_size = parts.config.image_input_size or own_size
        self.grid: tuple[int, int] | None = None
        if self.model_type in PATCHES:
            self.patch_size, self.merge_size = vision_config.patch_size, vision_config.spatial_merge_size
            self.frames_per_patch = vision_config.temporal_patch_size
            cell = self.patch_size * self.merge_size
            self.input_size = self.input_size or PATCHES_INPUT_SIZE
            if self.input_size % cell:
                raise ValueError(f"backbone.image_input_size is {self.input_size}, expected a multiple of {cell}")
            self.grid = (self.input_size // cell, self.input_size // cell)
        mean, std = image_statistics(parts)
        self.register_buffer("mean_C11", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std_C11", torch.tensor(std).view(3, 1, 1))
        if parts.config.freeze_vision:
            self.vision.requires_grad_(False)
        elif parts.config.checkpoint_activations:
            recompute_activations(self.vision)
        set_learning_rate_ratio(self.vision, parts.config.learning_rate_ratio)

    def forward(self, images_BCHW: Tensor, instruction_BD: Tensor) -> Tensor:
        return self.encode(images_BCHW)[0]

    def encode(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, I, D), and what the first layers add to them, (B, I, D) each; mostly nothing.

        Args:
            images_BCHW: RGB in [0, 1].
        """
        pixels_BCHW = self.preprocess(images_BCHW)
        if self.model_type in PATCHES:
            pixels, grid_B3 = self.patches(pixels_BCHW)
            output = self.vision.get_image_features(pixels, grid_B3, return_dict=True)
        elif self.model_type in NUMBERED_IMAGES:
            output = self.vision.get_image_features(pixels_BCHW[:, None], return_dict=True)
        else:
            output = self.vision.get_image_features(pixels_BCHW, return_dict=True)
        tokens = output.pooler_output
        batch = len(images_BCHW)
        if isinstance(tokens, list | tuple):
            tokens = torch.cat([part.flatten(0, -2) for part in tokens])
        deep = getattr(output, "deepstack_features", None) or []
        return tokens.reshape(batch, -1, tokens.shape[-1]).float(), [
            part.reshape(batch, -1, part.shape[-1]) for part in deep
        ]

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Of the tower's size, normalised."""
        size = (self.input_size, self.input_size)
        if images_BCHW.shape[-2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images_BCHW - self.mean_C11) / self.std_C11

    def patches(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Qwen-VL's input: patches (B * cells, F), neighbours that are merged into a token after each other.

        An image is a film of equal frames. Also the number of patches along time, rows and columns (B, 3).
        """
        side = self.input_size // self.patch_size
        cells = (side // self.merge_size, self.merge_size, self.patch_size)
        film = pixels_BCHW[:, None].expand(-1, self.frames_per_patch, -1, -1, -1)
        film = film.unflatten(4, cells).unflatten(3, cells)  # batch, frame, channel, then (cell, merged, pixel) twice
        patches = film.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)
        grid = torch.tensor([[1, side, side]], device=pixels_BCHW.device)
        return patches, grid.expand(len(pixels_BCHW), -1)


def image_statistics(parts: Parts) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel by which the model's images are normalised."""
    plain = [0.5] * 3
    if parts.source is None:
        return plain, plain  # overwritten by the saved weights
    options = read_model_file(parts.source, "preprocessor_config.json", parts.config.local_files_only)
    if options is None:
        options = (read_model_file(parts.source, "processor_config.json", parts.config.local_files_only) or {}).get(
            "image_processor"
        )
    if options is None:
        if parts.config.weights == "random":
            return plain, plain
        raise ValueError(f"no preprocessor_config.json in {parts.source}: it says how images are normalised")
    return options.get("image_mean", plain), options.get("image_std", plain)
