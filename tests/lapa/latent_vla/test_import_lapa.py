"""A tiny file in the released format, converted, against the released model's mathematics written out plainly.

Shapes: B batch, S sequence, D width, H heads, P pairs of numbers of a head.
"""

import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapa.checkpoint import read_json
from lapa.latent_vla.import_lapa import run
from lapa.latent_vla.lapa_stream import read_tensor, scan_stream
from lapa.latent_vla.llama import LATENT, TEXT, VISION, LatentLlama
from lapa.latent_vla.numpy_pickle import flatten_arrays, read_numpy_pickle
from lapa.schema import ImportLapaConfig
from lapa.stage import run_stage

msgpack = pytest.importorskip("msgpack")
transformers = pytest.importorskip("transformers")

LAYERS, WIDTH, HEADS, FEED_FORWARD = 3, 32, 4, 48
TEXT_IDS, VISION_IDS, CODES = 40, 20, 8
THETA, EPSILON = 500.0, 1e-6
BLOCK = "transformer/h/scan_decoder"


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the released file."""
    generator = torch.Generator().manual_seed(seed)
    stacked = (LAYERS, WIDTH, WIDTH)
    shapes = {
        "transformer/wte/embedding": (TEXT_IDS, WIDTH),
        "transformer/vte/embedding": (VISION_IDS, WIDTH),
        "transformer/dte/embedding": (CODES, WIDTH),
        **{f"{BLOCK}/attention/{name}/kernel": stacked for name in ("wq", "wk", "wv", "wo")},
        f"{BLOCK}/feed_forward/w1/kernel": (LAYERS, WIDTH, FEED_FORWARD),
        f"{BLOCK}/feed_forward/w2/kernel": (LAYERS, FEED_FORWARD, WIDTH),
        f"{BLOCK}/feed_forward/w3/kernel": (LAYERS, WIDTH, FEED_FORWARD),
        f"{BLOCK}/attention_norm/kernel": (LAYERS, WIDTH),
        f"{BLOCK}/ffn_norm/kernel": (LAYERS, WIDTH),
        "transformer/ln_f/kernel": (WIDTH,),
        "lm_head/kernel": (WIDTH, TEXT_IDS),
        "vision_head/kernel": (WIDTH, VISION_IDS),
        "delta_head/kernel": (WIDTH, CODES),
    }
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        # Large enough that attention is uneven, and so sees positions; small enough that rounding stays small.
        is_norm, is_embedding = "norm" in name or "ln_f" in name, "embedding" in name
        weights[name] = (noise if is_embedding else 1 + 0.2 * noise if is_norm else 0.2 * noise).to(dtype)
    return weights


def flax_array(tensor: Tensor):
    """An array as flax packs it."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    name = str(tensor.dtype).removeprefix("torch.")
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), name, data), use_bin_type=True))


def flax_bytes(tensor: Tensor, max_chunk_bytes: int) -> bytes:
    """flax.serialization.to_bytes of an array: in chunks where it is larger than `max_chunk_bytes`."""
    if tensor.numel() * tensor.itemsize <= max_chunk_bytes:
        return msgpack.packb(flax_array(tensor))
    chunks = tensor.reshape(-1).split(max_chunk_bytes // tensor.itemsize)
    return msgpack.packb(
        {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): size for i, size in enumerate(tensor.shape)},
            "chunks": {str(i): flax_array(chunk) for i, chunk in enumerate(chunks)},
        }
    )


def write_stream(path: Path, weights: dict[str, Tensor], max_chunk_bytes: int = 2**30, key=None) -> Path:
    """Records `[key, bytes]`, one after another; the released keys are lists of names."""
    key = key or (lambda name: name.split("/"))
    records = (msgpack.packb((key(name), flax_bytes(tensor, max_chunk_bytes))) for name, tensor in weights.items())
    path.write_bytes(b"".join(records))
    return path


def convert(folder: Path, weights: dict[str, Tensor], **options) -> Path:
    """Import the weights; chunks of 1000 bytes end inside layers, small files make several of them."""
    source = write_stream(folder / "params", weights, max_chunk_bytes=1000)
    defaults = {"num_heads": HEADS, "rope_theta": THETA, "rotary_dtype": "float32", "max_file_gb": 2e-5}
    run(ImportLapaConfig(path=str(source), output_dir=str(folder / "out"), **(defaults | options)))
    return folder / "out"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    weights = parameters()
    return weights, convert(tmp_path_factory.mktemp("lapa"), weights)


def reference_hidden(weights: dict[str, Tensor], x_BSD: Tensor, angle_dtype=torch.float64) -> Tensor:
    """The JAX model: pre-norm blocks, rotation of neighbouring numbers as complex ones, SwiGLU; after the last norm.

    In float64, so that it is the other side that rounds.
    """

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight

    batch, length, width = x_BSD.shape
    head = width // HEADS
    frequency_P = 1.0 / THETA ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle_SP = (torch.arange(length)[:, None] * frequency_P).to(angle_dtype)
    cos, sin = angle_SP.cos().double(), angle_SP.sin().double()
    rotation_SP = torch.complex(cos, sin)[:, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    for layer in range(LAYERS):

        def kernel(name, layer=layer):
            return weights[f"{BLOCK}/{name}/kernel"][layer]

        normed = norm(x_BSD, kernel("attention_norm"))
        q, k, v = ((normed @ kernel(f"attention/{n}")).reshape(batch, length, HEADS, head) for n in ("wq", "wk", "wv"))
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * rotation_SP).flatten(-2)
            for y in (q, k)
        )
        scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(head)
        mixed = torch.einsum("bhst,bthd->bshd", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)
        x_BSD = x_BSD + mixed.reshape(batch, length, width) @ kernel("attention/wo")
        normed = norm(x_BSD, kernel("ffn_norm"))
        gate = torch.nn.functional.silu(normed @ kernel("feed_forward/w1"))
        x_BSD = x_BSD + (gate * (normed @ kernel("feed_forward/w3"))) @ kernel("feed_forward/w2")
    return norm(x_BSD, weights["transformer/ln_f/kernel"])


def tokens(seed: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt, image, suffix and latent ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = ((TEXT_IDS, 7), (VISION_IDS, 50), (TEXT_IDS, 3), (CODES, 4))
    text, vision, suffix, latent = (
        torch.randint(0, size, (batch, length), generator=generator) for size, length in lengths
    )
    return text, vision, suffix, latent


@pytest.mark.parametrize("rotary_dtype", ["float32", "bfloat16"])
def test_all_logits_equal_the_plain_mathematics(tmp_path, rotary_dtype):
    weights = parameters()
    model = LatentLlama.from_folder(convert(tmp_path, weights, rotary_dtype=rotary_dtype), dtype=torch.float32)
    exact = {name: weight.double() for name, weight in weights.items()}
    text, vision, suffix, latent = tokens()
    table = {part: exact[f"transformer/{part}/embedding"] for part in ("wte", "vte", "dte")}
    embedded = torch.cat([table["wte"][text], table["vte"][vision], table["wte"][suffix], table["dte"][latent]], 1)
    by_precision = {
        "float32": reference_hidden(exact, embedded, torch.float64),
        "bfloat16": reference_hidden(exact, embedded, torch.bfloat16),
    }
    difference = (by_precision["float32"] - by_precision["bfloat16"]).abs().max()
    assert difference > 1e-2, "the two precisions of the angles must be told apart here"

    with torch.no_grad():
        latent_logits = model(text, vision, suffix, latent)
        parts = [(text, TEXT), (vision, VISION), (suffix, TEXT), (latent, LATENT)]
        embeddings = torch.cat([model.embed(ids, modality) for ids, modality in parts], 1)
        found, _ = model.hidden(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool))
        text_logits, vision_logits = model.text_head(found), model.vision_head(found)

    def expected(head: str) -> Tensor:
        return (by_precision[rotary_dtype] @ exact[f"{head}/kernel"]).float()

    assert latent_logits.shape == (2, 4, CODES)
    torch.testing.assert_close(latent_logits, expected("delta_head")[:, -5:-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_logits, expected("lm_head"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vision_logits, expected("vision_head"), atol=1e-5, rtol=1e-5)


def test_transformers_loads_the_text_model_alone(imported):
    weights, folder = imported
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = {name: weight.double() for name, weight in weights.items()}
    text = tokens()[0]
    expected = reference_hidden(exact, exact["transformer/wte/embedding"][text]) @ exact["lm_head/kernel"]
    torch.testing.assert_close(llama(text).logits, expected.float(), atol=1e-5, rtol=1e-5)
    assert llama.config.rope_parameters["rope_theta"] == THETA
    files = set(read_json(folder / "model.safetensors.index.json")["weight_map"].values())
    assert len(files) > 3, "the weights were to be spread over several files"
    assert all((folder / name).is_file() for name in files)


def test_weights_keep_the_precision_they_were_stored_in(tmp_path):
    weights = parameters(dtype=torch.bfloat16)
    folder = convert(tmp_path, weights)
    assert read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert "{instruction}" in read_json(folder / "lapa_config.json")["prompt"]
    head = load_file(folder / "lapa.safetensors")["latent_head.weight"]
    assert torch.equal(head, weights["delta_head/kernel"].T)


def test_generation_with_the_cache_is_greedy_decoding_without_it(imported):
    model = LatentLlama.from_folder(imported[1], dtype=torch.float32)
    text, vision, suffix, _ = tokens()
    latents = torch.zeros(2, 4, dtype=torch.int64)
    for position in range(4):
        latents[:, position] = model(text, vision, suffix, latents)[:, position].argmax(-1)
    assert torch.equal(model.generate_latent_actions(text, vision, suffix, num_tokens=4), latents)
    assert len(latents.unique()) > 1


def test_padding_on_the_left_changes_nothing(imported):
    model = LatentLlama.from_folder(imported[1], dtype=torch.float32)
    text, vision, suffix, latent = tokens()
    padded = torch.nn.functional.pad(text, (5, 0), value=0)
    is_text = torch.arange(padded.shape[1]).expand(2, -1) >= 5
    torch.testing.assert_close(
        model(padded, vision, suffix, latent, is_text), model(text, vision, suffix, latent), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(
        model.generate_latent_actions(padded, vision, suffix, is_text_BT=is_text),
        model.generate_latent_actions(text, vision, suffix),
    )


def test_model_of_random_weights_learns_one_batch():
    config = transformers.LlamaConfig(
        vocab_size=TEXT_IDS, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=2,
        num_attention_heads=HEADS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LatentLlama(transformers.LlamaForCausalLM(config), VISION_IDS, CODES)
    text, vision, suffix, latent = tokens(batch=4)
    used = [p for name, p in model.named_parameters() if name not in ("vision_head.weight", "llama.lm_head.weight")]
    optimizer = torch.optim.Adam(used, lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(text, vision, suffix, latent).flatten(0, 1), latent.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used)
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(model.generate_latent_actions(text, vision, suffix), latent)


def test_ids_of_another_vocabulary_are_named(imported):
    model = LatentLlama.from_folder(imported[1], dtype=torch.float32)
    text, vision, suffix, latent = tokens()
    with pytest.raises(ValueError, match=f"vision ids are .* the vocabulary has 0 to {VISION_IDS - 1}"):
        model(text, vision + VISION_IDS, suffix, latent)


@pytest.mark.parametrize(
    "key",
    [
        lambda name: name.split("/"),
        lambda name: ["params", *name.split("/")],
        lambda name: ["params", "params", *name.split("/")],
        lambda name: name,
        lambda name: [part.encode() for part in name.split("/")],
    ],
    ids=["list", "params", "train state", "one text", "bytes"],
)
def test_every_style_of_key_and_every_chunking_gives_the_same_arrays(tmp_path, key):
    weights = parameters(dtype=torch.bfloat16)
    path = write_stream(tmp_path / "params", weights, max_chunk_bytes=700, key=key)
    arrays = scan_stream(path)
    assert list(arrays) == list(weights)
    assert len(arrays["lm_head/kernel"].spans) > 1
    with path.open("rb") as file:
        for name, array in arrays.items():
            assert torch.equal(read_tensor(file, array), weights[name])
            if name.startswith(BLOCK):
                assert all(torch.equal(read_tensor(file, array, i), weights[name][i]) for i in range(LAYERS))


def test_missing_unknown_and_ill_shaped_arrays_are_all_listed(tmp_path):
    weights = parameters()
    del weights["delta_head/kernel"]
    weights["transformer/ate/embedding"] = torch.zeros(3, WIDTH)
    weights["lm_head/kernel"] = torch.zeros(WIDTH, TEXT_IDS + 1)
    with pytest.raises(ValueError) as error:
        convert(tmp_path, weights)
    assert "missing delta_head/kernel" in str(error.value)
    assert "unknown transformer/ate/embedding (3, 32)" in str(error.value)
    assert f"lm_head/kernel is (32, 41), expected ({WIDTH}, {TEXT_IDS})" in str(error.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="GB more and has"):
        convert(tmp_path, parameters())
    assert not list((tmp_path / "out").iterdir())


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_heads is 5"):
        convert(tmp_path, parameters(), num_heads=5)


@pytest.mark.parametrize("max_chunk_bytes", [2**30, 64])
def test_a_file_cut_anywhere_is_refused_with_the_byte(tmp_path, max_chunk_bytes):
    path = write_stream(tmp_path / "params", {"lm_head/kernel": torch.ones(6, 8)}, max_chunk_bytes)
    whole = path.read_bytes()
    scan_stream(path)
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"truncated.*ends at byte {length}"):
            scan_stream(path)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": np.ones(3)}),
        b"PK\x03\x04 a zip archive, as torch.save writes it",
        b'{"format": "json"}',
        msgpack.packb({"a tree": 1}),
        msgpack.packb((["a"], 1)),
        msgpack.packb((["a"], msgpack.packb([1, 2]))),
        msgpack.packb((["a"], msgpack.packb({"b": 1}))),
        msgpack.packb((["a"], msgpack.packb(msgpack.ExtType(3, b"")))),
        msgpack.packb((["a"], msgpack.packb(msgpack.ExtType(1, msgpack.packb(([2], "object", b"12")))))),
        msgpack.packb((["a"], msgpack.packb(msgpack.ExtType(1, msgpack.packb(([2], "float32", b"12")))))),
        msgpack.packb((["a"], flax_bytes(torch.ones(2), 64) + b"rest")),
        b"",
    ],
    ids=["pickle", "zip", "json", "tree", "number", "list", "subtree", "scalar", "object", "short", "rest", "empty"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "params"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        scan_stream(path)


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = write_stream(tmp_path / "params", {"a": torch.ones(2)})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="the key a comes a second time"):
        scan_stream(path)


def test_a_killed_conversion_goes_on_and_another_source_starts_anew(tmp_path):
    folder = convert(tmp_path, parameters())
    files = sorted(folder.glob("*.safetensors"))
    whole = {file.name: file.read_bytes() for file in files}
    kept, lost = files[1], files[2]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    files[3].write_bytes(whole[files[3].name][:-8])
    convert(tmp_path, parameters())
    assert {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} == whole
    assert kept.stat().st_mtime_ns == before, "a finished file was written again"
    convert(tmp_path, parameters(seed=1))
    assert all(file.read_bytes() != whole[file.name] for file in folder.glob("*.safetensors"))
    assert not list(folder.glob(".*.tmp"))


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    folder = convert(tmp_path, parameters())
    name = read_json(folder / "model.safetensors.index.json")["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / name)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        LatentLlama.from_folder(folder)
    with pytest.raises(ValueError, match="expected a folder written by `lapa import_lapa`"):
        LatentLlama.from_folder(tmp_path)


def test_stage_rewrites_the_image_tokenizer_too(tmp_path):
    source = write_stream(tmp_path / "params", parameters())
    tree = {"encoder": {"Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3)}}}
    (tmp_path / "vqgan").write_bytes(pickle.dumps(tree))
    config = ImportLapaConfig(
        path=str(source), output_dir=str(tmp_path / "out"), vqgan=str(tmp_path / "vqgan"), num_heads=HEADS
    )
    results = run_stage("import_lapa", config)
    assert results["num_parameters"] == sum(tensor.numel() for tensor in parameters().values())
    tensors = load_file(Path(config.output_dir) / "vqgan.safetensors")
    assert set(tensors) == {"encoder/Conv_0/kernel", "encoder/Conv_0/bias"}
    assert tensors["encoder/Conv_0/kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_read(tmp_path, protocol):
    tree = {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f4"),
        "list": [np.ones(2, np.float16), 1, "text", None, True],
        "scalar": np.float32(2.5),
    }
    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    read = read_numpy_pickle(path)
    for name in ("kernel", "fortran", "big endian"):
        assert read[name].dtype == tree[name].dtype.newbyteorder("=")
        assert np.array_equal(read[name], tree[name])
    assert read["scalar"] == np.float32(2.5)
    assert read["list"][1:] == [1, "text", None, True]
    assert set(flatten_arrays({"a": [read["kernel"]]})) == {"a/0"}


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    victim = tmp_path / "victim"
    calls = [(os.mkdir, str(victim)), (eval, f"__import__('os').mkdir({str(victim)!r})"), (np.load, str(victim))]
    for call in calls:
        path = tmp_path / "vqgan"
        path.write_bytes(pickle.dumps({"kernel": np.ones(2), "other": Malicious(*call)}, protocol=protocol))
        with pytest.raises(ValueError, match="refused"):
            read_numpy_pickle(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(os.mkdir, str(victim))))
    assert victim.exists(), "the attack has to work on a plain unpickler"


@pytest.mark.parametrize(
    "value",
    [np.array([{}, []], dtype=object), np.zeros(2, dtype=[("a", "f4")]), np.array(["text"]), {1, 2}, np.ma.ones(3)],
    ids=["objects", "fields", "strings", "set", "subclass"],
)
def test_pickles_of_anything_but_plain_numbers_are_refused(tmp_path, value):
    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps({"kernel": value}))
    with pytest.raises(ValueError, match=str(path)):
        read_numpy_pickle(path)


def test_files_that_are_no_pickle_are_refused(tmp_path):
    path = tmp_path / "vqgan"
    for content in (b"", b"not a pickle", pickle.dumps([np.ones(100)])[:-40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="was not read"):
            read_numpy_pickle(path)
