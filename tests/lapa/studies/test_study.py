import json
import sys
import types

import numpy as np
import pytest

from lapa.schema import Runtime, Study, StudyConfig
from lapa.stage import run_stage
from lapa.studies.study import STUDIES, Arm, shown, steps_to_reach, student_interval, summary, table


def test_the_interval_over_seeds_is_students():
    low, high = student_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert student_interval(np.array([4.0])) == (4.0, 4.0)


def test_arms_are_compared_seed_by_seed():
    first, second = [{"recall": 1.0}, {"recall": 5.0}], [{"recall": 2.0}, {"recall": 6.0}]
    found = summary(second, first)["recall"]
    assert found["difference"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["mean"] == 4.0 and found["low"] < 2.0


def test_a_table_has_a_dash_where_an_arm_has_no_such_number():
    runs = {"dense": [{"recall": 0.25, "usage": 7.0}], "memory": [{"recall": 0.5}]}
    text = table({arm: summary(numbers, runs["dense"]) for arm, numbers in runs.items()}, ["recall", "usage"])
    assert text.splitlines()[2:] == ["| dense | 0.25 | 7 |", "| memory | 0.5 | - |"]


def test_large_numbers_are_shown_in_full():
    assert shown(1234567.0) == "1,234,567" and shown(0.12345) == "0.123" and shown(float("nan")) == "nan"


def test_steps_to_reach_a_level(tmp_path):
    rows = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert steps_to_reach(tmp_path, "loss", 2.5) == 20
    assert np.isnan(steps_to_reach(tmp_path, "loss", 0.5))


@pytest.fixture
def runs(monkeypatch):
    """A study `toy` of two arms that counts what it runs."""
    made: list[tuple[str, int]] = []

    def arm(name: str) -> Arm:
        def run(seed, folder, compute):
            made.append((name, seed))
            return {"score": float(seed)}

        return Arm(name, run)

    module = types.SimpleNamespace(arms=lambda study: [arm("a"), arm("b")], COLUMNS=["score"], NOTES="")
    monkeypatch.setitem(STUDIES, "toy", "toy_study")
    monkeypatch.setitem(sys.modules, "toy_study", module)
    return made


def test_seeds_and_arms_can_be_added_to_a_finished_study(tmp_path, runs):
    def study(**changes) -> StudyConfig:
        return StudyConfig(str(tmp_path / "study"), Study("toy"), runtime=Runtime(device="cpu"), **changes)

    assert run_stage("study", study(arms=["a"], seeds=[1])) == {"a_score": 1.0}
    assert run_stage("study", study(seeds=[1, 3])) == {"a_score": 2.0, "b_score": 2.0}
    assert run_stage("study", study(seeds=[1, 3])) == {"a_score": 2.0, "b_score": 2.0}
    assert runs == [("a", 1), ("b", 1), ("a", 3), ("b", 3)]
    with pytest.raises(ValueError, match=r"study\.name was 'toy', is 'facts'"):
        run_stage("study", StudyConfig(str(tmp_path / "study"), Study("facts"), seeds=[5]))
