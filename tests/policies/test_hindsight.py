import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import demos, replay
from lapa.checkpoint import read_json, write_json, write_tensors
from lapa.data import read_store
from lapa.schema import (
    DemosConfig,
    DenseBackbone,
    FinetuneConfig,
    HindsightConfig,
    ReplayConfig,
    Runtime,
    Training,
    TrajectoryEdit,
    WordText,
)
from policies import hindsight
from policies.hindsight_arms import slot_accuracy
from policies.hindsight_edit import candidates, cut_ways_back, path_of, smooth, steps_along, typical_step
from policies.hindsight_models import (
    displacements_to_end,
    distractors,
    fit_sharpness,
    log_posterior,
    sample_nucleus,
    scores_of,
)

BACKBONE = DenseBackbone(width=32, num_layers=1, num_heads=2)
LENGTH = 5


def write_store(folder: Path, num_episodes: int, size: int = 16, dawdles: bool = False) -> Path:
    """A square starts in the middle and goes left or right, as the instruction alone tells; or first the other way."""
    generator = np.random.default_rng(num_episodes)
    frames, actions, instructions = [], [], []
    for episode in range(num_episodes):
        direction = 1 if episode % 2 else -1
        steps = ([-direction, direction] if dawdles else []) + [direction] * LENGTH
        column, row = 6, int(generator.integers(1, size - 3))
        for step in steps:
            frame = np.full((size, size, 3), 60, np.uint8)
            frame[row : row + 3, column : column + 3] = 230
            frames.append(frame)
            actions.append((0.02 * step, 0.0))
            column += step
        instructions.append("" if dawdles else f"go {'right' if direction > 0 else 'left'}")
    lengths = [LENGTH + 2 * dawdles] * num_episodes
    folder.mkdir(parents=True)
    np.stack(frames).tofile(folder / "frames.u8")
    index = {
        "episode_offsets": torch.tensor([0, *np.cumsum(lengths)]),
        "action": torch.tensor(actions, dtype=torch.float32),
    }
    write_tensors(folder / "index.safetensors", index)
    meta = {"version": 1, "num_frames": len(frames), "image_size": size, "fps": 10.0, "skipped": []}
    write_json(folder / "store.json", meta | {"instructions": instructions, "sources": ["toy"] * num_episodes})
    return folder


def config(output_dir: Path, labelled: Path, data: Path, num_steps: int, **changes) -> HindsightConfig:
    values = {
        "output_dir": str(output_dir),
        "labelled": str(labelled),
        "data": str(data),
        "keep_share": 0.5,
        "slots": {"way": ["left", "right"]},
        "finetune": FinetuneConfig(
            output_dir="",
            data="",
            backbone=BACKBONE,
            text=WordText(),
            image_size=16,
            random_shift_pixels=1,
            chunk_size=3,
            training=Training(
                num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False
            ),
        ),
        "runtime": Runtime(device="cpu", dtype="float32", num_threads=1),
    }
    return HindsightConfig(**(values | changes))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A finished run on play that goes the wrong way first."""
    folder = tmp_path_factory.mktemp("hindsight")
    labelled, play = write_store(folder / "labelled", 20), write_store(folder / "play", 16, dawdles=True)
    truth = folder / "truth.jsonl"
    truth.write_text("".join(json.dumps({"instruction": f"go {way}"}) + "\n" for way in ["left", "right"] * 8))
    arms = ["rewrite", "both", "distil"]
    cfg = config(folder / "out", labelled, play, num_steps=120, truth=str(truth), arms=arms)
    return cfg, hindsight.run(cfg)


def test_what_was_done_is_named_although_it_began_the_other_way(toy):
    _, results = toy
    assert results["label_accuracy_rewrite"] == results["label_accuracy_both"] == 1.0
    assert results["num_play"] == 16 and results["num_episodes"] == 8


def test_right_labels_explain_the_actions_better_than_wrong_ones(toy):
    with (Path(toy[0].output_dir) / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert np.mean([float(row["margin"]) for row in rows]) > 0
    assert sum(int(row["best"]) for row in rows) == 8
    kept = [float(row["margin"]) for row in rows if row["best"] == "1"]
    assert min(kept) >= max(float(row["margin"]) for row in rows if row["best"] == "0")


def test_the_way_back_is_cut_from_what_is_proposed(toy):
    proposals = [json.loads(line) for line in (Path(toy[0].output_dir) / "proposals/both.jsonl").open()]
    for proposal in proposals:
        direction = 1 if proposal["episode"] % 2 else -1
        boldest = np.array(proposal["candidates"][0])
        assert len(boldest) == LENGTH
        np.testing.assert_allclose(boldest, [[0.02 * direction, 0.0]] * LENGTH, atol=1e-6)
    distil = [json.loads(line) for line in (Path(toy[0].output_dir) / "proposals/distil.jsonl").open()]
    assert len(distil) == 8 and all("candidates" not in row for row in distil)


def test_a_second_run_trains_nothing_and_ends_the_same(toy, monkeypatch):
    cfg, results = toy
    monkeypatch.setattr(hindsight.finetune, "run", lambda cfg: pytest.fail("the models are there already"))
    assert hindsight.run(cfg) == results


def test_labels_do_not_depend_on_the_truth(toy, tmp_path):
    cfg, _ = toy
    before = (Path(cfg.output_dir) / "proposals/both.jsonl").read_bytes()
    results = hindsight.run(replace(cfg, truth=None))
    assert (Path(cfg.output_dir) / "proposals/both.jsonl").read_bytes() == before
    assert not any(name.startswith("label_accuracy") for name in results)


def test_play_in_simulation_becomes_data_sets_of_equal_size(tmp_path):
    demo = DemosConfig(output_dir=str(tmp_path / "labelled"), num_episodes=5, image_size=16, num_workers=1, video=False)
    demos.run(demo)
    demos.run(replace(demo, output_dir=str(tmp_path / "play"), num_episodes=8, seed=90, play=True))
    cfg = config(
        tmp_path / "out",
        tmp_path / "labelled/demos",
        tmp_path / "play/demos",
        num_steps=2,
        truth=str(tmp_path / "play/episodes.jsonl"),
        holdout_share=0.4,
        arms=["unfiltered", "truth", "rewrite"],
        slots={"colour": ["red", "blue", "green", "yellow"]},
        edit=TrajectoryEdit(smooth_m=[0.05]),
        cache_dir=str(tmp_path / "cache"),
    )
    assert hindsight.run(cfg)["num_episodes"] == 4
    truths = [json.loads(line)["instruction"] for line in (tmp_path / "play/episodes.jsonl").open()]
    with (tmp_path / "out/labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["random_pick"] == "1"]
    replay.run(
        ReplayConfig(
            output_dir=str(tmp_path / "out/arms/rewrite"),
            data=str(tmp_path / "play"),
            proposals=str(tmp_path / "out/proposals/rewrite.jsonl"),
        )
    )
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    def tasks(folder: Path) -> list[str]:
        dataset = LeRobotDataset(folder.name, root=folder, video_backend="pyav")
        return [dataset.meta.episodes[i]["tasks"][0] for i in range(dataset.num_episodes)]

    assert tasks(tmp_path / "out/arms/truth/demos") == [truths[int(row["episode"])] for row in rows]
    assert tasks(tmp_path / "out/arms/unfiltered/demos") == [row["instruction"] for row in rows]
    assert tasks(tmp_path / "out/arms/rewrite/demos") == [row["instruction"] for row in rows]
    accuracy = read_json(tmp_path / "out/results.json")["label_accuracy"]
    assert accuracy["truth"]["all_slots"] == 1.0


def test_displacement_to_the_end_is_what_is_left_to_do(tmp_path):
    store = read_store(write_store(tmp_path / "store", 2))
    to_end = displacements_to_end(store)
    np.testing.assert_allclose(to_end[:, 0], 0.02 * np.array([-5, -4, -3, -2, -1, 5, 4, 3, 2, 1]), atol=1e-6)


def test_sharpness_is_high_where_losses_tell_and_low_where_they_do_not():
    generator = np.random.default_rng(0)
    true_E = generator.integers(4, size=200)
    telling = 1.0 - np.eye(4)[true_E] + generator.normal(0, 0.05, (200, 4))
    prior = np.log(np.full(4, 0.25))
    assert fit_sharpness(telling, prior, true_E) > 3
    assert fit_sharpness(generator.normal(size=(200, 4)), prior, true_E) < 0.3
    p = np.exp(log_posterior(telling, prior, 5.0))
    np.testing.assert_allclose(p.sum(1), 1.0)


def test_a_nucleus_leaves_out_the_unlikely_and_keeps_the_shares_of_the_rest():
    log_p = np.log(np.array([0.05, 0.6, 0.35]))
    generator = np.random.default_rng(0)
    drawn = np.bincount([sample_nucleus(log_p, 1.0, 0.9, generator) for _ in range(2000)], minlength=3)
    assert drawn[0] == 0
    assert abs(drawn[1] / 2000 - 0.6 / 0.95) < 0.05


def test_distractors_are_different_instructions():
    others = ["a", "a", "a", "b", "c", "c"]
    for seed in range(20):
        drawn = distractors("a", others, 4, np.random.default_rng(seed))
        assert sorted(drawn) == ["b", "c"]


def test_scores_are_quintiles_of_the_calibration():
    calibration = np.arange(101.0)
    np.testing.assert_array_equal(
        scores_of(np.array([-5.0, 10.0, 30.0, 50.0, 70.0, 90.0]), calibration), [1, 1, 2, 3, 4, 5]
    )


def test_loops_are_cut_and_the_ends_stay():
    path = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [2, 0.1], [3, 0]], float)
    cut = cut_ways_back(path, revisit_m=0.2)
    np.testing.assert_array_equal(cut, [[0, 0], [1, 0], [2, 0], [2, 0.1], [3, 0]])


def test_smoothing_stays_within_its_distance():
    generator = np.random.default_rng(0)
    for _ in range(10):
        path = np.cumsum(generator.normal(0, 0.02, (30, 2)), axis=0)
        corners = path[smooth(path, 0.03)]
        np.testing.assert_array_equal(corners[[0, -1]], path[[0, -1]])
        for point in path:
            starts, spans = corners[:-1], np.diff(corners, axis=0)
            along = np.clip(((point - starts) * spans).sum(1) / (spans**2).sum(1), 0, 1)
            assert np.linalg.norm(point - starts - along[:, None] * spans, axis=1).min() <= 0.03 + 1e-9


def test_edits_end_where_the_episode_ended_in_fewer_steps_of_usual_length():
    generator = np.random.default_rng(1)
    forth = np.array([[0.03, 0.0]] * 6)
    actions = np.concatenate([forth, np.zeros((4, 2)), -forth[:3], forth[:3], [[0.0, 0.03]] * 4])
    actions = (actions + generator.normal(0, 0.001, actions.shape)).astype(np.float32)
    edits = candidates(actions, [0.15, 0.01], idle_m=0.01, revisit_m=0.015, step_m=0.03)
    assert [len(edit) for edit in edits] == sorted(len(edit) for edit in edits)
    assert len(edits[0]) < 10 < len(edits[-1]) < len(actions)
    for edit in edits:
        np.testing.assert_allclose(edit.sum(0), actions.sum(0), atol=1e-5)
        assert np.linalg.norm(edit, axis=1).max() <= 0.03 + 1e-6


def test_an_episode_that_only_idles_has_no_edit():
    assert candidates(np.zeros((5, 2), np.float32), [0.1], 0.01, 0.02, 0.03) == []
    assert len(path_of(np.zeros((5, 2)), 0.01)) == 1
    assert len(steps_along(np.zeros((1, 2)), 0.03)) == 0
    with pytest.raises(ValueError, match="nothing moves"):
        typical_step(np.zeros((5, 2)), 0.01)


def test_slots_are_right_or_wrong_one_by_one():
    slots = {"colour": ["red", "blue"], "object": ["cube", "star"]}
    found = slot_accuracy(
        ["go to the red cube", "touch the red star"], ["reach the red cube", "go to the blue star"], slots
    )
    assert found == {"colour": 0.5, "object": 1.0, "all_slots": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["filtre"]}, "expected some of"),
        ({"keep_share": 0.0}, "keep_share is 0.0"),
        ({"holdout_share": 0.01}, "to calibrate on"),
    ],
)
def test_wrong_options_are_named(toy, tmp_path, changes, message):
    cfg, _ = toy
    with pytest.raises(ValueError, match=message):
        hindsight.run(replace(cfg, output_dir=str(tmp_path / "out"), **changes))
