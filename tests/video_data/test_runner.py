"""The same calls on this machine's processes and on Ray: equal results, in order, whatever crashes."""

import operator
import os

import pytest

from lapa.schema import ClipFilters, IngestConfig
from tests.video_data.encode import write_clip
from video_data.ingest import run
from video_data.runner import run_in_order


def calls_with_a_crash() -> list[tuple]:
    calls: list[tuple] = [(abs, -i) for i in range(40)]
    calls[19] = (os._exit, 7)
    return calls


EXPECTED = [None if i == 19 else i for i in range(40)]


def test_local_results_come_in_order_and_a_crash_costs_one_call():
    assert list(run_in_order("local", operator.call, calls_with_a_crash(), 2)) == EXPECTED


def test_ray_writes_the_same_bytes_and_a_crash_costs_one_call(tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'lerobot_policy_lapa[ray]'")
    for index in range(20):
        write_clip(tmp_path / "videos" / f"{index:02}.mp4", num_frames=6 + index % 5, seed=index % 15)
    write_clip(tmp_path / "videos" / "short.mp4", num_frames=2)
    (tmp_path / "videos" / "empty.mp4").touch()
    try:
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
        assert list(run_in_order("ray", operator.call, calls_with_a_crash(), 2)) == EXPECTED
        for runner in ("local", "ray"):
            cfg = {"output_dir": str(tmp_path / runner), "runner": runner, "export": "lerobot", "duplicates": "reject"}
            run(IngestConfig(path=str(tmp_path / "videos"), image_size=16, filters=ClipFilters(min_frames=4), **cfg))
    finally:
        ray.shutdown()
    files = sorted(file.relative_to(tmp_path / "local") for file in (tmp_path / "local").rglob("*") if file.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file


def test_an_unknown_runner_names_those_that_are():
    with pytest.raises(ValueError, match=r"runner is 'slurm', expected one of \('local', 'ray'\)"):
        list(run_in_order("slurm", abs, [(1,)], 1))
