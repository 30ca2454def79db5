"""`lapa run`: every stage top to bottom in one run directory.

    videos ─▶ quantizer ─▶ labels ─▶ pretrain/<arm>-seed<k> ─▶ finetune/... ─▶ evaluate/... ─▶ report.html

Arms share the demonstrations, the finetuning and the evaluation, and differ in what they were pretrained on: `ARMS`.
Calling it again skips what is complete and resumes what was killed.
"""

import contextlib
import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lapa import distributed
from lapa.checkpoint import write_json
from lapa.runtime import available_cores
from lapa.schema import LabelConfig, MixturePart, RunConfig
from lapa.stage import peak_memory_mb, run_stage

Job = tuple[str, Any]  # a verb of `lapa.cli.STAGES` and its options

STAGES = [
    "ingest",
    "demos",
    "train_quantizer",
    "label",
    "train_inverse",
    "label_actions",
    "ground",
    "pretrain",
    "finetune",
    "evaluate",
    "report",
]
DEMOS = "-demos"  # behind the name of a folder of labels: of the demonstrations
# Jobs that belong to a stage of another name.
STAGE_OF = {"finetune_unipi": "finetune"}


@dataclass(frozen=True)
class Arm:
    """What a policy has seen before the demonstrations.

    predict: what it is pretrained to predict (`PretrainConfig.predict`); None: it is not pretrained.
    labels: of predict=latent, the source of `lapa label`; of predict=action, `inverse` (pseudo actions) or `true`.
    is_grounded: it is not pretrained and starts from what `lapa ground` learned; arms that are pretrained do where
        `pretrain.grounding` says so, all alike.
    adds_pretraining: its finetuning takes as many samples as the pretraining of other arms, beside its own.
    """

    predict: str | None = None
    labels: str | None = None
    is_grounded: bool = False
    adds_pretraining: bool = False


ARMS = {
    "scratch": Arm(),
    "lapa": Arm("latent", "quantizer"),
    "vpt": Arm("action", "inverse"),
    "unipi": Arm("frame"),
    "action_vla": Arm("action", "true"),
    # Controls: what grounding brings without pretraining on top; what is left of LAPA when its labels say nothing, or
    # come without learning; the best that so many codes can say; and more of Scratch.
    "grounded": Arm(is_grounded=True),
    "shuffled": Arm("latent", "shuffled"),
    "pixel_kmeans": Arm("latent", "pixel_differences"),
    "oracle": Arm("latent", "actions"),
    "scratch_long": Arm(adds_pretraining=True),
}


def run(config: RunConfig) -> dict:
    """Run the stages of `config.stages`, in their fixed order, for every arm and seed."""
    unknown = sorted(set(config.arms) - set(ARMS))
    if unknown:
        raise ValueError(f"unknown arms {unknown}: known are {sorted(ARMS)}")
    unknown = sorted(set(config.stages) - set(STAGES))
    if unknown:
        raise ValueError(f"unknown stages {unknown}: known are {STAGES}")
    if not 0 <= config.demos_as_video < 1:
        raise ValueError(f"demos_as_video is {config.demos_as_video}, expected a share from 0 to less than 1")
    if config.parallel_jobs > 1 and distributed.world_size() > 1:
        raise ValueError("parallel_jobs and torchrun exclude each other: one of them shall use the cores")

    started = time.perf_counter()
    shared, chains = shared_jobs(config), chains_of(config)
    if distributed.is_main():
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(config.run_dir) / "run.json", asdict(config))
    # Each shared job is a chain of its own; arms and seeds of whom no stage was asked for are none.
    chains = {name: jobs for name, jobs in chains.items() if jobs}
    chains = {f"{index}-{verb}": [(verb, options)] for index, (verb, options) in enumerate(shared)} | chains
    if config.parallel_jobs > 1:
        run_in_parallel(chains, config.parallel_jobs, Path(config.run_dir) / "logs")
    else:
        for jobs in chains.values():
            run_jobs(jobs)
    if "report" in config.stages:
        run_jobs([("report", config.report)])
    return {
        "run_dir": str(Path(config.run_dir).resolve()),
        "wall_time_s": round(time.perf_counter() - started, 1),
        "peak_memory_mb": peak_memory_mb(),
    }


def shared_jobs(config: RunConfig) -> list[Job]:
    """What all arms and seeds build on, and no more than the arms need."""
    arms = [ARMS[arm] for arm in config.arms]
    jobs: list[Job] = [("ingest", config.ingest)]
    if config.videos.num_episodes:
        jobs.append(("demos", config.videos))
    quantizer = config.train_quantizer
    if config.demos_as_video:
        # The probes are of the videos alone, and such a mixture has none.
        data = replace(quantizer.data, path=None, mixture=with_demos(config, quantizer.data.path))
        quantizer = replace(quantizer, data=data, probe_data=None)
    jobs += [("demos", config.demos), ("train_quantizer", quantizer)]
    sources = {arm.labels or "" for arm in arms if arm.predict == "latent"}
    if "shuffled" in sources:
        sources.add("quantizer")
    for source in sorted(sources):  # the quantizer's come before those that shuffle them
        label = replace(config.label, source=source, output_dir=labels_of(config.label.output_dir, source))
        if source == "actions":
            label.action_data = config.pretrain.action_data
        if source == "shuffled":
            label.labels = config.label.output_dir
        jobs.append(("label", label))
        if config.demos_as_video:
            jobs.append(("label", of_demos(config, label)))
    is_vpt_in, is_unipi_in = any(arm.labels == "inverse" for arm in arms), any(arm.predict == "frame" for arm in arms)
    if is_vpt_in or is_unipi_in:
        jobs.append(("train_inverse", config.train_inverse))
    if is_vpt_in:
        jobs.append(("label_actions", config.label_actions))
    pretrain = config.pretrain
    is_pretrained_grounded = pretrain.grounding == config.ground.output_dir and any(arm.predict for arm in arms)
    if is_pretrained_grounded or any(arm.is_grounded for arm in arms):
        ground = replace(
            config.ground, text=pretrain.text, width=pretrain.backbone.width, image_size=pretrain.image_size
        )
        if config.demos_as_video:
            ground = replace(ground, data=None, mixture=with_demos(config, ground.data))
        jobs.append(("ground", ground))
    return chosen(config, jobs)


def chains_of(config: RunConfig) -> dict[str, list[Job]]:
    """Pretraining, finetuning and evaluation of every arm and seed, by name; none needs another."""
    chains = {}
    for seed in config.seeds:
        for arm in config.arms:
            name = f"{arm}-seed{seed}"
            jobs = pretrain_jobs(config, arm, seed)
            jobs.append(finetune_job(config, arm, seed, jobs[0][1].output_dir if jobs else None))
            policy = jobs[-1][1].output_dir
            # One split lies in the folder itself, several in a folder each.
            for split in config.evaluate_splits or [config.evaluate.split]:
                place = f"{split}/{name}" if config.evaluate_splits else name
                folder = f"{config.evaluate.output_dir}/{place}"
                jobs.append(("evaluate", replace(config.evaluate, split=split, policy=policy, output_dir=folder)))
            chains[name] = chosen(config, jobs)
    return chains


def finetune_job(config: RunConfig, arm: str, seed: int, pretrained: str | None) -> Job:
    """The arm's way from what it was pretrained to, to a policy."""
    output_dir = f"{config.finetune.output_dir}/{arm}-seed{seed}"
    training = replace(config.finetune.training, seed=seed)
    if ARMS[arm].predict == "frame":
        if config.finetune.data is None or pretrained is None:
            raise ValueError(f"the {arm} arm finetunes on a single data set: set finetune.data, not finetune.mixture")
        return "finetune_unipi", replace(
            config.finetune_unipi,
            data=config.finetune.data,
            pretrained=pretrained,
            random_shift_pixels=config.finetune.random_shift_pixels,
            num_action_steps=config.finetune.num_action_steps,
            pretrained_learning_rate_ratio=config.finetune.pretrained_learning_rate_ratio,
            output_dir=output_dir,
            training=training,
        )
    if ARMS[arm].adds_pretraining:
        samples = config.pretrain.training.num_steps * config.pretrain.training.batch_size
        training = replace(training, num_steps=training.num_steps + round(samples / training.batch_size))
    return "finetune", replace(
        config.finetune,
        backbone=config.pretrain.backbone,
        image_tokenizer=config.pretrain.image_tokenizer,
        image_size=config.pretrain.image_size,
        text=config.pretrain.text,
        pretrained=pretrained,
        grounding=config.ground.output_dir if ARMS[arm].is_grounded else None,
        output_dir=output_dir,
        training=training,
    )


def pretrain_jobs(config: RunConfig, arm: str, seed: int) -> list[Job]:
    """The arm's pretraining; none for an arm without."""
    predict, source = ARMS[arm].predict, ARMS[arm].labels
    if predict is None:
        return []
    folder = config.pretrain.output_dir
    if source == "inverse" and Path(folder).is_relative_to(config.video_dir):
        # The inverse model comes of this run's demonstrations, and so does what is pretrained on its labels.
        folder = str(Path(config.run_dir) / Path(folder).relative_to(config.video_dir))
    pretrain = replace(
        config.pretrain,
        predict=predict,
        labels=labels_of(config.pretrain.labels or config.label.output_dir, source) if predict == "latent" else None,
        action_labels=config.label_actions.output_dir if source == "inverse" else None,
        output_dir=f"{folder}/{arm}-seed{seed}",
        training=replace(config.pretrain.training, seed=seed),
    )
    if source in ("true", "actions") and config.pretrain.action_data is None:
        raise ValueError(f"the {arm} arm needs pretrain.action_data=<the same episodes with actions>")
    if source == "true":
        pretrain = replace(pretrain, data=config.pretrain.action_data)
    if config.demos_as_video:
        # Arms that learn actions know those of the demonstrations.
        labels = pretrain.labels or pretrain.action_labels
        demo_labels = f"{labels}{DEMOS}" if predict == "latent" else None
        parts = with_demos(config, pretrain.data, labels, demo_labels)
        pretrain = replace(pretrain, data=None, labels=None, action_labels=None, mixture=parts)
    return [("pretrain", pretrain)]


def with_demos(
    config: RunConfig, videos: str | None, labels: str | None = None, demo_labels: str | None = None
) -> list[MixturePart]:
    """The videos and, for a share of every batch, the demonstrations."""
    if videos is None or config.finetune.data is None:
        raise ValueError("demos_as_video mixes one data set of videos with one of demonstrations: give no mixture")
    share = config.demos_as_video
    return [MixturePart(videos, 1 - share, labels), MixturePart(config.finetune.data, share, demo_labels)]


def of_demos(config: RunConfig, label: LabelConfig) -> LabelConfig:
    """The same labels for the demonstrations: shuffled among themselves, clusters being those of the videos."""
    demos = with_demos(config, label.data)[1].path
    labels = None
    if label.source == "shuffled":
        labels = f"{label.labels}{DEMOS}"
    elif label.source != "quantizer":
        labels = label.output_dir
    action_data = demos if label.source == "actions" else None
    return replace(label, data=demos, labels=labels, action_data=action_data, output_dir=f"{label.output_dir}{DEMOS}")


def labels_of(folder: str, source: str | None) -> str:
    """The quantizer's labels lie in `folder`, those of another source beside it."""
    return folder if source == "quantizer" else f"{folder}-{source}"


def chosen(config: RunConfig, jobs: list[Job]) -> list[Job]:
    """The jobs whose stage was asked for, each with the run's runtime."""
    runtime = config.runtime
    if config.parallel_jobs > 1 and not runtime.num_threads:
        runtime = replace(runtime, num_threads=max(1, available_cores() // config.parallel_jobs))
    return [
        (verb, replace(options, runtime=runtime) if hasattr(options, "runtime") else options)
        for verb, options in jobs
        if STAGE_OF.get(verb, verb) in config.stages
    ]


def run_jobs(jobs: list[Job]) -> None:
    """One after the other, in this process."""
    for verb, options in jobs:
        print(f"\n== {verb} {getattr(options, 'output_dir', '')}".rstrip(), flush=True)
        run_stage(verb, options)
        gc.collect()


def run_in_parallel(chains: dict[str, list[Job]], num_processes: int, folder: Path) -> None:
    """Each chain in a process of its own, `num_processes` at a time; what they print goes to <folder>/<chain>.log.

    A chain begins when those before it are done in whose folders it reads, and the first that can begin does. One that
    fails stops none but those that need it. Raises ValueError at the end, with what they said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, done, failures = needs_of(chains), set[str](), dict[str, str]()
    # spawn: a forked process would share this one's graphics context and threads.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(num_processes, max(1, len(chains))), context, end_with_parent) as pool,
        tqdm(total=len(chains), desc="shared stages, then arms and seeds", unit="chain") as bar,
    ):
        at_work: dict[Future, str] = {}
        while True:
            # A queue in the pool would put what comes free late, and much waits for, behind what came free early.
            for name in [name for name, needed in waiting.items() if needed <= done][: num_processes - len(at_work)]:
                at_work[pool.submit(run_chain, chains[name], folder / f"{name}.log")] = name
                del waiting[name]
            if not at_work:
                break
            for job in wait(at_work, return_when=FIRST_COMPLETED).done:
                name, message = at_work.pop(job), job.result()
                if message is None:
                    done.add(name)
                else:
                    failures[name] = message
                bar.update()
    for name, needed in waiting.items():
        failures[name] = f"not begun, needs {', '.join(sorted(needed - done))}"
    if failures:
        told = "\n".join(f"  {name}: {message}" for name, message in sorted(failures.items()))
        raise ValueError(
            f"{len(failures)} of {len(chains)} chains failed; the same command runs them again, and {folder} holds "
            f"what they printed:\n{told}"
        )


def needs_of(chains: dict[str, list[Job]]) -> dict[str, set[str]]:
    """Of each chain the names of those before it whose output folder its options name, or something in it."""
    needs: dict[str, set[str]] = {}
    for name, jobs in chains.items():
        places = [Path(text) for _, options in jobs for text in texts_of(asdict(options))]
        needs[name] = {
            other
            for other in needs
            for _, options in chains[other]
            if any(place.is_relative_to(options.output_dir) for place in places)
        }
    return needs


def texts_of(options: Any) -> Iterator[str]:
    """Every text in nested options."""
    if isinstance(options, str):
        yield options
    elif isinstance(options, dict | list):
        for value in options.values() if isinstance(options, dict) else options:
            yield from texts_of(value)


def run_chain(jobs: list[Job], log: Path) -> str | None:
    """In a process of `run_in_parallel`: what went wrong, or None."""
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            run_jobs(jobs)
        except Exception as error:  # the other chains go on, whatever it was
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return None


def end_with_parent() -> None:
    """In a process of the pool: end when the run is killed, which else leaves it waiting for work forever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
