import csv
import json
import sys

import numpy as np
import pytest

from lapa import application
from lapa.checkpoint import write_json
from lapa.quantizer import compare_quantizers
from lapa.quantizer.compare_quantizers import half_interval
from lapa.schema import CompareQuantizersConfig


def write_run(path, codebook, seed, probe, status="complete", passed=True, code_length=2):
    path.mkdir(parents=True)
    options = {
        "output_dir": str(path),
        "codebook": {"name": codebook, "code_length": code_length},
        "target": {"name": "pixels"},
        "training": {"seed": seed, "num_steps": 10},
        "runtime": {"device": f"cuda:{seed}"},
    }
    write_json(path / "stage.json", {"stage": "train_quantizer", "status": status, "options": options})
    if status == "complete":
        metrics = {"linear_probe_r2": probe, "linear_probe_r2_low": probe - 0.1, "linear_probe_r2_high": probe + 0.1}
        gate = {"passed": passed, "reasons": [] if passed else ["the codebook collapsed"]}
        write_json(path / "metrics.json", metrics | {"delta_psnr_db": 1.0 + seed, "gate": gate})


@pytest.fixture
def grid(tmp_path):
    for seed, probe in enumerate((0.8, 0.9, 1.0)):
        write_run(tmp_path / "grid" / f"fsq{seed}", "fsq", seed, probe)
        write_run(tmp_path / "grid" / f"nsvq{seed}", "nsvq", seed, probe - 0.5, passed=seed > 0)
    write_run(tmp_path / "grid" / "nsvq3", "nsvq", 3, 0.0, status="running")
    return tmp_path / "grid"


def compare(grid, **changes):
    return compare_quantizers.run(CompareQuantizersConfig(path=str(grid), output_dir=str(grid / "table"), **changes))


def test_runs_are_averaged_over_seeds_and_named_by_what_differs(grid):
    result = compare(grid)
    assert result == {"num_runs": 7, "num_rows": 2, "num_unfinished": 1, "best_linear_probe_r2": "codebook=fsq"}
    rows = {row["quantizer"]: row for row in csv.DictReader((grid / "table" / "table.csv").open())}
    assert set(rows) == {"codebook=fsq", "codebook=nsvq"}
    fsq = rows["codebook=fsq"]
    assert float(fsq["linear_probe_r2"]) == pytest.approx(0.9) and fsq["num_seeds"] == "3"
    # Student's t of 2 degrees of freedom over the seeds, and the episodes' interval that they share.
    half = np.hypot(4.303 * 0.1 / 3**0.5, 0.1)
    assert float(fsq["linear_probe_r2_high"]) == pytest.approx(0.9 + half)
    assert (float(fsq["linear_probe_r2_least"]), float(fsq["linear_probe_r2_greatest"])) == (0.8, 1.0)
    assert (grid / "table" / "scatter.png").stat().st_size > 1000


def test_a_refused_or_unfinished_run_is_shown_as_such(grid):
    compare(grid)
    text = (grid / "table" / "table.md").read_text()
    assert "| codebook=nsvq | 3 | passed 2 of 3, 1 unfinished |" in text
    assert "nsvq0: the codebook collapsed" in text and "nsvq3: not finished" in text


def test_columns_are_chosen_and_those_that_no_run_has_are_named(grid):
    compare(grid, columns=["delta_psnr_db", "mlp_probe_r2"])
    text = (grid / "table" / "table.md").read_text()
    assert "| quantizer | seeds | gate | delta_psnr_db |" in text and "No run has mlp_probe_r2." in text
    with pytest.raises(ValueError, match="linear_probe_r2"):
        compare(grid, columns=["success"])


def test_an_evaluation_has_the_options_of_its_quantizer(grid, tmp_path):
    folder = tmp_path / "evaluations" / "one"
    folder.mkdir(parents=True)
    options = {"quantizer": str(grid / "fsq0"), "data": "elsewhere", "output_dir": str(folder), "seed": 0}
    write_json(folder / "stage.json", {"stage": "evaluate_quantizer", "status": "complete", "options": options})
    write_json(folder / "metrics.json", json.loads((grid / "fsq0" / "metrics.json").read_text()))
    (one,) = compare_quantizers.find_runs(folder)
    assert one.options["codebook.name"] == "fsq" and one.options["evaluation.data"] == "elsewhere"


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run of `lapa train_quantizer`"):
        compare(tmp_path)


def test_interval_of_one_seed_is_that_of_its_episodes():
    assert half_interval(np.array([0.5]), np.array([0.4])) == pytest.approx(0.2)
    assert half_interval(np.array([0.5, 0.5]), np.array([0.4, 0.4])) == pytest.approx(0.2)


def test_a_grid_is_one_command_that_skips_what_is_complete_and_survives_a_failing_job(
    moving_discs, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    command = [
        "--multirun",
        f"data.path={moving_discs}",
        "data.frame_gap_s=0.2",
        "data.holdout_fraction=0.25",
        "model.image_size=32",
        "model.width=8",
        "model.num_keypoints=4",
        "codebook=fsq",
        "codebook.code_length=2",
        "codebook.codebook_size=1,4",
        "training.num_steps=2",
        "training.batch_size=4",
        "training.tensorboard=false",
        "training.seed=0",
        "runtime.num_threads=1",
        "output_dir=grid/${codebook.name}${codebook.codebook_size}-seed${training.seed}",
    ]
    for attempt in range(2):
        with pytest.raises(SystemExit) as stopped:
            application.launch("train_quantizer", command)
        printed = capfd.readouterr()
        assert stopped.value.code == 2
        assert "1 of 2 jobs failed" in printed.err and "codebook.codebook_size=1" in printed.err
        assert ("grid/fsq4-seed0 is complete" in printed.out) == (attempt == 1)
    record = json.loads((tmp_path / "grid" / "fsq4-seed0" / "stage.json").read_text())
    assert record["status"] == "complete" and record["options"]["codebook"]["codebook_size"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["grid"], "Hydra leaves nothing of its own"
