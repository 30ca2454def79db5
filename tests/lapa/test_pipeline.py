import json
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lapa import pipeline
from lapa.application import register_schema
from lapa.schema import PretrainConfig, RunConfig

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


PAPER = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/experiment/paper").glob("*.yaml"))


@pytest.mark.parametrize(
    "experiment",
    [
        "quickstart",
        "tabletop",
        "families",
        "gripper",
        "mt10",
        "backbones",
        "droid",
        *(f"paper/{name}" for name in PAPER),
    ],
)
def test_experiments_compose_and_put_every_folder_where_they_are_told(experiment):
    # A sweep has a run directory a point, and shares what the points have in common beside them.
    places = [f"{name}=somewhere" for name in ("report.run_dir" if "scaling" in experiment else "run_dir", "video_dir")]
    config = compose_run(f"experiment={experiment}", *places, "ingest.path=clips")
    for stage in (config.videos, config.demos, config.train_quantizer, config.label, config.pretrain, config.finetune):
        assert stage.output_dir.startswith("somewhere/")


def test_arms_differ_in_their_pretraining_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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
    targets = {o.output_dir: (o.predict, o.data) for verb, o in calls if verb == "pretrain"}
    assert targets["r/pretrain/lapa-seed1"] == ("latent", "r/videos/video")
    assert targets["r/pretrain/action_vla-seed1"] == ("action", "r/videos/demos")
    assert not any("scratch" in folder for folder in targets)


def jobs_of(*overrides):
    config = compose_run("experiment=paper/in_domain", "run_dir=r", "seeds=[1]", *overrides)
    return pipeline.shared_jobs(config), pipeline.chains_of(config)


def test_every_arm_has_its_labels_and_no_other():
    shared, chains = jobs_of()
    assert set(chains) == {f"{arm}-seed1" for arm in pipeline.ARMS}
    pretrained = {name: dict(jobs)["pretrain"] for name, jobs in chains.items() if "pretrain" in dict(jobs)}
    seen = {
        name.removesuffix("-seed1"): (options.predict, options.labels, options.action_labels, options.data)
        for name, options in pretrained.items()
    }
    video, actions = "r/videos/video", "r/videos/demos"
    assert seen == {
        "lapa": ("latent", "r/labels", None, video),
        "shuffled": ("latent", "r/labels-shuffled", None, video),
        "pixel_kmeans": ("latent", "r/labels-pixel_differences", None, video),
        "oracle": ("latent", "r/labels-actions", None, video),
        "vpt": ("action", None, "r/pseudo_actions", video),
        "unipi": ("frame", None, None, video),
        "action_vla": ("action", None, None, actions),
    }
    made = {options.output_dir: options for _, options in shared}
    assert {options.labels for options in pretrained.values() if options.labels} <= set(made)
    assert made["r/labels-shuffled"].labels == "r/labels", "the quantizer is asked once"
    assert made["r/labels-actions"].action_data == actions and made["r/labels"].action_data is None
    assert made["r/inverse"].data == "r/demos/demos", "the inverse model learns from the demonstrations alone"


def test_runs_of_the_same_videos_share_what_does_not_come_of_their_demonstrations():
    shared, chains = jobs_of("video_dir=v")
    made = {options.output_dir for _, options in shared}
    assert {"v/videos", "v/quantizer", "v/labels", "r/demos", "r/inverse", "r/pseudo_actions"} <= made
    folders = {name: dict(jobs)["pretrain"].output_dir for name, jobs in chains.items() if "pretrain" in dict(jobs)}
    assert folders.pop("vpt-seed1") == "r/pretrain/vpt-seed1", "its labels come of the demonstrations"
    assert folders.pop("lapa-seed1") == "v/pretrain/lapa-seed1"
    assert all(folder.startswith("v/pretrain/") for folder in folders.values())
    assert all(dict(jobs)["evaluate"].output_dir.startswith("r/evaluate/") for jobs in chains.values())


def test_arms_that_are_not_run_need_no_labels():
    shared, _ = jobs_of("arms=[scratch,lapa]")
    assert [verb for verb, _ in shared] == ["demos", "demos", "train_quantizer", "label", "ground"]
    shared, chains = jobs_of("arms=[scratch]")
    assert "ground" not in dict(shared) and dict(chains["scratch-seed1"])["finetune"].grounding is None


def test_all_pretrained_arms_are_grounded_alike_and_one_arm_is_nothing_else():
    shared, chains = jobs_of("text@pretrain.text=bytes", "pretrain.backbone.width=64")
    ground = dict(shared)["ground"]
    assert (ground.text.name, ground.width, ground.data) == ("bytes", 64, "r/videos/video")
    jobs = [dict(chain) for chain in chains.values()]
    assert {job["pretrain"].grounding for job in jobs if "pretrain" in job} == {"r/grounding"}
    policies = {name: dict(chain)["finetune"] for name, chain in chains.items() if "finetune" in dict(chain)}
    assert [name for name, options in policies.items() if options.grounding] == ["grounded-seed1"]


def test_baselines_have_the_same_demonstrations_and_steps():
    _, chains = jobs_of("finetune.training.num_steps=70", "pretrain.training.num_steps=30")
    finetunes = {name: options for name, jobs in chains.items() for verb, options in jobs if "finetune" in verb}
    assert {options.data for options in finetunes.values()} == {"r/demos/demos"}
    steps = {name.removesuffix("-seed1"): options.training.num_steps for name, options in finetunes.items()}
    assert steps.pop("scratch_long") == 70 + 30
    assert set(steps.values()) == {70}
    unipi, lapa = finetunes["unipi-seed1"], finetunes["lapa-seed1"]
    assert unipi.training == lapa.training and unipi.num_action_steps == lapa.num_action_steps


def test_every_split_is_evaluated_from_the_same_states_by_every_arm():
    _, chains = jobs_of()
    for name, jobs in chains.items():
        evaluations = [options for verb, options in jobs if verb == "evaluate"]
        assert [options.output_dir for options in evaluations] == [
            f"r/evaluate/{s}/{name}" for s in ("train", "unseen")
        ]
        assert [options.split for options in evaluations] == ["train", "unseen"]
        assert {options.seed for options in evaluations} == {3_000_000}


def test_demonstrations_are_a_share_of_every_batch_that_shows_video():
    arms = "arms=[scratch,lapa,vpt,unipi,shuffled,oracle,action_vla]"
    shared, chains = jobs_of(arms, "demos_as_video=0.25", "video_dir=v")

    def parts(mixture):
        return [(part.path, part.weight, part.labels) for part in mixture]

    def both(videos="v/videos/video", labels=None, demo_labels=None):
        return [(videos, 0.75, labels), ("r/demos/demos", 0.25, demo_labels)]

    quantizer, ground = dict(shared)["train_quantizer"], dict(shared)["ground"]
    assert quantizer.data.path is None and parts(quantizer.data.mixture) == both()
    assert ground.data is None and parts(ground.mixture) == both()
    labels = [options for verb, options in shared if verb == "label"]
    labelled = {options.output_dir: (options.data, options.labels) for options in labels}
    assert [options.action_data for options in labels if options.action_data] == ["v/videos/demos", "r/demos/demos"]
    assert labelled == {
        "v/labels": ("v/videos/video", None),
        "v/labels-demos": ("r/demos/demos", None),
        "v/labels-shuffled": ("v/videos/video", "v/labels"),
        "v/labels-shuffled-demos": ("r/demos/demos", "v/labels-demos"),
        "v/labels-actions": ("v/videos/video", None),
        "v/labels-actions-demos": ("r/demos/demos", "v/labels-actions"),
    }
    pretrained = [(name, dict(jobs)["pretrain"]) for name, jobs in chains.items() if "pretrain" in dict(jobs)]
    assert {name: parts(options.mixture) for name, options in pretrained} == {
        "lapa-seed1": both(labels="v/labels", demo_labels="v/labels-demos"),
        "shuffled-seed1": both(labels="v/labels-shuffled", demo_labels="v/labels-shuffled-demos"),
        "oracle-seed1": both(labels="v/labels-actions", demo_labels="v/labels-actions-demos"),
        "vpt-seed1": both(labels="r/pseudo_actions"),
        "unipi-seed1": both(),
        "action_vla-seed1": both("v/videos/demos"),
    }
    assert {(o.data, o.labels, o.action_labels) for _, o in pretrained} == {(None, None, None)}
    with pytest.raises(ValueError, match="give no mixture"):
        jobs_of("arms=[lapa]", "demos_as_video=0.25", "finetune.data=null")
    with pytest.raises(ValueError, match="expected a share from 0 to less than 1"):
        pipeline.run(compose_run("experiment=quickstart", "run_dir=r", "demos_as_video=1"))


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


def test_demonstrations_beside_the_videos_become_a_policy(tmp_path):
    options = ["experiment=quickstart", f"run_dir={tmp_path}", *TINY, "arms=[lapa,vpt]", "demos_as_video=0.5"]
    stages = "stages=[demos,train_quantizer,label,train_inverse,label_actions,ground,pretrain,finetune]"
    config = compose_run(*options, stages, "train_inverse.training.num_steps=2", "ground.training.num_steps=2")
    pipeline.run(config)
    for arm in ("lapa", "vpt"):
        assert (tmp_path / "finetune" / f"{arm}-seed0" / "model.safetensors").is_file()


@pytest.mark.timeout(900)
def test_the_proof_in_miniature_writes_every_table_and_resumes(tmp_path, capsys):
    """All arms end to end, two at a time; a killed stage and a second call change nothing that is complete."""
    options = [
        "experiment=paper/in_domain",
        "size=smoke",
        "seeds=[0]",
        "evaluate.num_episodes=1",
        f"run_dir={tmp_path}",
    ]
    config = compose_run(*options, "parallel_jobs=2", "runtime.num_threads=1")
    pipeline.run(config)
    rows = json.loads((tmp_path / "tables" / "success.json").read_text())
    assert {(row["split"], row["arm"]) for row in rows} == {
        (split, arm) for split in ("train", "unseen") for arm in pipeline.ARMS
    }
    for name in ("success.csv", "success.md", "success.png", "comparisons.csv", "comparisons.json", "comparisons.md"):
        assert (tmp_path / "tables" / name).stat().st_size > 100
    inverse = json.loads((tmp_path / "inverse" / "metrics.json").read_text())
    assert {"test_r2", "test_l1", "test_cosine", "test_mean_action_l1"} <= set(inverse)
    assert (tmp_path / "pretrain" / "unipi-seed0" / "images" / "future_frames.png").is_file()
    assert json.loads((tmp_path / "finetune" / "unipi-seed0" / "config.json").read_text())["type"] == "unipi"
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == [0]

    files = (path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log")
    before = {path: path.read_bytes() for path in files if path.name != "run.json"}  # it says parallel_jobs
    capsys.readouterr()
    pipeline.run(replace(config, parallel_jobs=1))
    assert "wrote" not in capsys.readouterr().out.replace("report: wrote", "")
    assert not [path for path, content in before.items() if path.read_bytes() != content]


def test_a_chain_that_fails_is_named_and_stops_none_but_those_that_need_it(tmp_path):
    missing = PretrainConfig(output_dir=str(tmp_path / "bad"), data=str(tmp_path / "absent"))
    on_top = PretrainConfig(output_dir=str(tmp_path / "on_top"), data=str(tmp_path / "bad" / "made_there"))
    chains = {"bad": [("pretrain", missing)], "on_top": [("pretrain", on_top)], "good-seed0": []}
    told = r"(?s)2 of 3 chains failed.*bad: ValueError: no folder.*on_top: not begun, needs bad"
    with pytest.raises(ValueError, match=told):
        pipeline.run_in_parallel(chains, 2, tmp_path / "logs")
    assert "no folder" in (tmp_path / "logs" / "bad.log").read_text()
    assert (tmp_path / "logs" / "good-seed0.log").is_file()
    assert not (tmp_path / "logs" / "on_top.log").exists()


def test_stages_side_by_side_wait_for_what_they_read():
    shared, arms = jobs_of("arms=[scratch,lapa,vpt,shuffled]")
    made = {Path(options.output_dir).name: [(verb, options)] for verb, options in shared}
    needs = pipeline.needs_of(made | arms)
    assert needs["demos"] == needs["videos"] == set()
    assert needs["quantizer"] == needs["grounding"] == {"videos"}
    assert needs["labels"] == {"videos", "quantizer"}
    assert needs["labels-shuffled"] == {"videos", "quantizer", "labels"}
    assert needs["pseudo_actions"] == {"videos", "inverse"} and needs["inverse"] == {"videos", "demos"}
    assert needs["scratch-seed1"] == {"demos"}
    assert needs["lapa-seed1"] == {"videos", "demos", "labels", "grounding"}
    assert needs["vpt-seed1"] == {"videos", "demos", "pseudo_actions", "grounding"}
