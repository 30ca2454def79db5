"""Models of transformers with a few thousand random weights, as folders on disk: the form in which real ones come."""

import json
from pathlib import Path
from typing import Any

import torch

WIDTH = 32
WORDS = ["go", "to", "the", "left", "right", "reach", "red", "moon", "User", "Assistant", ":", "user", "assistant"]
WORDS += ["system", "You", "are", "a", "helpful", "You", "."]
# Marks of all prompts, and of the images in the models' own forward passes.
MARKS = ["<unk>", "<pad>", "<image>", "<bos>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<global-img>"]
MARKS += ["<fake_token_around_image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCABULARY = list(dict.fromkeys(MARKS + WORDS))
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY) + 3,  # more rows than the tokenizer has ids, as real models have
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
VISION: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA: dict[str, Any] = {"model_type": "llama", **TEXT}


def token_id(mark: str) -> int:
    return VOCABULARY.index(mark)


def configuration(kind: str) -> Any:
    """llama, smolvlm, qwen2_5_vl, qwen3_vl, paligemma (on Gemma 1), paligemma2 (on Gemma 2) or mistral3."""
    import transformers

    marks = {"image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>")}
    marks |= {"vision_start_token_id": token_id("<|vision_start|>"), "vision_end_token_id": token_id("<|vision_end|>")}
    if kind == "llama":
        return transformers.LlamaConfig(**TEXT)
    if kind == "smolvlm":
        vision = {"model_type": "smolvlm_vision", "image_size": 32, "patch_size": 8, **VISION}
        return transformers.SmolVLMConfig(
            text_config=LLAMA, vision_config=vision, image_token_id=token_id("<image>"), scale_factor=2, pad_token_id=1
        )
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": WIDTH}
        vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **marks
        )
    if kind == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 1e4}
        vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": WIDTH}
        vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        text = {**TEXT, "rope_parameters": rope, "head_dim": 8}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    if kind == "mistral3":
        vision = {"model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 8, **VISION}
        text = {"model_type": "mistral", **TEXT}
        return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)
    gemma = {"model_type": "gemma2" if kind == "paligemma2" else "gemma", **TEXT, "head_dim": 8}
    if kind == "paligemma2":
        gemma |= {"sliding_window": 48, "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh"}
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 16,
        "patch_size": 8,
        "vision_use_head": False,
        **VISION,
    }
    return transformers.PaliGemmaConfig(
        text_config=gemma,
        vision_config=vision,
        image_token_index=token_id("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=TEXT["vocab_size"],
    )


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A model folder: config.json, model.safetensors, tokenizer.json, preprocessor_config.json."""
    import transformers

    torch.manual_seed(seed)
    auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModelForImageTextToText
    model = auto.from_config(configuration(kind))
    with torch.no_grad():
        # Initial weights of deviation 0.02 hardly look at anything.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if kind != "llama":
        statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
        (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder
