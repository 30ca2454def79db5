"""Stage `hindsight`: instructions for trajectories that came without, and the choice of which to learn from.

Instruction back-and-forth translation (arXiv 2408.04614) for robots. A few labelled pairs train a backward and a
forward model (`hindsight_models.py`); the backward model writes an instruction for every unlabelled trajectory, the
forward model scores the pair from 1 to 5, and trajectories are rewritten, to be verified by `lapa replay`.

Arms, all of the same number of episodes:
    random      random instruction, any trajectory
    unfiltered  hindsight instruction, any trajectory
    filter      hindsight instruction, the best scores
    rewrite     hindsight instruction, any trajectory, rewritten
    both        hindsight instruction, the best scores, rewritten
    distil      hindsight instruction, any start, and the forward model acts
    truth       true instruction, any trajectory: the ceiling of labelling

output_dir/
    backward/, forward/     policy folders
    arms/<arm>/demos/       LeRobotDataset v3: random, unfiltered, filter, truth
    proposals/<arm>.jsonl   for `lapa replay output_dir=.../arms/<arm>`: rewrite, both, distil
    labels.csv              an episode a row: instruction, margin, score, what was picked
    results.json            scores, and the labels' accuracy by arm where the truth is known
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lapa.checkpoint import load_config, write_json, write_tensors
from lapa.data import FrameStore, action_chunks, open_frames
from lapa.runtime import Compute, setup
from lapa.schema import HindsightConfig
from policies import finetune
from policies.hindsight_arms import relabel, slot_accuracy, write_proposals
from policies.hindsight_edit import candidates, typical_step
from policies.hindsight_models import (
    Likelihood,
    backward_losses,
    displacements_to_end,
    distractors,
    fit_sharpness,
    forward_losses,
    log_posterior,
    sample_nucleus,
    scores_of,
    write_hindsight_store,
)

RELABELLED = ("random", "unfiltered", "filter", "truth")
PROPOSED = ("rewrite", "both", "distil")
ARMS = RELABELLED + PROPOSED
BEST = ("filter", "both")
SAMPLE_STREAM, DISTRACTOR_STREAM, PICK_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Labels:
    """What is believed of every unlabelled episode, (E,) each."""

    instructions: list[str]
    margins: np.ndarray
    scores: np.ndarray  # 1 to 5


def run(cfg: HindsightConfig) -> dict:
    """Label, score and pick; goes on where a killed run stopped.

    Returns num_episodes an arm, the mean score of the play and of what filtering keeps, and where the truth is known
    the accuracy of the labels by arm.

    Raises:
        ValueError: for unknown arms, too few episodes, or data without actions.
    """
    check(cfg)
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    pretrained = cfg.finetune.pretrained
    image_size = load_config(pretrained, made_by="pretrain")["image_size"] if pretrained else cfg.finetune.image_size
    labelled = open_frames(cfg.labelled, image_size, cfg.cache_dir)
    play = open_frames(cfg.data, image_size, cfg.cache_dir)
    truths = read_truths(cfg, play.num_episodes)
    num_held_out = round(cfg.holdout_share * labelled.num_episodes)
    if not 2 <= num_held_out < labelled.num_episodes:
        raise ValueError(
            f"{cfg.labelled} has {labelled.num_episodes} episodes, of which holdout_share={cfg.holdout_share} leaves "
            f"{num_held_out} to calibrate on: expected at least 2, and some to train on"
        )
    num_trained = labelled.num_episodes - num_held_out
    if not all(labelled.instructions):
        raise ValueError(f"some episodes of {cfg.labelled} have no instruction: these pairs are what is learned from")
    if play.skipped:
        raise ValueError(f"{len(play.skipped)} episodes of {cfg.data} cannot be decoded, first {play.skipped[0]}")

    instructions = backward(cfg, labelled, play, num_trained, output_dir, compute)
    margins, calibration = forward(cfg, labelled, play, instructions, num_trained, output_dir, compute)
    labels = Labels(instructions, margins, scores_of(margins, calibration))
    picked = pick_episodes(labels, cfg)
    arms = label_arms(labels, picked, truths, cfg)
    write_arms(cfg, arms, play, output_dir)
    write_labels(output_dir / "labels.csv", labels, picked, truths)
    best = labels.scores[picked["filter"]]
    results: dict = {
        "num_play": play.num_episodes,
        "num_episodes": len(best),
        "score_mean": float(labels.scores.mean()),
        "score_mean_filter": float(best.mean()),
        "share_of_best_scores": float((labels.scores == 5).mean()),
        "score_counts": {str(score): int((labels.scores == score).sum()) for score in range(1, 6)},
    }
    if truths:
        results["label_accuracy"] = {
            arm: slot_accuracy(list(of_arm.values()), [truths[episode] for episode in of_arm], cfg.slots)
            for arm, of_arm in arms.items()
            if arm != "distil"  # it does not do what the episode did
        }
        results["label_accuracy_by_score"] = {
            str(score): slot_accuracy(
                [labels.instructions[i] for i in np.flatnonzero(labels.scores == score)],
                [truths[i] for i in np.flatnonzero(labels.scores == score)],
                cfg.slots,
            )
            for score in range(1, 6)
        }
    write_json(output_dir / "results.json", results)
    headline = {name: value for name, value in results.items() if not isinstance(value, dict)}
    for arm, accuracy in results.get("label_accuracy", {}).items():
        headline[f"label_accuracy_{arm}"] = accuracy.get("all_slots", float("nan"))
    return headline


def check(cfg: HindsightConfig) -> None:
    unknown = sorted(set(cfg.arms) - set(ARMS))
    if unknown or not cfg.arms:
        raise ValueError(f"arms is {list(cfg.arms)}, expected some of {list(ARMS)}")
    for name in ("keep_share", "holdout_share", "top_p"):
        if not 0 < getattr(cfg, name) <= 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected more than 0 and at most 1")
    for name in ("num_backward_frames", "num_forward_frames", "num_distractors", "temperature"):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected more than 0")
    if cfg.finetune.use_state:
        raise ValueError("finetune.use_state is true, but labels come from what is seen: set finetune.use_state=false")


def read_truths(cfg: HindsightConfig, num_episodes: int) -> list[str] | None:
    """The true instruction of every episode of play, where they are known."""
    if cfg.truth is None:
        return None
    lines = Path(cfg.truth).expanduser().read_text(encoding="utf-8").splitlines()
    truths = [json.loads(line)["instruction"] for line in lines]
    if len(truths) != num_episodes:
        raise ValueError(f"{cfg.truth} has {len(truths)} lines, {cfg.data} has {num_episodes} episodes")
    return truths


def train(cfg: HindsightConfig, name: str, data: str, num_episodes: int, output_dir: Path, **changes) -> Path:
    """Finetune one of the two models on the first labelled episodes; returns its folder."""
    folder = output_dir / name
    if not (folder / "config.json").is_file():
        finetune.run(
            replace(
                cfg.finetune,
                data=data,
                output_dir=str(folder),
                num_episodes=num_episodes,
                cache_dir=cfg.cache_dir,
                runtime=cfg.runtime,
                **changes,
            )
        )
    return folder


def backward(
    cfg: HindsightConfig, labelled: FrameStore, play: FrameStore, num_trained: int, output_dir: Path, compute: Compute
) -> list[str]:
    """An instruction for every episode of play, sampled from p(instruction | trajectory)."""
    store = output_dir / "backward_data"
    if not (output_dir / "backward" / "config.json").is_file():
        write_hindsight_store(labelled, store)
    folder = train(cfg, "backward", str(store), num_trained, output_dir, chunk_size=1, num_action_steps=1)
    counts = Counter(labelled.instructions)
    known = sorted(counts)
    log_prior_I = np.log(np.array([counts[text] for text in known]) / counts.total())
    model = Likelihood(folder, compute)

    def losses(store: FrameStore, episodes: range, name: str) -> np.ndarray:
        to_end = displacements_to_end(store)
        return remembered(
            output_dir / f"{name}.safetensors",
            episodes,
            lambda episode: backward_losses(model, store, to_end, episode, known, cfg.num_backward_frames),
        )

    held_out = range(num_trained, labelled.num_episodes)
    true_E = np.array([known.index(labelled.instructions[episode]) for episode in held_out])
    sharpness = fit_sharpness(losses(labelled, held_out, "backward_losses_held_out"), log_prior_I, true_E)
    losses_EI = losses(play, range(play.num_episodes), "backward_losses")
    log_p_EI = log_posterior(losses_EI, log_prior_I, sharpness)
    rng = np.random.default_rng([cfg.seed, SAMPLE_STREAM])
    return [known[sample_nucleus(log_p_I, cfg.temperature, cfg.top_p, rng)] for log_p_I in log_p_EI]


def forward(
    cfg: HindsightConfig,
    labelled: FrameStore,
    play: FrameStore,
    instructions: list[str],
    num_trained: int,
    output_dir: Path,
    compute: Compute,
) -> tuple[np.ndarray, np.ndarray]:
    """Margins of the play's instructions over distractors (E,), and of held-out labelled pairs: by how much better
    the forward model explains the actions."""
    model = Likelihood(train(cfg, "forward", cfg.labelled, num_trained, output_dir), compute)

    def margins(store: FrameStore, texts: list[str], episodes: range, name: str) -> np.ndarray:
        chunks = action_chunks(store, model.chunk_size)

        def margin(episode: int) -> np.ndarray:
            rng = np.random.default_rng([cfg.seed, DISTRACTOR_STREAM, episode])
            own = texts[episode]
            others = distractors(own, texts, cfg.num_distractors, rng)
            losses_I = forward_losses(model, store, chunks, episode, [own, *others], cfg.num_forward_frames)
            return np.array([losses_I[1:].mean() - losses_I[0] if others else 0.0])

        return remembered(output_dir / f"{name}.safetensors", episodes, margin)[:, 0]

    held_out = range(num_trained, labelled.num_episodes)
    calibration = margins(labelled, labelled.instructions, held_out, "margins_held_out")
    return margins(play, instructions, range(play.num_episodes), "margins"), calibration


def remembered(path: Path, episodes: range, compute_row: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rows (E, ...) of every episode, from `path` where a run before this one has written them."""
    if not path.is_file():
        rows = [compute_row(episode) for episode in tqdm(episodes, desc=path.stem, unit="episode", mininterval=1.0)]
        write_tensors(path, {"rows": torch.from_numpy(np.stack(rows).astype(np.float64))})
    return load_file(path)["rows"].numpy()


def pick_episodes(labels: Labels, cfg: HindsightConfig) -> dict[str, np.ndarray]:
    """Episodes an arm, in order and equally many: the best by score and then by margin, or the same random ones."""
    count = max(1, round(cfg.keep_share * len(labels.margins)))
    best = np.sort(np.lexsort((-labels.margins, -labels.scores))[:count])
    rng = np.random.default_rng([cfg.seed, PICK_STREAM])
    some = np.sort(rng.permutation(len(labels.margins))[:count])
    return {arm: best if arm in BEST else some for arm in ARMS}


def label_arms(
    labels: Labels, picked: dict[str, np.ndarray], truths: list[str] | None, cfg: HindsightConfig
) -> dict[str, dict[int, str]]:
    """By arm, the instruction of every episode that it holds."""
    rng = np.random.default_rng([cfg.seed, PICK_STREAM, 1])
    arms = {}
    for arm in cfg.arms:
        texts = labels.instructions
        if arm == "random":
            texts = [labels.instructions[i] for i in rng.permutation(len(texts))]
        elif arm == "truth":
            if truths is None:
                continue
            texts = truths
        arms[arm] = {int(episode): texts[episode] for episode in picked[arm]}
    return arms


def write_arms(cfg: HindsightConfig, arms: dict[str, dict[int, str]], play: FrameStore, output_dir: Path) -> None:
    assert play.actions is not None
    step_m = typical_step(play.actions, cfg.edit.idle_m)
    (output_dir / "proposals").mkdir(parents=True, exist_ok=True)
    for arm, labels in arms.items():
        if arm in RELABELLED:
            folder = output_dir / "arms" / arm / "demos"
            if not folder.is_dir():
                relabel(Path(cfg.data).expanduser(), labels, folder)
            continue
        edits = None
        if arm != "distil":
            edits = {
                episode: candidates(
                    play.actions[play.episode_offsets[episode] : play.episode_offsets[episode + 1]],
                    cfg.edit.smooth_m,
                    cfg.edit.idle_m,
                    cfg.edit.revisit_m,
                    step_m,
                )
                for episode in labels
            }
        write_proposals(output_dir / "proposals" / f"{arm}.jsonl", labels, edits)


def write_labels(path: Path, labels: Labels, picked: dict[str, np.ndarray], truths: list[str] | None) -> None:
    best, some = set(picked["filter"].tolist()), set(picked["unfiltered"].tolist())
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["episode", "instruction", "margin", "score", "best", "random_pick", "truth"])
        for episode, text in enumerate(labels.instructions):
            margin, score = f"{labels.margins[episode]:.5f}", int(labels.scores[episode])
            truth = truths[episode] if truths else ""
            writer.writerow([episode, text, margin, score, int(episode in best), int(episode in some), truth])
    temporary.replace(path)
