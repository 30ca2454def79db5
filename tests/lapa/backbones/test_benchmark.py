import json

import pytest

from lapa.backbones import benchmark
from lapa.backbones.base import build_backbone

SMOKE = ["--shapes", "smoke", "--rounds", "2", "--warmups", "1", "--threads", "1"]


@pytest.mark.parametrize("shape", ["pretrain", "long"])
@pytest.mark.parametrize("name", benchmark.NAMES)
def test_all_backbones_cost_what_dense_costs(name, shape):
    lengths = benchmark.SHAPES[shape].modality_lengths
    dense, other = (
        build_backbone(benchmark.config_of(n, benchmark.SHAPES[shape])).forward_flops(lengths) for n in ("dense", name)
    )
    assert other == pytest.approx(dense, rel=0.02)


def test_every_backbone_gets_a_row_with_what_it_costs(tmp_path, capsys):
    benchmark.main([*SMOKE, "--backbones", "mot", "--no-memory", "--output", str(tmp_path / "cost.json")])
    found = json.loads((tmp_path / "cost.json").read_text())["shapes"]["smoke"]
    assert set(found) == {"dense", "mot"}
    assert found["dense"]["times_dense"] == 1.0
    assert found["mot"]["times_dense_low"] <= found["mot"]["times_dense"] <= found["mot"]["times_dense_high"]
    assert found["mot"]["parameters"] == 3 * found["dense"]["parameters"]
    assert "| mot |" in capsys.readouterr().out


def test_a_step_changes_the_weights():
    arguments = benchmark.parser().parse_args(SMOKE)
    work = benchmark.Work("mot", benchmark.SHAPES["smoke"], arguments)
    before = [weight.clone() for weight in work.model.parameters()]
    work.step()
    assert all(not weight.equal(old) for weight, old in zip(work.model.parameters(), before, strict=True))


def test_memory_is_what_training_adds(capsys):
    arguments = benchmark.parser().parse_args([*SMOKE, "--measure-memory", "dense", "smoke"])
    benchmark.measure_memory(arguments)
    assert float(capsys.readouterr().out) >= 0


def test_the_interval_of_a_median_comes_from_order_statistics():
    # Of 25 values the 8th and the 18th hold the median with 95.7% (binomial).
    assert benchmark.median_interval([float(v) for v in range(1, 26)]) == (13, 8, 18)
    assert benchmark.median_interval([3.0]) == (3, 3, 3)
