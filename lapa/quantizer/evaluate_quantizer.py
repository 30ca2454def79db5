"""`lapa evaluate_quantizer`: what a quantizer shows on a data set, with intervals, pictures and the gate.

An evaluation folder holds

    metrics.json    every metric with its interval, the gate's verdict, and which weights they belong to
    codes.csv       a row a latent action: how often it is used, mean and deviation of what was executed meanwhile
    images/         gallery, transfer, reconstructions, usage, arrows

`lapa train_quantizer` ends with the same on its held-out episodes, in its own folder.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from lapa.checkpoint import load_config, write_json
from lapa.data import FramePairs, FrameStore, open_frames
from lapa.quantizer.base import LatentActionQuantizer, load_quantizer, quantizer_pairs
from lapa.quantizer.evaluation import check_gate, evaluate, headline, quantizer_digest
from lapa.quantizer.gallery import write_gallery
from lapa.quantizer.latent_actions import LatentActions, code_statistics
from lapa.runtime import Compute, setup
from lapa.schema import EvaluateQuantizerConfig, QuantizerGate

MOST_REENCODED = 8.0  # grey levels by which another encoding of the same frames may differ on average


def run(cfg: EvaluateQuantizerConfig) -> dict:
    """Evaluate a quantizer folder on a data set; returns the headline metrics and whether the gate passed."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(cfg.quantizer, "train_quantizer")
    model = load_quantizer(cfg.quantizer).to(compute.device)
    store = open_frames(cfg.data, config["image_size"], cfg.cache_dir)
    store = with_probe_data(store, cfg.probe_data, cfg.cache_dir)
    fitted_on, measured_on = choose_episodes(store, config, cfg.episodes, cfg.seed)
    train_pairs, pairs = quantizer_pairs(store, config, fitted_on), quantizer_pairs(store, config, measured_on)
    other_pairs = None
    if cfg.data2 is not None:
        other = open_frames(cfg.data2, config["image_size"], cfg.cache_dir)
        other_pairs = quantizer_pairs(other, config, np.arange(other.num_episodes))
    trained_on_these = cfg.episodes == "all" and held_out_in_training(store, config) is not None
    return measure(
        output_dir,
        model,
        quantizer_digest(cfg.quantizer),
        train_pairs,
        pairs,
        cfg.num_pairs,
        cfg.seed,
        cfg.gate,
        compute,
        other_pairs,
        is_held_out=not trained_on_these,
    )


def measure(
    output_dir: Path,
    model: LatentActionQuantizer,
    digest: str,
    train_pairs: FramePairs,
    pairs: FramePairs,
    num_pairs: int,
    seed: int,
    gate: QuantizerGate,
    compute: Compute,
    other_pairs: FramePairs | None = None,
    is_held_out: bool = True,
) -> dict:
    """Write metrics.json, codes.csv and images/ into `output_dir`; returns the headline.

    Args:
        digest: `quantizer_digest` of the model's folder.
        train_pairs: what probes are fitted on. pairs: what everything is measured on.
        other_pairs: of another data set, whose scenes latent actions of `pairs` are applied to.
        is_held_out: whether training never saw `pairs`; `lapa label` takes no gate from others.
    """
    metrics, encoded = evaluate(model, train_pairs, pairs, num_pairs, seed, compute, other_pairs)
    verdict = check_gate(metrics, gate)
    displacements = pairs.displacements(encoded.indices) if pairs.store.actions is not None else None
    if model.codebook.is_discrete:
        write_codes(output_dir / "codes.csv", encoded, displacements)
    write_gallery(output_dir / "images", model, pairs, encoded, compute, displacements, other_pairs)
    about = {"gate": verdict, "quantizer_digest": digest, "is_held_out": is_held_out}
    write_json(output_dir / "metrics.json", metrics | about)
    return headline(metrics) | {"gate_passed": verdict["passed"]}


def held_out_in_training(store: FrameStore, config: dict) -> list[int] | None:
    """The episodes of these data that training held out; None where it never saw these data."""
    for trained_on in (config, *config.get("mixture", [])):
        if trained_on.get("data_fingerprint") == store.fingerprint:
            return trained_on["holdout_episodes"]
    return None


def choose_episodes(store: FrameStore, config: dict, episodes: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Episodes that probes are fitted on, and those that everything is measured on.

    held_out: on the training data, what training held out; other data the quantizer never saw, nor do probes need
    more than half of them. all: whatever the quantizer was trained on.
    """
    if episodes not in ("held_out", "all"):
        raise ValueError(f"episodes is {episodes!r}, expected held_out or all")
    everything = np.arange(store.num_episodes)
    held_out = held_out_in_training(store, config)
    if episodes == "held_out" and held_out:
        return np.setdiff1d(everything, held_out), np.array(held_out)
    if store.actions is None:
        return everything, everything
    if store.num_episodes < 2:
        raise ValueError(
            f"{store.folder} has {store.num_episodes} episode: the probes of actions are fitted on one half of the "
            "episodes and measured on the other, so at least 2 are needed"
        )
    order = np.random.default_rng(seed).permutation(store.num_episodes)
    half = store.num_episodes // 2
    return np.sort(order[:half]), np.sort(order[half:])


def with_probe_data(store: FrameStore, probe_data: str | None, cache_dir: str | None) -> FrameStore:
    """`store` with the actions and states of the same episodes in `probe_data`, where that is named."""
    if probe_data is None:
        return store
    probe_store = open_frames(probe_data, store.image_size, cache_dir)
    if probe_store.actions is None:
        raise ValueError(f"probe_data {probe_data} has no actions: name a data set with actions, or null")
    if not np.array_equal(probe_store.episode_offsets, store.episode_offsets):
        raise ValueError(
            f"probe_data {probe_data} has {probe_store.num_episodes} episodes of other lengths than the "
            f"{store.num_episodes} of the data: expected the same episodes with actions"
        )
    picks = np.linspace(0, store.num_frames - 1, min(64, store.num_frames)).astype(int)
    difference = np.abs(store.frames[picks].astype(np.int16) - probe_store.frames[picks]).mean()
    if difference > MOST_REENCODED:
        raise ValueError(
            f"probe_data {probe_data} shows other frames than the data (mean difference {difference:.0f} of 255): "
            "expected the same episodes with actions, in the same order"
        )
    states = store.states if probe_store.states is None else probe_store.states
    return replace(store, actions=probe_store.actions, states=states)


def write_codes(path: Path, encoded: LatentActions, displacements: np.ndarray | None) -> None:
    """`code_statistics` as a table, a latent action a row."""
    rows = code_statistics(encoded, displacements)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
