"""What every codebook writes, `lapa label` stores and `lapa pretrain` learns."""

import numpy as np
import pytest
import torch

from lapa.checkpoint import read_json, save_model, write_json, write_tensors
from lapa.data import read_store
from lapa.latent_vla import pretrain
from lapa.quantizer import label
from lapa.quantizer.base import build_quantizer
from lapa.quantizer.label import load_labels
from lapa.schema import (
    ContinuousCodebook,
    ConvolutionalQuantizer,
    FutureFrame,
    LabelConfig,
    LFQCodebook,
    NSVQCodebook,
    ResidualCodebook,
    Runtime,
    VQCodebook,
)
from tests.lapa.latent_vla.conftest import GAP
from tests.lapa.latent_vla.test_pretrain import config as pretrain_config

CODEBOOKS = [
    NSVQCodebook(code_length=2, codebook_size=4),
    VQCodebook(code_length=2, codebook_size=4),
    ResidualCodebook(code_length=2, codebook_size=4, num_levels=2),
    LFQCodebook(code_length=2, codebook_size=4),
    ContinuousCodebook(code_length=2),
]


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_labels_of_every_codebook_can_be_pretrained_on(codebook, toy_store, tmp_path):
    torch.manual_seed(0)
    store = read_store(toy_store)
    quantizer = build_quantizer(ConvolutionalQuantizer(image_size=16, width=8, latent_dim=4, num_keypoints=4), codebook)
    frames = torch.rand(32, 2, 3, 16, 16)
    quantizer.train().quantise(frames)
    folder = tmp_path / "quantizer"
    facts = {"image_size": 16, "frame_gap_frames": GAP, "frame_gap_s": GAP / store.fps, "fps": store.fps}
    save_model(folder, quantizer.state_dict(), quantizer.description() | facts)
    write_json(folder / "metrics.json", {"gate": {"passed": True, "reasons": []}})
    runtime = Runtime(device="cpu", dtype="float32", num_threads=1)
    label.run(
        LabelConfig(quantizer=str(folder), data=str(toy_store), output_dir=str(tmp_path / "labels"), runtime=runtime)
    )

    labels = load_labels(tmp_path / "labels", store)
    num_codes = {"residual": 4, "continuous": 8}.get(codebook.name, 2)
    assert labels.num_codes == num_codes and labels.latent_action.shape == (store.num_frames, num_codes)
    assert labels.is_discrete == (codebook.name != "continuous")
    assert labels.latent_action.dtype == (np.int64 if labels.is_discrete else np.float32)
    meta = read_json(tmp_path / "labels" / "labels.json")
    assert meta["is_discrete"] == labels.is_discrete and meta["codebook_size"] == labels.codebook_size

    numbers = pretrain.run(pretrain_config(tmp_path, toy_store, tmp_path / "labels", num_steps=4))
    assert all(np.isfinite(value) for value in numbers.values())
    assert ("token_accuracy" in numbers) == labels.is_discrete and ("latent_r2" in numbers) != labels.is_discrete


def write_numbers(folder, store_folder) -> None:
    """Continuous labels: the direction of motion, far from zero and small, and a dimension that is not used."""
    store = read_store(store_folder)
    is_valid = store.steps_left() >= GAP
    assert store.actions is not None
    direction = np.sign(store.actions[:, 0])
    latent = np.stack([5 + 0.2 * direction, 1e-6 * np.random.default_rng(0).normal(size=store.num_frames)], 1)
    folder.mkdir()
    tensors = {"latent_action": torch.from_numpy(latent).float(), "is_valid": torch.from_numpy(is_valid)}
    write_tensors(folder / "labels.safetensors", tensors)
    facts: dict = {"is_discrete": False, "num_codes": 2, "code_length": 1, "codebook_size": 0}
    facts |= {"frame_gap_frames": GAP, "frame_gap_s": GAP / store.fps, "num_frames": store.num_frames}
    gate = {"passed": True, "reasons": []}
    write_json(folder / "labels.json", facts | {"quantizer": {}, "gate": gate, "store_fingerprint": store.fingerprint})


def test_continuous_pretraining_learns_what_the_instruction_decides(tmp_path, toy_store):
    write_numbers(tmp_path / "labels", toy_store)
    numbers = pretrain.run(pretrain_config(tmp_path, toy_store, tmp_path / "labels", num_steps=100))
    assert numbers["latent_r2"] > 0.9
    assert numbers["latent_mse"] < 0.1 * numbers["marginal_latent_mse"]
    assert numbers["latent_l1"] < numbers["marginal_latent_l1"]
    saved = read_json(tmp_path / "pretrained" / "config.json")
    assert saved["is_discrete"] is False and saved["num_codes"] == 2
    assert saved["latent_mean"][0] == pytest.approx(5, abs=0.05) and saved["latent_std"][0] == pytest.approx(
        0.2, abs=0.02
    )
    assert saved["latent_std"][1] > 0.01  # what is not used is not blown up


def test_continuous_labels_of_a_quantizer_that_failed_its_gate_are_refused(tmp_path, toy_store):
    write_numbers(tmp_path / "labels", toy_store)
    meta = read_json(tmp_path / "labels" / "labels.json")
    write_json(tmp_path / "labels" / "labels.json", meta | {"gate": {"passed": False, "reasons": ["silent"]}})
    with pytest.raises(ValueError, match="failed its gate"):
        pretrain.run(pretrain_config(tmp_path, toy_store, tmp_path / "labels"))


def test_chunks_and_future_frames_of_continuous_labels_are_refused(tmp_path, toy_store):
    write_numbers(tmp_path / "labels", toy_store)
    with pytest.raises(ValueError, match="latent_chunk_size is 2, and the labels are numbers"):
        pretrain.run(pretrain_config(tmp_path, toy_store, tmp_path / "labels", latent_chunk_size=2))
    with pytest.raises(ValueError, match="needs labels that are codes"):
        pretrain.run(pretrain_config(tmp_path, toy_store, tmp_path / "labels", future_frame=FutureFrame(weight=1.0)))
