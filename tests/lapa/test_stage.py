import json
import types
from dataclasses import dataclass, field

import pytest
from filelock import FileLock

from lapa import cli, stage


@dataclass
class Nested:
    depth: int = 3


@dataclass
class Options:
    output_dir: str
    amount: int = 1
    num_workers: int = 2
    data: str = ""
    nested: Nested = field(default_factory=Nested)


@pytest.fixture
def calls(monkeypatch):
    """A stage `toy` that counts how often it runs."""
    made: list[int] = []

    def run(config):
        made.append(config.amount)
        if config.amount < 0:
            raise ValueError("amount is negative")
        return {"doubled": 2 * config.amount}

    monkeypatch.setitem(cli.STAGES, "toy", cli.Stage("", "toy_module", "Options"))
    monkeypatch.setattr(stage.importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    return made


def test_complete_stage_is_not_run_again_and_keeps_its_results(tmp_path, calls):
    options = Options(str(tmp_path / "out"), amount=3)
    assert stage.run_stage("toy", options) == {"doubled": 6}
    assert stage.run_stage("toy", options) == {"doubled": 6}
    assert calls == [3]
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["status"] == "complete" and record["versions"]["torch"] and record["peak_memory_mb"] > 0


def test_failed_stage_runs_again(tmp_path, calls):
    options = Options(str(tmp_path), amount=-1)
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            stage.run_stage("toy", options)
    assert calls == [-1, -1]


def test_options_of_a_call_that_failed_at_once_can_be_corrected(tmp_path, calls):
    with pytest.raises(ValueError, match="negative"):
        stage.run_stage("toy", Options(str(tmp_path), amount=-1))
    assert stage.run_stage("toy", Options(str(tmp_path), amount=2)) == {"doubled": 4}


def test_other_options_in_the_same_folder_are_refused_by_name(tmp_path, calls):
    stage.run_stage("toy", Options(str(tmp_path), amount=1))
    with pytest.raises(ValueError, match=r"amount was 1, is 2.*choose another output_dir"):
        stage.run_stage("toy", Options(str(tmp_path), amount=2))


@pytest.mark.parametrize("forgotten", ["amount", "nested"])
def test_a_folder_older_than_an_option_was_made_with_its_default(tmp_path, calls, forgotten):
    stage.run_stage("toy", Options(str(tmp_path)))
    record = json.loads((tmp_path / "stage.json").read_text())
    del record["options"][forgotten]
    (tmp_path / "stage.json").write_text(json.dumps(record))
    stage.run_stage("toy", Options(str(tmp_path)))
    assert calls == [1]
    other = {"amount": 2} if forgotten == "amount" else {"nested": Nested(4)}
    with pytest.raises(ValueError, match="was None"):
        stage.run_stage("toy", Options(str(tmp_path), **other))


def test_number_of_workers_may_change_between_calls(tmp_path, calls):
    stage.run_stage("toy", Options(str(tmp_path), num_workers=1))
    stage.run_stage("toy", Options(str(tmp_path), num_workers=4))
    assert calls == [1]


def test_two_processes_in_one_folder_are_refused(tmp_path, calls):
    with FileLock(tmp_path / ".out.lock"), pytest.raises(ValueError, match="another process is at work"):
        stage.run_stage("toy", Options(str(tmp_path / "out")))
    assert calls == []


def test_a_folder_made_from_an_input_that_changed_is_refused(tmp_path, calls):
    source, made = Options(str(tmp_path / "source")), tmp_path / "made"
    stage.run_stage("toy", source)
    stage.run_stage("toy", Options(str(made), data=source.output_dir))
    stage.run_stage("toy", Options(str(made), data=source.output_dir))
    assert calls == [1, 1]
    (tmp_path / "source" / "stage.json").unlink()
    stage.run_stage("toy", Options(source.output_dir, amount=5))
    with pytest.raises(ValueError, match=r"other contents of data: delete it"):
        stage.run_stage("toy", Options(str(made), data=source.output_dir))


def test_missing_package_does_not_lose_a_finished_stage(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(stage, "PACKAGES", ("no-such-distribution",))
    stage.run_stage("toy", Options(str(tmp_path)))
    assert json.loads((tmp_path / "stage.json").read_text())["versions"]["no-such-distribution"] is None
