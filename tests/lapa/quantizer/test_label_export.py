"""`lapa label export=lerobot`: LeRobot reads the codes that labels.safetensors holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file

from envs import demos
from lapa.quantizer import label, train_quantizer
from lapa.schema import (
    ContinuousCodebook,
    ConvolutionalQuantizer,
    DemosConfig,
    FSQCodebook,
    LabelConfig,
    PairData,
    Runtime,
    Training,
    TrainQuantizerConfig,
)

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demos")
    demos.run(DemosConfig(output_dir=str(folder), num_episodes=4, image_size=32, num_workers=1, video=False))
    return folder / "demos"


def labels_config(folder: Path, data: Path, codebook) -> LabelConfig:
    train_quantizer.run(
        TrainQuantizerConfig(
            output_dir=str(folder / "quantizer"),
            data=PairData(path=str(data), frame_gap_s=0.2, holdout_fraction=0.25),
            model=ConvolutionalQuantizer(image_size=32, width=8, latent_dim=8, num_keypoints=8),
            codebook=codebook,
            training=Training(num_steps=2, batch_size=8, tensorboard=False),
            runtime=CPU,
        )
    )
    return LabelConfig(
        quantizer=str(folder / "quantizer"),
        data=str(data),
        output_dir=str(folder / "labels"),
        export="lerobot",
        runtime=CPU,
    )


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("codebook", [FSQCodebook(code_length=2, codebook_size=4), ContinuousCodebook()])
def test_lerobot_reads_the_labels(data, tmp_path, codebook):
    before = files_of(data)
    config = labels_config(tmp_path, data, codebook)
    label.run(config)
    assert files_of(data) == before, "the source was written to"
    labels = load_file(tmp_path / "labels" / "labels.safetensors")
    source = LeRobotDataset("source", root=data, video_backend="pyav")
    made = LeRobotDataset("made", root=tmp_path / "labels" / "lerobot", video_backend="pyav")
    assert len(made) == len(source) == len(labels["is_valid"])
    read = made.hf_dataset.with_format("torch")
    codes = torch.as_tensor(np.stack([np.atleast_1d(row) for row in read["latent_action"]]))
    assert codes.dtype == labels["latent_action"].dtype
    assert torch.equal(codes, labels["latent_action"])
    assert torch.equal(torch.as_tensor(read["latent_action_is_valid"][:]), labels["is_valid"])
    valid = labels["latent_action"][labels["is_valid"]].double().numpy()
    np.testing.assert_allclose(made.meta.stats["latent_action"]["mean"], valid.mean(0), atol=1e-6)
    np.testing.assert_allclose(made.meta.stats["latent_action"]["max"], valid.max(0), atol=1e-6)
    np.testing.assert_array_equal(made.meta.stats["action"]["mean"], source.meta.stats["action"]["mean"])
    row = len(made) - 5
    for name in ("action", "observation.state", "observation.images.top"):
        assert torch.equal(made[row][name], source[row][name])
    assert made[row]["task"] == source[row]["task"]


def test_an_export_that_cannot_be_is_refused(data, tmp_path):
    config = labels_config(tmp_path, data, FSQCodebook(code_length=2, codebook_size=4))
    with pytest.raises(ValueError, match="expected none or lerobot"):
        label.run(replace(config, export="parquet"))
    label.run(config)
    again = replace(config, data=str(tmp_path / "labels" / "lerobot"), output_dir=str(tmp_path / "twice"))
    with pytest.raises(ValueError, match="already"):
        label.run(again)
