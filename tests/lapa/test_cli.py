import dataclasses
import subprocess
import sys

import pytest

from lapa import application, cli, schema


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "lapa.cli", *arguments], capture_output=True, text=True)


def test_help_lists_every_stage_without_importing_torch():
    code = "import sys; from lapa.cli import main; main(['--help']); assert not {'torch', 'hydra'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in cli.STAGES:
        assert f"\n  {verb} " in done.stdout


def test_unknown_stage_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrian"])
    assert stopped.value.code == 2
    assert "pretrain" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.STAGES)
def test_stage_help_names_every_option_of_the_schema(verb):
    text = application.stage_help(verb)
    for field in dataclasses.fields(getattr(schema, cli.STAGES[verb].config)):
        assert f"  {field.name}" in text


@pytest.mark.parametrize("verb", cli.STAGES)
def test_no_plain_option_is_called_like_a_group(verb):
    """Hydra takes `group=value` for a choice of the group, so such an option could not be set."""
    for field in dataclasses.fields(getattr(schema, cli.STAGES[verb].config)):
        if field.name in schema.GROUPS:
            assert all(issubclass(choice, field.type) for choice in schema.GROUPS[field.name].values()), field.name


def test_missing_option_is_named_with_the_fix():
    done = run("demos")
    assert done.returncode == 2
    assert "output_dir is required: lapa demos output_dir=" in done.stderr


def test_unknown_backbone_lists_the_known_ones(tmp_path):
    done = run("pretrain", "data=x", f"output_dir={tmp_path}", "backbone=mamba")
    assert done.returncode != 0
    assert "dense" in done.stderr


def test_experiment_is_applied_over_the_defaults_from_any_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lapa.cli", "run", "experiment=quickstart", "--cfg", "job"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "run_dir: outputs/quickstart" in done.stdout
    assert not list(tmp_path.iterdir()), "composing a configuration writes nothing"


def test_tasks_of_a_suite_are_separated_by_commas():
    done = run("evaluate", "env=metaworld/push-v3,reach-v3", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "env: metaworld/push-v3,reach-v3" in done.stdout


def test_a_sweep_in_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        application.launch("label", ["--multirun", "batch_size=1,2"])
    assert stopped.value.code == 2
    assert "exclude each other" in capsys.readouterr().err
