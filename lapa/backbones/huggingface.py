"""Language and vision-language models of transformers as backbones, with LoRA (arXiv 2106.09685).

    backbone=smolvlm2 text=huggingface image_tokenizer=huggingface        the whole vision-language model
    backbone=huggingface backbone.path=<folder or hub name>               its language model alone

The folder gives a model, which is taken apart: layers here, vocabulary and vision tower in
`lapa.backbones.huggingface_inputs`. Weights are read from safetensors alone; classes are those of the installed
transformers, code that a folder brings is refused, and nothing is fetched unless local_files_only=false.

What is saved needs the folder no more: the configuration carries transformers' own (`model_config`), and the weights
are saved with all others, LoRA's beside those of the layers they belong to, so that training can go on.

Who looks at whom is decided by the layout, as for every backbone: the mask (B, 1, Q, K) is given to the layers, and a
model that does not obey it is refused.

Shapes: B batch, S sequence, Q queries, K keys, P past, D width, N heads, G heads of keys and values, H width of a
head, I tokens of an image.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapa.backbones.base import IMAGE, Backbone, Cache, Layout, see
from lapa.schema import HuggingFaceBackbone as HuggingFaceConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Keys that are left out: how the model is computed, which may be code of a hub repository, and where it lay.
NOT_FROM_A_FILE = ("attn_implementation", "experts_implementation", "name_or_path")
LAPA_FILE = "lapa_config.json"  # of `lapa import_lapa`: what the released weights expect beside a Llama


@dataclass
class Parts:
    """A model of transformers, taken apart.

    config: complete by itself, without the folder. source: where tokenizer and image statistics lie, or None.
    language_model: (inputs_embeds, mask, positions) to hidden states. embedding: ids to embeddings.
    vision: what has `get_image_features`, or None for a language model.
    """

    config: HuggingFaceConfig
    source: str | None
    language_model: Any
    embedding: nn.Module
    vision: Any


def require_transformers() -> Any:
    """The package; ValueError with the install command where it is missing."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "backbone=huggingface needs the package transformers: pip install 'lerobot_policy_lapa[transformers]'"
        ) from None
    return transformers


def read_model_file(path: str, name: str, local_files_only: bool) -> Any:
    """The JSON file `name` of a folder or hub repository; None where there is none."""
    require_transformers()
    from transformers.utils import cached_file

    try:
        file = cached_file(path, name, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise not_at_hand(path, first_line(error)) from None
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def not_at_hand(path: str, reason: str) -> ValueError:
    if Path(path).is_dir():
        return ValueError(f"{reason} in {path}: backbone.path must name a model of transformers")
    return ValueError(
        f"{path} is neither a folder nor a model that was downloaded before ({reason}): give a local folder, or set "
        "backbone.local_files_only=false to download it"
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A configuration without what could bring code in; ValueError where it asks for code or quantised weights."""
    clean = {}
    for key, value in values.items():
        if key == "auto_map":
            raise ValueError(
                f"{where} asks for code of its own (auto_map): only models that transformers has are built"
            )
        if key == "quantization_config" and value is not None:
            raise ValueError(f"the weights of {where} are quantised and cannot be trained: take the unquantised model")
        if any(name in key for name in NOT_FROM_A_FILE):
            continue
        clean[key] = checked(value, where) if isinstance(value, dict) else value
    return clean


def model_class(values: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Configuration object, and the auto class that builds its model; ValueError for another kind of model."""
    transformers = require_transformers()
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    known = transformers.CONFIG_MAPPING
    name = values.get("model_type")
    if name not in known:
        raise ValueError(f"{where} has model_type {name!r}, which transformers {transformers.__version__} lacks")
    config = known[name].from_dict(copy.deepcopy(values))
    if not config.is_encoder_decoder:
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return config, transformers.AutoModelForImageTextToText
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return config, transformers.AutoModelForCausalLM
    raise ValueError(
        f"{where} is a model of type {name!r}: expected an image-text-to-text model (SmolVLM, Qwen-VL, PaliGemma, ...) "
        "or a causal language model (Llama, ...)"
    )


def load_parts(config: HuggingFaceConfig) -> Parts:
    """Read or build the model that the configuration names, and take it apart.

    Raises ValueError for a name that is not at hand, code in the folder, a model of another kind, weights that are
    missing or in another format, and options that do not fit.
    """
    check_options(config)
    if config.path is not None:
        config = dataclasses.replace(config, path=str(Path(config.path).expanduser()))
    lapa = None
    if config.path is not None:
        values = read_model_file(config.path, "config.json", config.local_files_only)
        if values is None:
            raise not_at_hand(config.path, "no config.json")
        lapa = read_model_file(config.path, LAPA_FILE, local_files_only=True)
    elif config.model_config is not None:
        values = config.model_config
    else:
        raise ValueError("backbone=huggingface needs backbone.path: the folder of a model, or its name on the hub")
    where = config.path or "backbone.model_config"
    values = checked(values, where)
    transformers_config, auto_class = model_class(values, where)
    text_config = transformers_config.get_text_config()
    # Only the plain attention of transformers knows the soft cap on scores that Gemma 2 is trained with.
    attention = "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": attention, "trust_remote_code": False}
    if config.path is not None and config.weights == "pretrained":
        model = read_weights(auto_class, config, transformers_config, options)
    else:
        model = auto_class.from_config(transformers_config, **options)
    language_model, embedding, vision = take_apart(model.base_model)
    embedding.requires_grad_(not config.freeze_embeddings)
    prompt, rotary_dtype = config.prompt, config.rotary_dtype
    if rotary_dtype == "auto":
        rotary_dtype = lapa["rotary_dtype"] if lapa else "float32"
    if prompt is None:
        prompt = lapa["prompt"] + "{image}" + lapa["suffix"] if lapa else None
    complete = dataclasses.replace(
        config,
        path=None,
        local_files_only=True,
        model_config=checked(json.loads(transformers_config.to_json_string(use_diff=False)), where),
        width=text_config.hidden_size,
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        prompt=prompt,
        rotary_dtype=rotary_dtype,
    )
    return Parts(complete, config.path, language_model, embedding, vision)


def take_apart(base: Any) -> tuple[Any, nn.Module, Any]:
    """Language model, its embeddings, and what is left of the model: its vision tower, or None."""
    language_model = base.get_decoder()
    embedding = language_model.get_input_embeddings()
    language_model.set_input_embeddings(None)
    if base is language_model:
        return language_model, embedding, None
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if child is language_model:
                setattr(parent, name, None)
    return language_model, embedding, base


def check_options(config: HuggingFaceConfig) -> None:
    choices = {
        "weights": ("pretrained", "random"),
        "dtype": tuple(DTYPES),
        "rotary_dtype": ("auto", *ROTARY_DTYPES),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"backbone.{name} is {getattr(config, name)!r}, expected one of {', '.join(known)}")
    if config.lora_rank < 0:
        raise ValueError(f"backbone.lora_rank is {config.lora_rank}, expected 0 (off) or more")


def read_weights(auto_class: Any, config: HuggingFaceConfig, transformers_config: Any, options: dict) -> Any:
    """The model with every weight from its safetensors; transformers would fill what is missing at random."""
    try:
        model, report = auto_class.from_pretrained(
            config.path,
            config=transformers_config,
            use_safetensors=True,
            local_files_only=config.local_files_only,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"no weights in safetensors at {config.path} ({first_line(error)}): give a local folder with them, or set "
            "backbone.local_files_only=false to download a model that is named"
        ) from None
    # The head that predicts words is dropped; some files leave it out because it is the embedding.
    missing = [name for name in report["missing_keys"] if not name.startswith("lm_head")]
    wrong = {"missing": sorted(missing), "of another shape": sorted(map(str, report["mismatched_keys"]))}
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in wrong.items() if names)
        raise ValueError(f"the weights in {config.path} do not fit its config.json ({found}): download it again")
    return model


class HuggingFaceBackbone(Backbone):
    """The layers of a language model of transformers. See `lapa.backbones.base` for the contract.

    Attributes:
        image_grid: rows and columns of an image's tokens, for models that count positions along both (Qwen-VL).
    """

    def __init__(self, config: HuggingFaceConfig, parts: Parts | None = None):
        if parts is None:
            parts = load_parts(config)
        super().__init__(parts.config)
        self.config: HuggingFaceConfig = parts.config
        self.language_model = parts.language_model
        self.text_config = self.language_model.config
        self.image_grid: tuple[int, int] | None = None
        self._deep_images: tuple[Tensor, list[Tensor]] | None = None
        if self.config.rotary_dtype != "float32":
            self.language_model.rotary_emb = RoundedRotaryEmbedding(
                self.head_width, self._rotary()["rope_theta"], ROTARY_DTYPES[self.config.rotary_dtype]
            )
        refuse_disobedience(self.language_model, self.width)
        if self.config.lora_rank:
            add_lora(self.language_model, self.config)
        elif self.config.freeze_language:
            self.language_model.requires_grad_(False)
        if self.config.checkpoint_activations:
            recompute_activations(self.language_model)
        set_learning_rate_ratio(self, self.config.learning_rate_ratio)

    @property
    def head_width(self) -> int:
        return getattr(self.text_config, "head_dim", None) or self.width // self.text_config.num_attention_heads

    def _rotary(self) -> dict[str, Any]:
        return getattr(self.text_config, "rope_parameters", None) or {}

    def hand_over(self, image_BID: Tensor, deep: list[Tensor]) -> None:
        """What deeper layers add to these image tokens (DeepStack, arXiv 2406.04334), used with the next that come.

        Args:
            deep: a tensor (B, I, D) for each of the first layers.
        """
        self._deep_images = (image_BID, deep)

    def forward(self, tokens_BSD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, S, D), normalised, from embeddings (B, S, D), in their type."""
        if cache is not None and self.training and self.config.checkpoint_activations:
            raise ValueError("recomputing activations and a cache exclude each other: call model.eval() to decode")
        mask_BQK = see(layout, cache, self.mask)
        keys = layout if cache is None or cache.layout is None else cache.layout
        self._refuse_longer_than_window(mask_BQK.shape[-1])
        dtype = self.language_model.dtype
        output = self.language_model(
            inputs_embeds=tokens_BSD.to(dtype),
            attention_mask=self._mask(mask_BQK, dtype),
            position_ids=self._positions(layout, keys),
            past_key_values=None if cache is None else _KeysAndValues(cache, mask_BQK.shape[-1] - mask_BQK.shape[-2]),
            use_cache=False,
            **self._deep(tokens_BSD, layout),
        )
        return output.last_hidden_state.to(tokens_BSD.dtype)

    def _mask(self, mask_BQK: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 1, Q, K): bool for the fused attention, what is added to the scores for the plain one."""
        if self.text_config._attn_implementation == "sdpa":
            return mask_BQK[:, None]
        return torch.zeros_like(mask_BQK, dtype=dtype).masked_fill(~mask_BQK, torch.finfo(dtype).min)[:, None]

    def _refuse_longer_than_window(self, length: int) -> None:
        window = getattr(self.text_config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(self.text_config, "layer_types", None) or ()) and length > window:
            raise ValueError(
                f"{length} tokens, but some layers of this model are trained to look {window} back, and would be made "
                "to look further: use fewer tokens (backbone.image_input_size, text.max_tokens)"
            )

    def _positions(self, queries: Layout, keys: Layout) -> Tensor:
        """(B, Q), or (3, B, Q) where the model counts time, row and column."""
        if "mrope_section" in self._rotary() and self.image_grid is not None:
            return grid_positions(queries, keys, self.image_grid)
        return queries.position_ids_BS

    def _deep(self, tokens_BSD: Tensor, layout: Layout) -> dict[str, Any]:
        """The arguments by which Qwen3-VL's language model takes in features of deeper vision layers."""
        if self._deep_images is None:
            return {}
        is_image_BS = (layout.modality_ids_BS == IMAGE) & layout.is_token_BS
        if not bool(is_image_BS.any()):
            return {}
        image_BID, deep = self._deep_images
        self._deep_images = None
        if not torch.equal(tokens_BSD[is_image_BS], image_BID.flatten(0, 1).to(tokens_BSD.dtype)):
            raise ValueError("these image tokens are not those whose deep features were handed over: call prefix again")
        return {"visual_pos_masks": is_image_BS, "deepstack_visual_embeds": [part.flatten(0, 1) for part in deep]}

    def forward_flops(self, modality_lengths: Sequence[int]) -> int:
        """See the contract; of models in the form of Llama. ValueError for mixtures of experts and other forms."""
        length, rotary = sum(modality_lengths), self._rotary()
        heads, layers = self.text_config.num_attention_heads, getattr(self.language_model, "layers", None)
        if layers is None or not rotary:
            raise ValueError(f"the operations of {type(self.language_model).__name__} cannot be counted")
        linear = [module for module in layers.modules() if isinstance(module, nn.Linear)]
        counted = {id(module.weight) for module in linear}
        unknown = [name for name, p in layers.named_parameters() if p.ndim > 1 and id(p) not in counted]
        if unknown:
            raise ValueError(
                f"the operations of {unknown[0]} are not known: only linear layers and attention are counted"
            )
        projections = sum(2 * length * module.in_features * module.out_features for module in linear)
        scores = 4 * length * length * heads * self.head_width
        # The angles are a product of positions and frequencies, once for all layers of a kind.
        axes = 3 if "mrope_section" in rotary else sum(isinstance(kind, dict) for kind in rotary.values()) or 1
        angles = axes * length * self.head_width if self.config.rotary_dtype == "float32" else 0
        return projections + len(layers) * scores + angles


class _KeysAndValues:
    """Our cache, in the form in which the layers of transformers write to one and read from it."""

    is_compileable = False

    def __init__(self, cache: Cache, num_past: int):
        self.cache, self.num_past = cache, num_past

    def update(self, keys_BGSH: Tensor, values_BGSH: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.cache.extend(layer, keys_BGSH, values_BGSH)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.num_past


def grid_positions(queries: Layout, keys: Layout, grid: tuple[int, int]) -> Tensor:
    """Positions (3, B, Q) along time, rows and columns (M-RoPE, arXiv 2409.12191).

    A text token advances all three by one; an image's tokens stand at one time and spread over rows and columns, and
    what follows goes on behind the longer side.

    Args:
        queries: the last Q of the K tokens of `keys`.
        grid: rows and columns of every image's tokens.
    """
    rows, columns = grid
    per_image, side = rows * columns, max(rows, columns)
    num_queries, num_keys = queries.modality_ids_BS.shape[1], keys.modality_ids_BS.shape[1]
    key = torch.arange(num_keys, device=keys.modality_ids_BS.device)
    is_before_QK = key < key[num_keys - num_queries :, None]
    same_document_BQK = queries.document_ids_BS[:, :, None] == keys.document_ids_BS[:, None]
    is_image_BK = (keys.modality_ids_BS == IMAGE) & keys.is_token_BS
    seen_BQ = (same_document_BQK & is_before_QK & is_image_BK[:, None]).sum(-1)
    index_BQ = seen_BQ % per_image  # in its image; 0 for what is in none
    start_BQ = queries.position_ids_BS - index_BQ - seen_BQ // per_image * (per_image - side)
    is_image_BQ = is_image_BK[:, num_keys - num_queries :]
    row_BQ, column_BQ = is_image_BQ * (index_BQ // columns), is_image_BQ * (index_BQ % columns)
    return torch.stack([start_BQ, start_BQ + row_BQ, start_BQ + column_BQ])


@torch.no_grad()
def refuse_disobedience(language_model: Any, width: int) -> None:
    """ValueError for a model whose layers do not look where the mask says, tried on two tokens."""
    was_training, device = language_model.training, next(language_model.parameters()).device
    language_model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BSD = torch.randn(1, 2, width, generator=generator).repeat(2, 1, 1)
    tokens_BSD[1, 1] = torch.randn(width, generator=generator)
    position_ids_BS = torch.arange(2, device=device).expand(2, -1)
    is_bool = language_model.config._attn_implementation == "sdpa"

    def first_token(sees_BQK: Tensor) -> Tensor:
        added = torch.zeros(sees_BQK.shape).masked_fill(~sees_BQK, torch.finfo(language_model.dtype).min)
        mask = sees_BQK if is_bool else added.to(language_model.dtype)
        output = language_model(
            inputs_embeds=tokens_BSD.to(device, language_model.dtype),
            attention_mask=mask[:, None].to(device),
            position_ids=position_ids_BS,
            use_cache=False,
        )
        return output.last_hidden_state[:, 0]

    both_ways = torch.ones(2, 2, 2, dtype=torch.bool)
    causal, open_ = first_token(both_ways.tril()), first_token(both_ways)
    language_model.train(was_training)
    if not torch.allclose(causal[0], causal[1]) or torch.equal(open_[0], open_[1]):
        raise ValueError(
            f"{type(language_model).__name__} does not look where its attention mask says: use another model"
        )


def add_lora(language_model: Any, config: HuggingFaceConfig) -> None:
    """Put low-rank adapters beside the linear layers that lora_targets names, and freeze all else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "backbone.lora_rank needs the package peft: pip install 'lerobot_policy_lapa[transformers]'"
        ) from None
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"(.*\.)?({config.lora_targets})",
    )
    inject_adapter_in_model(adapters, language_model)
    for parameter in language_model.parameters():
        if parameter.requires_grad:
            # A bfloat16 weight would round most of an optimiser's steps away.
            parameter.data = parameter.data.float()


def recompute_activations(model: Any) -> None:
    """Recompute the activations of a model's layers in the backward pass."""
    # gradient_checkpointing_enable would look for embeddings, which are not here.
    model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))


def set_learning_rate_ratio(module: nn.Module, ratio: float) -> None:
    """Let the optimiser train this module's weights in a group of their own (`lapa.trainer.parameter_groups`)."""
    if ratio != 1:
        for parameter in module.parameters():
            parameter.learning_rate_ratio = ratio  # type: ignore[attr-defined]


ROTARY_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RoundedRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary angles that were rounded to a low precision first.

    LAPA's released weights were trained where the angle position / theta^(2i/H) was stored in bfloat16, whose 8 bits
    leave steps of 2 radians at position 300. The weights have learned those positions, not the exact ones.
    """

    def __init__(self, head_width: int, theta: float, dtype: torch.dtype):
        super().__init__()
        self.head_width, self.theta, self.dtype = head_width, theta, dtype

    def forward(self, hidden_BSD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, H) in the dtype of the hidden states, for positions (B, S)."""
        exponent_K = torch.arange(0, self.head_width, 2, device=position_ids.device, dtype=torch.float64)
        angle_BSK = (position_ids[..., None] / self.theta ** (exponent_K / self.head_width)).to(self.dtype)
        angle_BSH = torch.cat([angle_BSK, angle_BSK], dim=-1)
        return angle_BSH.cos().to(hidden_BSD.dtype), angle_BSH.sin().to(hidden_BSD.dtype)
