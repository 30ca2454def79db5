"""`lapa run`: every stage top to bottom in one run directory.

    videos ─▶ quantizer ─▶ labels ─▶ pretrain/<arm>-seed<k> ─▶ finetune/... ─▶ evaluate/... ─▶ report.html

Arms share the demonstrations, the finetuning and the evaluation, and differ in their pretraining alone:
lapa (latent actions of the videos), action_vla (their true actions, the upper bound), scratch (none).
Calling it again skips what is complete and resumes what was killed.
"""

import gc
import time
from dataclasses import replace
from pathlib import Path

from lapa.schema import PretrainConfig, RunConfig
from lapa.stage import peak_memory_mb, run_stage

PRETRAIN_TARGET = {"lapa": "latent", "action_vla": "action", "scratch": None}


def run(config: RunConfig) -> dict:
    """Run the stages of `config.stages`, in their fixed order, for every arm and seed."""
    unknown = sorted(set(config.arms) - set(PRETRAIN_TARGET))
    if unknown:
        raise ValueError(f"unknown arms {unknown}: known are {sorted(PRETRAIN_TARGET)}")
    known = ["ingest", "demos", "train_quantizer", "label", "pretrain", "finetune", "evaluate", "report"]
    unknown = sorted(set(config.stages) - set(known))
    if unknown:
        raise ValueError(f"unknown stages {unknown}: known are {known}")

    started = time.perf_counter()

    def stage(verb: str, options, **changes) -> None:
        if verb not in config.stages:
            return
        if hasattr(options, "runtime"):
            changes["runtime"] = config.runtime
        print(f"\n== {verb} {changes.get('output_dir', '')}".rstrip(), flush=True)
        run_stage(verb, replace(options, **changes))
        gc.collect()

    stage("ingest", config.ingest)
    stage("demos", config.videos)
    stage("demos", config.demos)
    stage("train_quantizer", config.train_quantizer)
    stage("label", config.label)
    for seed in config.seeds:
        for arm in config.arms:
            name = f"{arm}-seed{seed}"
            pretrained = pretrain_changes(config.pretrain, arm, seed)
            if pretrained:
                stage("pretrain", config.pretrain, **pretrained)
            stage(
                "finetune",
                config.finetune,
                backbone=config.pretrain.backbone,
                image_tokenizer=config.pretrain.image_tokenizer,
                image_size=config.pretrain.image_size,
                text=config.pretrain.text,
                pretrained=pretrained.get("output_dir"),
                output_dir=f"{config.finetune.output_dir}/{name}",
                training=replace(config.finetune.training, seed=seed),
            )
            stage(
                "evaluate",
                config.evaluate,
                policy=f"{config.finetune.output_dir}/{name}",
                output_dir=f"{config.evaluate.output_dir}/{name}",
            )
    stage("report", config.report)
    return {
        "run_dir": str(Path(config.run_dir).resolve()),
        "wall_time_s": round(time.perf_counter() - started, 1),
        "peak_memory_mb": peak_memory_mb(),
    }


def pretrain_changes(pretrain: PretrainConfig, arm: str, seed: int) -> dict:
    """How an arm's pretraining differs from the configured one; empty for an arm without pretraining."""
    target = PRETRAIN_TARGET[arm]
    if target is None:
        return {}
    changes: dict = {
        "target": target,
        "output_dir": f"{pretrain.output_dir}/{arm}-seed{seed}",
        "training": replace(pretrain.training, seed=seed),
    }
    if target == "action":
        if pretrain.action_data is None:
            raise ValueError("the action_vla arm needs pretrain.action_data=<the same episodes with actions>")
        changes |= {"labels": None, "data": pretrain.action_data}
    return changes
