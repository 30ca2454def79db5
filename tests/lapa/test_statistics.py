import numpy as np
import pytest

from lapa.statistics import difference, gap_closure, interval, resampled_means, wilson_interval


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I: 81 of 263 gives .2553 to .3662; 0 of 20 gives 0 to .1611.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_interval_covers_the_true_rate_about_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        outcomes = generator.random((1, 100)) < 0.4
        low, high = interval(resampled_means({"arm": outcomes}, seed=1)["arm"])
        covered += low <= 0.4 <= high
    assert 51 <= covered <= 60


def test_interval_over_seeds_is_wider_when_seeds_disagree():
    agree = np.tile(np.arange(100) < 50, (3, 1))
    disagree = np.stack([np.arange(100) < k for k in (10, 50, 90)])
    narrow, wide = (np.diff(interval(resampled_means({"a": x})["a"]))[0] for x in (agree, disagree))
    assert wide > 2 * narrow


def test_gap_closure_is_left_out_inside_the_noise():
    floor, ceiling = np.tile(np.arange(100) < 20, (3, 1)), np.tile(np.arange(100) < 80, (3, 1))
    middle = np.tile(np.arange(100) < 50, (3, 1))
    closure = gap_closure({"scratch": floor, "lapa": middle, "action_vla": ceiling})
    assert closure is not None and closure["value"] == pytest.approx(0.5)
    assert closure["low"] < 0.5 < closure["high"]
    assert gap_closure({"scratch": floor, "lapa": middle, "action_vla": floor}) is None
    assert gap_closure({"scratch": floor, "lapa": middle}) is None


def test_unpaired_episodes_are_refused():
    with pytest.raises(ValueError, match="same episodes"):
        resampled_means({"a": np.ones((1, 5)), "b": np.ones((1, 6))})


def test_difference_holds_zero_only_where_arms_are_alike():
    low, high = np.tile(np.arange(100) < 20, (3, 1)), np.tile(np.arange(100) < 80, (3, 1))
    found = difference({"lapa": high, "vpt": low}, "lapa", "vpt")
    assert found["value"] == pytest.approx(0.6) and 0.4 < found["low"] < 0.6 < found["high"] < 0.8
    alike = difference({"lapa": high, "vpt": high[:2]}, "lapa", "vpt")
    assert alike["value"] == 0.0 and alike["low"] <= 0 <= alike["high"]


def test_paired_episodes_make_a_difference_surer_than_its_rates():
    """Two arms that fail in the same episodes, one of them in five more: the episodes drawn cancel out."""
    one = np.tile(np.arange(100) < 50, (3, 1))
    other = np.tile(np.arange(100) < 55, (3, 1))
    paired = difference({"a": other, "b": one}, "a", "b")
    assert paired["low"] > 0
    rate = np.diff(interval(resampled_means({"a": one})["a"]))[0]
    assert paired["high"] - paired["low"] < 0.6 * rate
