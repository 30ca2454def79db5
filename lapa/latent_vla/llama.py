"""LAPA-7B as a Llama of transformers with two more vocabularies: image tokens and latent actions.

    [ prompt | image tokens | suffix | latent actions ]     causal; every part has its own embedding

After arXiv 2410.11758 (the model) and 2402.08268 (LWM, its base). Three embedding tables feed one Llama and three
heads read it: `text_head` (32,000 words), `vision_head` (8448 = 8192 image codes and 256 special ids) and
`latent_head` (8 codes). The first latent action is predicted at the last token of the suffix, the next ones from
those before.

What the released weights expect, and `lapa_config.json` repeats. This module takes ids; the two tokenizers are no
part of it:

    prompt    `PROMPT` with the instruction, by the Llama 2 sentencepiece model that is published beside the weights,
              nothing prepended; "<s>" in it is the id 1
    image     256 px, RGB in [-1, 1], by LWM's VQGAN: 16x16 codes of 8192, row by row, then END_OF_VISION
    suffix    `SUFFIX`, by the same sentencepiece model
    answer    4 latent actions, greedily. (The released sampler takes a code of 2 for the end of a sentence, whose id
              is 2 too, and fills up with zeros; here all four are predicted.)

Shapes: B batch, T prompt, V image tokens, U suffix, L latent actions, S the whole sequence, D width, C codes,
P positions with those of the cache, H width of a head, K its pairs of numbers.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lapa.backbones.huggingface import ROTARY_DTYPES, RoundedRotaryEmbedding
from lapa.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.cache_utils import Cache

PROMPT = (
    "<s> <s> You are a helpful assistant. "
    "USER: What action should the robot take to `{instruction}` ASSISTANT: <vision>"
)
SUFFIX = "</vision> <delta>"
END_OF_VISION = 8193

LATENT_FILE = "lapa.safetensors"
LATENT_CONFIG_FILE = "lapa_config.json"
LATENT_PARTS = ("vision_embedding", "latent_embedding", "vision_head", "latent_head")
TEXT, VISION, LATENT = 0, 1, 2


class LatentLlama(nn.Module):
    """A Llama over text, image tokens and latent actions.

    Args:
        llama: of any size; its own embedding and head are the text's.
        vision_vocabulary: ids of image tokens.
        num_codes: ids of latent actions.
        rotary_dtype: "bfloat16" where the weights were trained with angles rounded so, else "float32".
    """

    def __init__(
        self, llama: "LlamaForCausalLM", vision_vocabulary: int, num_codes: int, rotary_dtype: str = "float32"
    ):
        super().__init__()
        if rotary_dtype not in ROTARY_DTYPES:
            raise ValueError(f"unknown rotary_dtype {rotary_dtype!r}: known are {sorted(ROTARY_DTYPES)}")
        config: Any = llama.config  # transformers types every field as optional
        width, scale = config.hidden_size, config.initializer_range
        self.llama = llama
        if rotary_dtype != "float32":
            head_width, theta = width // config.num_attention_heads, config.rope_parameters["rope_theta"]
            llama.model.rotary_emb = RoundedRotaryEmbedding(head_width, theta, ROTARY_DTYPES[rotary_dtype])
        self.vision_embedding = nn.Embedding(vision_vocabulary, width)
        self.latent_embedding = nn.Embedding(num_codes, width)
        self.vision_head = nn.Linear(width, vision_vocabulary, bias=False)
        self.latent_head = nn.Linear(width, num_codes, bias=False)
        for part in LATENT_PARTS:
            nn.init.normal_(getattr(self, part).weight, std=scale)

    @property
    def text_head(self) -> nn.Module:
        return self.llama.lm_head

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> "LatentLlama":
        """The model that `lapa import_lapa` wrote to `folder`, on the CPU, in `dtype`, ready for inference.

        Reads safetensors and JSON only. Raises ValueError for another folder, or where a weight is missing.
        """
        folder = Path(folder)
        if not (folder / LATENT_CONFIG_FILE).is_file():
            raise ValueError(f"no {LATENT_CONFIG_FILE} in {folder}: expected a folder written by `lapa import_lapa`")
        config = read_json(folder / LATENT_CONFIG_FILE)
        model = cls(
            load_llama(folder, dtype), config["vision_vocabulary"], config["num_codes"], config["rotary_dtype"]
        ).to(dtype)
        tensors = load_file(folder / LATENT_FILE)
        expected = {f"{part}.weight": getattr(model, part).weight.shape for part in LATENT_PARTS}
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise ValueError(f"{folder / LATENT_FILE} does not fit {LATENT_CONFIG_FILE}: run `lapa import_lapa` again")
        model.load_state_dict(tensors, strict=False)
        return model.eval()

    def embed(self, ids_BS: Tensor, modality: int) -> Tensor:
        """Embeddings (B, S, D) of ids of one modality: TEXT, VISION or LATENT. ValueError for an id it lacks."""
        name, table = (
            ("text", self.llama.model.embed_tokens),
            ("vision", self.vision_embedding),
            ("latent", self.latent_embedding),
        )[modality]
        if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < table.num_embeddings:
            raise ValueError(
                f"{name} ids are {int(ids_BS.min())} to {int(ids_BS.max())}, the vocabulary has 0 to "
                f"{table.num_embeddings - 1}: check which tokenizer made them"
            )
        return table(ids_BS)

    def hidden(
        self, embeddings_BSD: Tensor, is_token_BP: Tensor, cache: "Cache | None" = None, use_cache: bool = False
    ) -> tuple[Tensor, "Cache | None"]:
        """Hidden states (B, S, D), which the heads read, and the cache of keys and values with these S added.

        Args:
            embeddings_BSD: of `embed`, for the last S of P positions; the cache holds the others.
            is_token_BP: bool, False at padding. Positions count tokens, so padding on the left changes nothing.
        """
        position_BP = (is_token_BP.long().cumsum(1) - 1).clamp(min=0)
        output = self.llama.model(
            inputs_embeds=embeddings_BSD,
            attention_mask=is_token_BP.long(),
            position_ids=position_BP[:, -embeddings_BSD.shape[1] :],
            past_key_values=cache,
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values

    def prefix(
        self, text_ids_BT: Tensor, vision_ids_BV: Tensor, suffix_ids_BU: Tensor, is_text_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, D) of prompt, image and suffix, and which are tokens (B, S)."""
        parts = [(text_ids_BT, TEXT), (vision_ids_BV, VISION), (suffix_ids_BU, TEXT)]
        embeddings_BSD = torch.cat([self.embed(ids, modality) for ids, modality in parts], dim=1)
        is_token_BS = torch.ones(embeddings_BSD.shape[:2], dtype=torch.bool, device=text_ids_BT.device)
        if is_text_BT is not None:
            is_token_BS[:, : text_ids_BT.shape[1]] = is_text_BT
        return embeddings_BSD, is_token_BS

    def forward(
        self,
        text_ids_BT: Tensor,
        vision_ids_BV: Tensor,
        suffix_ids_BU: Tensor,
        latent_ids_BL: Tensor,
        is_text_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, C) of each latent action, given what comes before it: cross entropy against latent_ids_BL.

        Args:
            is_text_BT: False where the prompt is padded, on its left; default: no padding.
        """
        prefix_BSD, is_token_BS = self.prefix(text_ids_BT, vision_ids_BV, suffix_ids_BU, is_text_BT)
        length = latent_ids_BL.shape[1]
        # What the last latent action predicts is no latent action.
        embeddings_BSD = torch.cat([prefix_BSD, self.embed(latent_ids_BL[:, :-1], LATENT)], dim=1)
        is_token_BS = nn.functional.pad(is_token_BS, (0, length - 1), value=True)
        hidden_BSD, _ = self.hidden(embeddings_BSD, is_token_BS)
        return self.latent_head(hidden_BSD[:, -length:])

    @torch.inference_mode()
    def generate_latent_actions(
        self,
        text_ids_BT: Tensor,
        vision_ids_BV: Tensor,
        suffix_ids_BU: Tensor,
        num_tokens: int = 4,
        is_text_BT: Tensor | None = None,
    ) -> Tensor:
        """The likeliest latent actions (B, num_tokens) int64, one after another, with a key-value cache.

        Args:
            text_ids_BT: the tokenized `PROMPT`.
            vision_ids_BV: the image's codes row by row, then END_OF_VISION.
            suffix_ids_BU: the tokenized `SUFFIX`.
            is_text_BT: False where the prompt is padded, on its left; default: no padding.
        """
        embeddings_BSD, is_token_BS = self.prefix(text_ids_BT, vision_ids_BV, suffix_ids_BU, is_text_BT)
        cache, latents = None, []
        for _ in range(num_tokens):
            hidden_BSD, cache = self.hidden(embeddings_BSD, is_token_BS, cache, use_cache=True)
            latents.append(self.latent_head(hidden_BSD[:, -1:]).argmax(-1))
            embeddings_BSD = self.embed(latents[-1], LATENT)
            is_token_BS = nn.functional.pad(is_token_BS, (0, 1), value=True)
        return torch.cat(latents, dim=1)


def load_llama(folder: Path, dtype: torch.dtype) -> "LlamaForCausalLM":
    """The text model in `folder`, with every weight from there; nothing is fetched, no code comes with it."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        raise ValueError(
            "LatentLlama needs the package transformers: pip install 'lerobot_policy_lapa[transformers]'"
        ) from None
    loaded: Any = LlamaForCausalLM.from_pretrained(
        os.fspath(folder), dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    llama, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if kind.endswith("_keys") and names}
    if wrong:
        # transformers fills what is missing with random numbers and goes on.
        raise ValueError(f"the weights in {folder} do not fit its config.json ({wrong}): run `lapa import_lapa` again")
    return llama
