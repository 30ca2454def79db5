import json
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lapa import pipeline
from lapa.application import register_schema
from lapa.schema import RunConfig

TINY = [
    "videos.num_episodes=24",
    "demos.num_episodes=6",
    "videos.num_workers=1",
    "demos.num_workers=1",
    "train_quantizer.training.num_steps=4",
    "train_quantizer.num_eval_pairs=32",
    "train_quantizer.data.holdout_fraction=0.25",
    "pretrain.training.num_steps=4",
    "pretrain.ignore_gate=true",
    "pretrain.holdout_fraction=0.2",
    "finetune.training.num_steps=4",
    "evaluate.num_episodes=2",
    "evaluate.num_videos=1",
    "runtime.num_threads=1",
    "seeds=[0]",
]


def compose_run(*overrides: str) -> RunConfig:
    register_schema()
    with initialize_config_module("configs", version_base="1.3"):
        config = OmegaConf.to_object(compose("run", overrides=list(overrides)))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize("experiment", ["quickstart", "tabletop", "families", "gripper", "droid"])
def test_experiments_compose_and_put_every_folder_into_the_run_directory(experiment):
    config = compose_run(f"experiment={experiment}", "run_dir=somewhere", "ingest.path=clips")
    for stage in (config.videos, config.demos, config.train_quantizer, config.label, config.pretrain, config.finetune):
        assert stage.output_dir.startswith("somewhere/")


def test_arms_differ_in_their_pretraining_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline, "run_stage", lambda verb, options: calls.append((verb, options)))
    pipeline.run(compose_run("experiment=quickstart", "run_dir=r", "seeds=[0,1]"))
    finetunes = [options for verb, options in calls if verb == "finetune"]
    assert len(finetunes) == 6
    shared = {"output_dir": "", "pretrained": None}
    for seed in (0, 1):
        same = [replace(o, **shared) for o in finetunes if o.training.seed == seed]
        assert len(same) == 3 and same[0] == same[1] == same[2]
    evaluations = [replace(o, policy="", output_dir="") for verb, o in calls if verb == "evaluate"]
    assert all(options == evaluations[0] for options in evaluations), "the same initial states for every arm and seed"
    targets = {o.output_dir: (o.target, o.data) for verb, o in calls if verb == "pretrain"}
    assert targets["r/pretrain/lapa-seed1"] == ("latent", "r/videos/video")
    assert targets["r/pretrain/action_vla-seed1"] == ("action", "r/videos/demos")
    assert not any("scratch" in folder for folder in targets)


def test_unknown_arms_and_stages_are_named():
    config = compose_run("experiment=quickstart", "run_dir=r")
    with pytest.raises(ValueError, match=r"unknown arms \['bc'\]"):
        pipeline.run(replace(config, arms=["bc"]))
    with pytest.raises(ValueError, match=r"unknown stages \['deploy'\]"):
        pipeline.run(replace(config, stages=["deploy"]))


def test_video_becomes_a_policy_and_a_report_and_a_second_call_does_nothing_again(tmp_path, capsys):
    config = compose_run("experiment=quickstart", f"run_dir={tmp_path}", *TINY)
    pipeline.run(config)
    page = (tmp_path / "report.html").read_text()
    for section in ("Success in MuJoCo", "Rollouts", "Latent-action quantizer", "Training loss", "Provenance"):
        assert section in page
    for arm in ("lapa", "scratch", "action_vla"):
        episodes = (tmp_path / "evaluate" / f"{arm}-seed0" / "episodes.jsonl").read_text().splitlines()
        assert [json.loads(line)["seed"] for line in episodes] == [3_000_000, 3_000_001]
        assert (tmp_path / "finetune" / f"{arm}-seed0" / "model.safetensors").is_file()
    capsys.readouterr()
    pipeline.run(config)
    assert capsys.readouterr().out.count("is complete") == 12
