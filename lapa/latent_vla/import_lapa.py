"""`lapa import_lapa`: the released LAPA-7B weights, a JAX stream, become a Llama of transformers with a latent head.

The released file (`params`, 13.6 GB) stacks a weight of all layers in one array, holds matrices as (in, out) and
rotates neighbouring pairs of a head's numbers; transformers wants a matrix a layer, as (out, in), and rotates the
first half of a head with the second. So each layer's slice is read from its place in the file, transposed, its
query and key rows put in order, and written to its place in a safetensors file; one matrix at a time is in memory.

The folder then holds

    config.json, model-*.safetensors, their index   what LlamaForCausalLM.from_pretrained reads
    lapa.safetensors, lapa_config.json              the other embeddings and heads, see lapa/latent_vla/llama.py
    vqgan.safetensors                               with vqgan=...: the image tokenizer's weights by their flax paths

The angles of the released model are rounded, which LatentLlama.from_folder follows and a plain LlamaForCausalLM
does not.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from lapa.checkpoint import write_json, write_tensors
from lapa.latent_vla.lapa_stream import StoredArray, read_tensor, scan_stream
from lapa.latent_vla.llama import END_OF_VISION, LATENT_CONFIG_FILE, LATENT_FILE, PROMPT, ROTARY_DTYPES, SUFFIX
from lapa.latent_vla.numpy_pickle import flatten_arrays, read_numpy_pickle
from lapa.schema import ImportLapaConfig

INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

LAYERS = "transformer/h/scan_decoder"
# A weight of one layer in transformers, where it lies in the file, and how it is turned over.
LAYER_WEIGHTS = {
    "self_attn.q_proj": ("attention/wq/kernel", "rotary"),
    "self_attn.k_proj": ("attention/wk/kernel", "rotary"),
    "self_attn.v_proj": ("attention/wv/kernel", "transposed"),
    "self_attn.o_proj": ("attention/wo/kernel", "transposed"),
    "mlp.gate_proj": ("feed_forward/w1/kernel", "transposed"),
    "mlp.up_proj": ("feed_forward/w3/kernel", "transposed"),
    "mlp.down_proj": ("feed_forward/w2/kernel", "transposed"),
    "input_layernorm": ("attention_norm/kernel", "as is"),
    "post_attention_layernorm": ("ffn_norm/kernel", "as is"),
}


@dataclass(frozen=True)
class Weight:
    """One tensor to be written: its name there, and where and how it is read."""

    name: str
    array: StoredArray
    layout: str = "as is"  # as is | transposed | rotary
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.array.shape if self.layer is None else self.array.shape[1:]
        return shape if self.layout == "as is" else shape[::-1]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.array.dtype.itemsize

    def read(self, file: BinaryIO, num_heads: int) -> Tensor:
        tensor = read_tensor(file, self.array, self.layer)
        if self.layout == "as is":
            return tensor
        if self.layout == "rotary":
            # Columns go from (head, pair, two) to (head, two, pair).
            width = tensor.shape[0]
            tensor = tensor.reshape(width, num_heads, -1, 2).transpose(2, 3).reshape(width, -1)
        return tensor.T.contiguous()


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the file say about the model."""

    num_layers: int
    width: int
    feed_forward: int
    text_vocabulary: int
    vision_vocabulary: int
    num_codes: int


def run(cfg: ImportLapaConfig) -> dict:
    """Convert the file; a conversion that was killed goes on at the safetensors file it was writing."""
    if cfg.rotary_dtype not in ROTARY_DTYPES:
        raise ValueError(f"unknown rotary_dtype {cfg.rotary_dtype!r}: known are {sorted(ROTARY_DTYPES)}")
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    arrays = scan_stream(cfg.path)
    sizes = check_arrays(arrays, cfg.path)
    if sizes.width % (2 * cfg.num_heads):
        raise ValueError(f"num_heads is {cfg.num_heads}, the width {sizes.width} is no multiple of twice that")
    shards = split(llama_weights(arrays, sizes), cfg.max_file_gb * 1e9)
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    files[LATENT_FILE] = latent_weights(arrays)
    digest = source_digest(arrays, cfg.path)
    headers = {name: safetensors_header(weights, digest) for name, weights in files.items()}

    missing = [name for name in files if not is_written(output_dir / name, headers[name], files[name])]
    num_bytes = {name: sum(weight.num_bytes for weight in weights) for name, weights in files.items()}
    needed, free = sum(num_bytes[name] for name in missing), shutil.disk_usage(output_dir).free
    if needed > free:
        raise ValueError(
            f"{output_dir} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f}: choose another output_dir"
        )
    with (
        Path(cfg.path).open("rb") as source,
        tqdm(total=sum(num_bytes.values()), desc="import_lapa", unit="B", unit_scale=True, mininterval=1.0) as progress,
    ):
        progress.update(sum(num_bytes.values()) - needed)
        for name in missing:
            write_weights(output_dir / name, headers[name], files[name], source, cfg.num_heads, progress)

    if cfg.vqgan is not None:
        vqgan = flatten_arrays(read_numpy_pickle(cfg.vqgan))
        write_tensors(output_dir / "vqgan.safetensors", {name: torch.from_numpy(a) for name, a in vqgan.items()})
    index = {weight.name: name for name, weights in files.items() if name != LATENT_FILE for weight in weights}
    total = sum(num_bytes.values()) - num_bytes[LATENT_FILE]
    write_json(output_dir / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": index})
    latent_config = {
        "vision_vocabulary": sizes.vision_vocabulary,
        "num_codes": sizes.num_codes,
        "rotary_dtype": cfg.rotary_dtype,
        "prompt": PROMPT,
        "suffix": SUFFIX,
        "end_of_vision": END_OF_VISION,
    }
    write_json(output_dir / LATENT_CONFIG_FILE, latent_config)
    # Last, because a folder with a config.json is one that loads.
    write_json(output_dir / "config.json", llama_config(cfg, sizes, arrays[f"{LAYERS}/attention/wq/kernel"].dtype))
    return {
        "num_parameters": sum(math.prod(array.shape) for array in arrays.values()),
        "num_layers": sizes.num_layers,
        "width": sizes.width,
        "num_files": len(files),
        "output_gb": sum(num_bytes.values()) / 1e9,
    }


def check_arrays(arrays: dict[str, StoredArray], path: str) -> Sizes:
    """The model's sizes; ValueError that lists every missing, unknown or ill-shaped array."""
    expected = {
        "transformer/wte/embedding": ("text", "width"),
        "transformer/vte/embedding": ("vision", "width"),
        "transformer/dte/embedding": ("codes", "width"),
        "transformer/ln_f/kernel": ("width",),
        "lm_head/kernel": ("width", "text"),
        "vision_head/kernel": ("width", "vision"),
        "delta_head/kernel": ("width", "codes"),
        **{f"{LAYERS}/attention/{name}/kernel": ("layers", "width", "width") for name in ("wq", "wk", "wv", "wo")},
        **{f"{LAYERS}/feed_forward/{name}/kernel": ("layers", "width", "hidden") for name in ("w1", "w3")},
        f"{LAYERS}/feed_forward/w2/kernel": ("layers", "hidden", "width"),
        **{f"{LAYERS}/{name}/kernel": ("layers", "width") for name in ("attention_norm", "ffn_norm")},
    }
    problems = [f"missing {key}" for key in expected if key not in arrays]
    problems += [f"unknown {key} {arrays[key].shape}" for key in arrays if key not in expected]
    # The first array in which a size occurs decides it; the others must agree.
    size_of: dict[str, int] = {}
    for key, names in expected.items():
        if key not in arrays:
            continue
        shape = arrays[key].shape
        if len(shape) == len(names):
            for name, size in zip(names, shape, strict=True):
                size_of.setdefault(name, size)
        wanted = tuple(size_of.get(name, name) for name in names)
        if shape != wanted:
            problems.append(f"{key} is {shape}, expected ({', '.join(map(str, wanted))})")
    if problems:
        raise ValueError(
            f"{path} does not hold the weights of LAPA (latent pretraining, layers scanned): {'; '.join(problems)}"
        )
    return Sizes(
        num_layers=size_of["layers"],
        width=size_of["width"],
        feed_forward=size_of["hidden"],
        text_vocabulary=size_of["text"],
        vision_vocabulary=size_of["vision"],
        num_codes=size_of["codes"],
    )


def llama_weights(arrays: dict[str, StoredArray], sizes: Sizes) -> list[Weight]:
    """Every tensor of LlamaForCausalLM, in the order in which the model runs."""
    weights = [Weight("model.embed_tokens.weight", arrays["transformer/wte/embedding"])]
    for layer in range(sizes.num_layers):
        weights += [
            Weight(f"model.layers.{layer}.{name}.weight", arrays[f"{LAYERS}/{key}"], layout, layer)
            for name, (key, layout) in LAYER_WEIGHTS.items()
        ]
    weights.append(Weight("model.norm.weight", arrays["transformer/ln_f/kernel"]))
    weights.append(Weight("lm_head.weight", arrays["lm_head/kernel"], "transposed"))
    return weights


def latent_weights(arrays: dict[str, StoredArray]) -> list[Weight]:
    """The parts that LatentLlama adds."""
    return [
        Weight("vision_embedding.weight", arrays["transformer/vte/embedding"]),
        Weight("latent_embedding.weight", arrays["transformer/dte/embedding"]),
        Weight("vision_head.weight", arrays["vision_head/kernel"], "transposed"),
        Weight("latent_head.weight", arrays["delta_head/kernel"], "transposed"),
    ]


def split(weights: list[Weight], max_bytes: float) -> list[list[Weight]]:
    """Consecutive groups of at most `max_bytes`; a weight larger than that has its own."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + weight.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.num_bytes
    return groups


def source_digest(arrays: dict[str, StoredArray], path: str) -> str:
    """Names, places and the first bytes of all arrays: enough to tell two checkpoints apart without reading 13.6 GB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for array in arrays.values():
            digest.update(repr(array).encode())
            file.seek(array.spans[0][0])
            digest.update(file.read(min(4096, array.spans[0][1])))
    return digest.hexdigest()[:16]


def safetensors_header(weights: list[Weight], digest: str) -> bytes:
    """The start of a safetensors file: the header's length, then the header, padded to a multiple of 8 bytes."""
    header: dict = {"__metadata__": {"format": "pt", "source": digest}}
    start = 0
    for weight in weights:
        end = start + weight.num_bytes
        dtype = DTYPE_NAMES[weight.array.dtype]
        header[weight.name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_written(path: Path, header: bytes, weights: list[Weight]) -> bool:
    """Whether an earlier call finished this file, from this source."""
    if not path.is_file() or path.stat().st_size != len(header) + sum(weight.num_bytes for weight in weights):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write_weights(
    path: Path, header: bytes, weights: list[Weight], source: BinaryIO, num_heads: int, progress: tqdm
) -> None:
    """Write a safetensors file tensor by tensor, atomically; save_file would want all of them in memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(header)
        for weight in weights:
            file.write(memoryview(weight.read(source, num_heads).reshape(-1).view(torch.uint8).numpy()))
            progress.update(weight.num_bytes)
    temporary.replace(path)


def llama_config(cfg: ImportLapaConfig, sizes: Sizes, dtype: torch.dtype) -> dict:
    """config.json as transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype) read it."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.text_vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
