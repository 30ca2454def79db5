from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import load_weights, read_json, write_json, write_tensors
from lapa.latent_vla import ground, pretrain
from lapa.latent_vla.grounding import GroundingModel, changes, start_grounded
from lapa.latent_vla.model import build_trunk
from lapa.schema import (
    BltText,
    DenseBackbone,
    GroundConfig,
    HuggingFaceText,
    MixturePart,
    PretrainConfig,
    Runtime,
    Training,
    WordText,
)

COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}
SIZE = 16
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
BACKBONE = DenseBackbone(width=32, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def two_squares(tmp_path_factory):
    """Clips of two frames with a red and a blue square; the one that the instruction names is gone in the second."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    frames, instructions = [], []
    for _ in range(120):
        places = rng.permutation([(1, 1), (1, 9), (9, 1), (9, 9)])[:2]
        gone = str(rng.choice(list(COLOURS)))
        for is_last in (False, True):
            frame = np.full((SIZE, SIZE, 3), 128, np.uint8)
            for (name, colour), (row, column) in zip(COLOURS.items(), places, strict=True):
                if not (is_last and name == gone):
                    frame[row : row + 6, column : column + 6] = colour
            frames.append(frame)
        instructions.append(f"take the {gone} square away")
    np.stack(frames).tofile(folder / "frames.u8")
    index = {"episode_offsets": torch.arange(121) * 2, "action": torch.rand(240, 2)}
    write_tensors(folder / "index.safetensors", index)
    meta = {"version": 1, "num_frames": 240, "image_size": SIZE, "fps": 10.0, "skipped": []}
    write_json(folder / "store.json", meta | {"instructions": instructions, "sources": ["toy"] * 120})
    return folder


@pytest.fixture(scope="module")
def grounded(two_squares, tmp_path_factory):
    """The folder of the stage, its options and its numbers."""
    config = GroundConfig(
        output_dir=str(tmp_path_factory.mktemp("grounding") / "it"),
        data=str(two_squares),
        text=WordText(),
        width=32,
        image_size=SIZE,
        holdout_fraction=0.2,
        training=Training(num_steps=150, batch_size=16, learning_rate=1e-2, warmup_steps=10, tensorboard=False),
        runtime=RUNTIME,
    )
    return config.output_dir, config, ground.run(config)


def test_it_learns_which_square_the_instruction_is_about(grounded):
    folder, _, numbers = grounded
    assert numbers["held_out_cross_entropy"] < 0.1
    assert numbers["held_out_with_other_instructions"] > 3 * numbers["held_out_cross_entropy"]
    assert read_json(f"{folder}/metrics.json")["held_out_cross_entropy"] == numbers["held_out_cross_entropy"]


def test_a_mixture_of_one_gives_the_numbers_of_the_plain_run(two_squares, grounded, tmp_path):
    _, config, _ = grounded
    short = replace(config, output_dir=str(tmp_path / "plain"), training=replace(config.training, num_steps=3))
    part = MixturePart(path=str(two_squares))
    mixed = replace(short, output_dir=str(tmp_path / "mixed"), data=None, mixture=[part])
    assert ground.run(mixed) == ground.run(short)
    parts = [part, replace(part, weight=3.0)]
    ground.run(replace(mixed, output_dir=str(tmp_path / "both"), mixture=parts, test_data=str(two_squares)))
    metrics = read_json(tmp_path / "both" / "metrics.json")
    assert metrics["num_train_frames"] == 2 * 192
    assert metrics["test_least"] == 0 < metrics["test_cross_entropy"] != metrics["held_out_cross_entropy"]
    assert (tmp_path / "both" / "images" / "test_changes.png").stat().st_size > 1000


def test_what_changes_is_told_by_cell():
    present, last = torch.zeros(2, 1, 3, 8, 8)
    last[:, :, :4, :4] = 0.3
    last[:, :, 4:, 4:] = 0.05
    torch.testing.assert_close(changes(present, last, full_change=0.1), torch.tensor([[1.0, 0.0, 0.0, 0.5]]))


def test_a_trunk_begins_with_the_stem_and_half_of_the_keypoints_where_changes_are_expected(grounded, two_squares):
    folder = grounded[0]
    torch.manual_seed(1)
    trunk = build_trunk(BACKBONE, WordText(), "keypoints", SIZE)
    start_grounded(trunk, folder, WordText())
    model = GroundingModel(WordText(), 32)
    load_weights(folder, model)
    images, ids = torch.rand(3, 3, SIZE, SIZE), trunk.encode_text(["take the red square away"] * 3)
    with torch.no_grad():
        summary = trunk.text_encoder(ids).summary_BD
        features = trunk.image_tokenizer.stem(images, summary)
        torch.testing.assert_close(features, model.stem(images, model.text_encoder(ids).summary_BD))
        maps_BKP, expected_BP = trunk.image_tokenizer.maps(features, summary), model(images, ids)

    def alike(k: int) -> float:
        return float(torch.corrcoef(torch.stack([maps_BKP[:, k].flatten(), expected_BP.flatten()]))[0, 1])

    assert np.mean([alike(k) for k in range(8)]) > 0.7
    assert np.mean([abs(alike(k)) for k in range(8, 16)]) < 0.7


@pytest.mark.parametrize(
    ("trunk", "text", "message"),
    [
        ((DenseBackbone(width=64, num_layers=1), WordText(), "keypoints", SIZE), WordText(), "width 32 instead of 64"),
        ((BACKBONE, WordText(), "keypoints", 32), WordText(), "image_size 16 instead of 32"),
        ((BACKBONE, WordText(), "grid", SIZE), WordText(), "needs image_tokenizer=keypoints"),
        ((BACKBONE, WordText(), "keypoints", SIZE), WordText(max_words=9), "run `lapa ground` with this model's"),
    ],
)
def test_a_grounding_of_another_model_is_refused(grounded, trunk, text, message):
    with pytest.raises(ValueError, match=message):
        start_grounded(build_trunk(*trunk), grounded[0], text)


def test_pretraining_goes_on_from_it_and_its_text_encoder_is_not_fitted_again(grounded, two_squares, tmp_path):
    text = BltText(max_bytes=40, byte_width=16, num_byte_heads=2, entropy_width=16, entropy_steps=5)
    own = replace(grounded[1], text=text, output_dir=str(tmp_path / "blt"))
    ground.run(replace(own, training=replace(own.training, num_steps=2)))
    options = PretrainConfig(
        output_dir=str(tmp_path / "vla"),
        data=str(two_squares),
        predict="action",
        backbone=BACKBONE,
        text=text,
        image_size=SIZE,
        random_shift_pixels=0,
        holdout_fraction=0.2,
        grounding=own.output_dir,
        chunk_size=1,
        training=Training(num_steps=1, batch_size=4, learning_rate=1e-12, weight_decay=0.0, tensorboard=False),
        runtime=RUNTIME,
    )
    pretrain.run(options)
    before, after = load_file(f"{own.output_dir}/model.safetensors"), load_file(tmp_path / "vla/model.safetensors")
    for name, tensor in before.items():
        if name.startswith("text_encoder."):
            torch.testing.assert_close(after[f"trunk.{name}"], tensor)


def test_a_backbone_of_transformers_needs_no_grounding(grounded):
    with pytest.raises(ValueError, match="leave `lapa ground` out"):
        ground.run(replace(grounded[1], text=HuggingFaceText()))
