import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import load_weights, read_json, write_json, write_tensors
from lapa.data import read_store
from lapa.latent_vla import ground, pretrain
from lapa.latent_vla.grounding import GroundingModel, leaves, start_grounded, targets
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
SIZE = 32
NUM_CLIPS = 120
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
BACKBONE = DenseBackbone(width=32, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def two_squares(tmp_path_factory):
    """Clips of three frames: a red and a blue square, and a black body that moves. The named square is gone at last."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    frames, instructions = [], []
    for _ in range(NUM_CLIPS):
        places = rng.permutation([(0, 0), (0, 24), (24, 0), (24, 24)])[:2]
        gone = str(rng.choice(list(COLOURS)))
        body_row, body_column = 4 * rng.integers(3, 5), 4 * rng.integers(0, 6)
        for step in range(3):
            frame = np.full((SIZE, SIZE, 3), 128, np.uint8)
            for (name, colour), (row, column) in zip(COLOURS.items(), places, strict=True):
                if not (step == 2 and name == gone):
                    frame[row : row + 8, column : column + 8] = colour
            frame[body_row : body_row + 4, body_column + 4 * step : body_column + 4 * step + 4] = 0
            frames.append(frame)
        instructions.append(f"take the {gone} square away")
    np.stack(frames).tofile(folder / "frames.u8")
    index = {"episode_offsets": torch.arange(NUM_CLIPS + 1) * 3, "action": torch.rand(3 * NUM_CLIPS, 2)}
    write_tensors(folder / "index.safetensors", index)
    meta = {"version": 1, "num_frames": 3 * NUM_CLIPS, "image_size": SIZE, "fps": 10.0, "skipped": []}
    write_json(folder / "store.json", meta | {"instructions": instructions, "sources": ["toy"] * NUM_CLIPS})
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
        next_s=0.1,
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
    assert metrics["num_train_frames"] == 2 * 288
    assert metrics["test_least"] == 0 < metrics["test_cross_entropy"] != metrics["held_out_cross_entropy"]
    assert (tmp_path / "both" / "images" / "test_changes.png").stat().st_size > 1000


def test_what_leaves_is_told_by_cell_and_nothing_leaves_where_a_thing_arrives():
    present, last = torch.full((2, 1, 3, 12, 12), 0.5)
    present[:, :, :4, :4] = 0.9  # is gone at last
    present[:, :, 4:8, 4:8] = 0.53  # a little of it is
    last[:, :, 8:, 8:] = 0.9  # arrives
    expected = torch.zeros(1, 9)
    expected[0, 0], expected[0, 4] = 1.0, 0.3
    torch.testing.assert_close(leaves(present, last, full_change=0.1), expected)


def test_what_moves_now_is_learned_only_where_something_else_waits():
    still, body, both = torch.full((3, 1, 3, 16, 16), 0.5)
    body[:, :, :4, :4] = 0.0
    both[:, :, :4, :4], both[:, :, 12:, 12:] = 0.0, 0.9
    object_waits = torch.cat([both, still, both - body + 0.5], dim=1)  # the body leaves next, the object in the end
    all_leaves_now = torch.cat([both, still, still], dim=1)
    left, counts = targets(torch.cat([object_waits, all_leaves_now]), full_change=0.1)
    assert counts.tolist() == [[1, 1], [1, 0]]
    assert left[:, 0].nonzero().tolist() == [[0, 0], [0, 15], [1, 0], [1, 15]]
    assert left[0, 1].nonzero().tolist() == [[0]]


def test_a_trunk_begins_with_the_stem_and_with_keypoints_on_the_object(grounded, two_squares):
    folder = grounded[0]
    torch.manual_seed(1)
    trunk = build_trunk(BACKBONE, WordText(), "keypoints", SIZE)
    start_grounded(trunk, folder, WordText())
    model = GroundingModel(WordText(), 32)
    load_weights(folder, model)
    store = read_store(two_squares)
    first = store.episode_offsets[:-1]
    images = torch.from_numpy(store.frames[first]).permute(0, 3, 1, 2) / 255
    ids = trunk.encode_text(store.instructions)
    with torch.no_grad():
        summary = trunk.text_encoder(ids).summary_BD
        features = trunk.image_tokenizer.stem(images, summary)
        torch.testing.assert_close(features, model.stem(images, model.text_encoder(ids).summary_BD))
        places = trunk.image_tokenizer.places(images, summary)
        maps_BKP, first_BP = trunk.image_tokenizer.maps(features, summary), model(images, ids)[:, 0]

    def alike(k: int) -> float:
        return float(torch.corrcoef(torch.stack([maps_BKP[:, k].flatten(), first_BP.flatten()]))[0, 1])

    assert np.mean([alike(k) for k in range(4)]) > 0.7
    assert np.mean([abs(alike(k)) for k in range(8, 16)]) < 0.7
    named = torch.tensor([list(COLOURS).index(text.split()[2]) for text in store.instructions])
    colours = torch.tensor(list(COLOURS.values()))[named][:, :, None, None] / 255
    is_named = ((images - colours).abs().amax(1) < 0.01).float()
    grid = torch.linspace(-1, 1, 2 * SIZE + 1)[1::2]
    centres = torch.stack([(is_named.sum(rows) * grid).sum(1) for rows in (1, 2)], 1) / is_named.sum((1, 2))[:, None]
    assert (places[:, 4:8] - centres[:, None]).norm(dim=-1).median() < 0.25


def test_a_grounding_with_other_maps_is_refused(grounded, tmp_path):
    shutil.copytree(grounded[0], tmp_path / "old")
    config = read_json(tmp_path / "old" / "config.json")
    del config["maps"]
    write_json(tmp_path / "old" / "config.json", config)
    with pytest.raises(ValueError, match="an earlier version made it"):
        start_grounded(build_trunk(BACKBONE, WordText(), "keypoints", SIZE), str(tmp_path / "old"), WordText())


@pytest.mark.parametrize(
    ("trunk", "text", "message"),
    [
        ((DenseBackbone(width=64, num_layers=1), WordText(), "keypoints", SIZE), WordText(), "width 32 instead of 64"),
        ((BACKBONE, WordText(), "keypoints", 64), WordText(), "image_size 32 instead of 64"),
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
