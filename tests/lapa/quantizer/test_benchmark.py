import pytest
import torch

from lapa.quantizer.benchmark import Entry, Work, entries, gflop_per_pair, interleaved, main, parser, ratios_to_first

TINY = parser().parse_args(["--width", "16", "--heads", "2", "--layers", "1", "--batch-size", "3"])


def test_laq_is_measured_on_the_work_of_the_reference():
    reference, laq = Work(Entry("reference", None), TINY), Work(Entry("laq", None), TINY)
    assert torch.equal(reference.label(), laq.label())


def test_a_clip_is_labelled_whole_and_a_step_changes_the_weights():
    for entry in entries(compiled=False):
        work = Work(entry, TINY)
        assert work.label().shape == (3, 4)
        before = [parameter.detach().clone() for parameter in work.model.parameters()]
        work.train()
        assert any(not torch.equal(*pair) for pair in zip(before, work.model.parameters(), strict=True))


def test_every_round_calls_every_work_in_turn():
    calls: list[str] = []
    works = [lambda: calls.append("one"), lambda: calls.append("two")]
    rounds = interleaved(works, torch.device("cpu"), num_rounds=2, num_warmups=1)
    assert calls == ["one", "two"] * 3
    assert len(rounds) == 2 and all(len(times) == 2 for times in rounds)


def test_ratios_are_within_a_round():
    assert ratios_to_first([[4.0, 2.0], [9.0, 3.0], [1.0, 2.0]], 1) == [0.5, 2.0, 3.0]


def test_counted_products_are_those_of_the_sizes():
    wide = parser().parse_args(["--width", "32", "--heads", "2", "--layers", "1", "--batch-size", "3"])
    work = Work(Entry("transformer", None), wide)
    train, label = gflop_per_pair(work)
    # Of 64 patches in 7 frames: embedding, 12 W^2 a spatial layer, attention; of 3 second frames: 14 W^2.
    expected = 64 * (7 * (192 * 32 + 12 * 32**2 + 2 * 64 * 32) + 3 * 14 * 32**2)
    assert label * 3e9 / 2 == pytest.approx(expected, rel=0.1)
    assert train > label


def test_quick_mode_prints_a_row_for_each(capsys):
    main(["--quick", "--threads", "1"])
    output = capsys.readouterr().out
    assert all(f"| {entry} |" in output for entry in entries(compiled=False))
