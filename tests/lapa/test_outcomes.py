import json

import numpy as np
import pytest

from lapa.outcomes import comparison_rows, headline, pool_families, read_outcomes, success_rows


def write_evaluation(folder, arm, seed, rates, split="train", num_episodes=40):
    """episodes.jsonl of one arm and seed: the first episodes of each family succeed, by its rate."""
    target = folder / f"{arm}-seed{seed}"
    target.mkdir(parents=True)
    rows = [
        {"family": family, "split": split, "seed": 100 + i, "success": i < rate * num_episodes}
        for family, rate in rates.items()
        for i in range(num_episodes)
    ]
    (target / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def outcomes(tmp_path):
    """Two splits of two families; LAPA between Scratch and ActionVLA in the seen one, all alike in the other."""
    for split, rates in {
        "train": {"scratch": 0.1, "vpt": 0.3, "lapa": 0.6, "action_vla": 0.8},
        "unseen": dict.fromkeys(["scratch", "vpt", "lapa", "action_vla"], 0.5),
    }.items():
        for arm, rate in rates.items():
            for seed in range(3):
                write_evaluation(tmp_path / split, arm, seed, {"reach": rate, "push": rate / 2}, split)
    found, missing = read_outcomes(tmp_path)
    assert not missing
    return found


def test_splits_and_families_are_kept_apart_and_arms_in_order(outcomes):
    assert set(outcomes) == {(split, family) for split in ("train", "unseen") for family in ("reach", "push")}
    for by_arm in outcomes.values():
        assert list(by_arm) == ["scratch", "vpt", "lapa", "action_vla"]
        assert all(array.shape == (3, 40) for array in by_arm.values())
    pooled = pool_families(outcomes)
    assert pooled["train", "all families"]["lapa"].mean() == pytest.approx((0.6 + 0.3) / 2)


def test_success_lies_between_its_intervals(outcomes):
    rows = success_rows(outcomes)
    assert len(rows) == 2 * (2 + 1) * 4
    for row in rows:
        assert row["wilson_low"] < row["success"] < row["wilson_high"]
        assert row["low"] <= row["success"] <= row["high"]
        assert len(row["by_seed"]) == row["num_seeds"] == 3


def test_gap_closure_is_given_where_there_is_a_gap_and_left_empty_elsewhere(outcomes):
    rows = [row for row in comparison_rows(outcomes) if row["family"] == "reach"]
    closures = {(row["split"], row["arm"]): row["value"] for row in rows if row["kind"] == "gap_closure"}
    assert closures["train", "lapa"] == pytest.approx(5 / 7) and closures["train", "vpt"] == pytest.approx(2 / 7)
    assert closures["unseen", "lapa"] is None
    against_vpt = {row["split"]: row for row in rows if (row["arm"], row["other"]) == ("lapa", "vpt")}
    assert against_vpt["train"]["value"] == pytest.approx(0.3) and against_vpt["train"]["low"] > 0
    assert against_vpt["unseen"]["value"] == 0 and against_vpt["unseen"]["low"] <= 0 <= against_vpt["unseen"]["high"]


def test_a_gap_is_closed_from_the_grounding_too_where_it_was_run(outcomes):
    with_grounding = {group: arms | {"grounded": arms["vpt"]} for group, arms in outcomes.items()}
    rows = [row for row in comparison_rows(with_grounding) if (row["split"], row["family"]) == ("train", "reach")]
    closures = {(row["arm"], row["floor"]): row["value"] for row in rows if row["kind"] == "gap_closure"}
    assert set(closures) == {(arm, "scratch") for arm in ("grounded", "vpt", "lapa")} | {
        ("vpt", "grounded"),
        ("lapa", "grounded"),
    }
    assert closures["lapa", "scratch"] == pytest.approx(5 / 7) and closures["lapa", "grounded"] == pytest.approx(3 / 5)
    assert closures["vpt", "grounded"] == 0


def test_variants_of_an_arm_are_arms_of_their_own_and_any_may_be_the_baseline(tmp_path):
    for variant, rate in {"dense": 0.4, "mot": 0.7}.items():
        for seed in range(2):
            write_evaluation(tmp_path / variant, "lapa", seed, {"reach": rate})
    found, _ = read_outcomes(tmp_path)
    assert {arm: array.mean() for arm, array in found["train", "reach"].items()} == {
        "dense-lapa": pytest.approx(0.4),
        "mot-lapa": pytest.approx(0.7),
    }
    assert comparison_rows(found) == []
    (row,) = comparison_rows(found, baseline="dense-lapa")
    assert (row["arm"], row["other"]) == ("mot-lapa", "dense-lapa") and row["value"] == pytest.approx(0.3)


def test_headline_is_of_the_first_split(outcomes):
    numbers = headline(outcomes)
    assert numbers["success_lapa"] == pytest.approx(0.45) and numbers["gap_closure"] == pytest.approx(0.714, abs=1e-3)
    assert headline({}) == {}


def test_one_arm_alone_has_success_and_no_comparison():
    alone = {("train", "reach"): {"lapa": np.ones((1, 5), bool)}}
    assert len(success_rows(alone)) == 1 and comparison_rows(alone) == []


def test_an_evaluation_that_is_still_running_does_not_count_and_takes_no_episode_from_the_others(tmp_path):
    for arm in ("scratch", "lapa"):
        write_evaluation(tmp_path, arm, 0, {"reach": 0.5, "push": 0.5})
    write_evaluation(tmp_path, "lapa", 1, {"reach": 0.5}, num_episodes=3)
    (tmp_path / "lapa-seed1" / "stage.json").write_text(json.dumps({"status": "running"}))
    outcomes, missing = read_outcomes(tmp_path)
    assert missing == ["lapa-seed1 is not complete and does not count yet."]
    assert pool_families(outcomes)["train", "all families"]["lapa"].shape == (1, 80)
