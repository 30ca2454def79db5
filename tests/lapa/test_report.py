import base64
import csv
import json
import re

import numpy as np
import pytest

from lapa.report import run
from lapa.schema import ReportConfig


def write_run(folder, rates, num_seeds=3, num_episodes=100):
    for arm, rate in rates.items():
        for seed in range(num_seeds):
            outcomes = np.random.default_rng([seed, len(arm)]).random(num_episodes) < rate
            target = folder / "evaluate" / f"{arm}-seed{seed}"
            target.mkdir(parents=True)
            rows = [{"family": "reach", "seed": 7 + i, "success": bool(s)} for i, s in enumerate(outcomes)]
            (target / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (target / "videos").mkdir()
            (target / "videos" / "reach_0.mp4").write_bytes(b"not really a video")
    log = folder / "pretrain" / "lapa-seed0"
    log.mkdir(parents=True)
    (log / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')


def test_page_is_self_contained_and_shows_the_rates_it_read(tmp_path):
    write_run(tmp_path, {"scratch": 0.1, "lapa": 0.6, "action_vla": 0.8})
    results = run(ReportConfig(run_dir=str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "no reference outside the page"
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert f"{100 * results['success_lapa']:.0f}%" in page
    assert page.count("<video") == 9
    assert 0.4 < results["gap_closure"] < 1.0


def test_the_grounding_is_shown_where_the_videos_are(tmp_path):
    grounding = tmp_path / "videos" / "grounding"
    (grounding / "images").mkdir(parents=True)
    (grounding / "images" / "changes.png").write_bytes(b"\x89PNG the picture")
    numbers = {"held_out_cross_entropy": 0.125, "held_out_with_other_instructions": 0.25, "held_out_least": 0.0625}
    (grounding / "metrics.json").write_text(json.dumps(numbers))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"video_dir": str(tmp_path / "videos")}))
    run(ReportConfig(run_dir=str(tmp_path / "run")))
    page = (tmp_path / "run" / "report.html").read_text()
    assert base64.b64encode(b"\x89PNG the picture").decode() in page
    assert "0.125" in page and "0.25" in page and "0.0625" in page and "test_data" not in page
    (grounding / "images" / "test_changes.png").write_bytes(b"\x89PNG another")
    tested = {"test_cross_entropy": 5.5, "test_with_other_instructions": 5.25, "test_least": 0.03125}
    (grounding / "metrics.json").write_text(json.dumps(numbers | tested))
    run(ReportConfig(run_dir=str(tmp_path / "run")))
    page = (tmp_path / "run" / "report.html").read_text()
    assert base64.b64encode(b"\x89PNG another").decode() in page and "0.03125" in page


def test_the_keypoints_of_the_first_seed_of_every_arm_are_shown(tmp_path):
    for place in ("videos/pretrain/lapa-seed0", "videos/pretrain/lapa-seed1", "run/pretrain/vpt-seed2"):
        (tmp_path / place / "images").mkdir(parents=True)
        (tmp_path / place / "images" / "keypoints.png").write_bytes(b"\x89PNG " + place.encode())
    (tmp_path / "run" / "run.json").write_text(json.dumps({"video_dir": str(tmp_path / "videos")}))
    run(ReportConfig(run_dir=str(tmp_path / "run")))
    page = (tmp_path / "run" / "report.html").read_text()
    shown = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert shown == [b"\x89PNG videos/pretrain/lapa-seed0", b"\x89PNG run/pretrain/vpt-seed2"]


def test_tables_say_in_every_form_what_the_page_shows(tmp_path):
    write_run(tmp_path, {"scratch": 0.1, "vpt": 0.4, "lapa": 0.6, "action_vla": 0.8})
    results = run(ReportConfig(run_dir=str(tmp_path)))
    folder = tmp_path / "tables"
    assert (folder / "success.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "success.json").read_text())
    assert {row["arm"]: row["success"] for row in rows}["lapa"] == pytest.approx(results["success_lapa"], abs=1e-4)
    with (folder / "success.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["success"]) for row in read] == [row["success"] for row in rows]
    comparisons = (folder / "comparisons.md").read_text()
    assert "LAPA − VPT" in comparisons and "gap closure: (VPT − Scratch) / (ActionVLA − Scratch)" in comparisons
    before = {path: path.read_bytes() for path in [*folder.iterdir(), tmp_path / "report.html"]}
    run(ReportConfig(run_dir=str(tmp_path)))
    assert before == {path: path.read_bytes() for path in before}, "the same run gives the same files"


def test_a_sweep_becomes_a_curve(tmp_path):
    for point, rate in {"100": 0.2, "400": 0.5, "1600": 0.7}.items():
        write_run(tmp_path / "points" / point, {"scratch": 0.1, "lapa": rate})
    run(ReportConfig(run_dir=str(tmp_path), curve="videos"))
    rows = json.loads((tmp_path / "tables" / "curve.json").read_text())
    lapa = [(row["point"], row["success"]) for row in rows if row["arm"] == "lapa"]
    assert [point for point, _ in lapa] == [100, 400, 1600]
    assert lapa[0][1] < lapa[1][1] < lapa[2][1]
    assert (tmp_path / "tables" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Success by videos" in (tmp_path / "report.html").read_text()


def test_only_episodes_that_every_arm_has_are_compared(tmp_path):
    write_run(tmp_path, {"scratch": 0.1, "lapa": 0.6})
    shorter = tmp_path / "evaluate" / "lapa-seed1" / "episodes.jsonl"
    shorter.write_text("\n".join(shorter.read_text().splitlines()[:40]) + "\n")
    run(ReportConfig(run_dir=str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    assert "only the 40 episodes" in page and "3 x 40" in page


def test_an_empty_run_directory_gives_a_page_and_a_missing_one_an_error(tmp_path):
    run(ReportConfig(run_dir=str(tmp_path)))
    assert "Nothing has been run" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="no run directory"):
        run(ReportConfig(run_dir=str(tmp_path / "absent")))
