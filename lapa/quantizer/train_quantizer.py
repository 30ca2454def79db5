"""`lapa train_quantizer`: frame pairs to latent actions that explain the change between them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lapa.checkpoint import save_model, write_json
from lapa.data import FramePairs, FrameStore, frame_gap, open_frames, split_episodes, to_float
from lapa.quantizer.base import build_quantizer
from lapa.quantizer.evaluation import check_gate, evaluate
from lapa.quantizer.gallery import write_gallery
from lapa.runtime import setup
from lapa.schema import TrainQuantizerConfig
from lapa.trainer import finish, fit


def run(cfg: TrainQuantizerConfig) -> dict:
    """Train, measure on held-out episodes, check the gate, draw the gallery; returns the headline metrics."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    data = cfg.data
    store = open_frames(data.path, cfg.model.image_size, data.cache_dir)
    gap = frame_gap(store, data.frame_gap_s, data.frame_gap_frames)
    train_episodes, held_out_episodes = split_episodes(
        store, data.holdout_fraction, data.holdout_seed, data.holdout_sources
    )
    # The actions, where there are any, reach nothing but the probes of `evaluate`.
    store = _with_probe_actions(store, cfg)
    train_pairs = FramePairs(store, gap, train_episodes)
    pairs = FramePairs(store, gap, held_out_episodes)

    torch.manual_seed(cfg.training.seed)
    model = build_quantizer(cfg.model, cfg.codebook)
    batch_size, pair_loss = cfg.training.batch_size, compute.maybe_compile(model.loss)

    def make_batch(generator: np.random.Generator) -> torch.Tensor:
        return to_float(train_pairs.frames(generator.integers(len(train_pairs), size=batch_size)), compute.device)

    def loss_function(frames: torch.Tensor):
        return pair_loss(frames, cfg.motion_weight)

    fit(model, make_batch, loss_function, cfg.training, compute, output_dir, "train quantizer")

    config = model.description() | {
        "image_size": cfg.model.image_size,
        "frame_gap_frames": gap,
        "frame_gap_s": gap / store.fps,
        "fps": store.fps,
        "data_fingerprint": store.fingerprint,
        "holdout_episodes": held_out_episodes.tolist(),
        "motion_weight": cfg.motion_weight,
    }
    save_model(output_dir, model.state_dict(), config)
    metrics, encoded = evaluate(model, train_pairs, pairs, cfg.num_eval_pairs, cfg.training.seed, compute)
    gate = check_gate(metrics, cfg.gate)
    write_json(output_dir / "metrics.json", metrics | {"gate": gate})
    displacements = pairs.displacements(encoded.indices) if store.actions is not None else None
    write_gallery(output_dir / "images", model, pairs, encoded, compute, displacements)
    finish(output_dir)
    return headline(metrics) | {"gate_passed": gate["passed"]}


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers that a reader looks for first."""
    names = ("linear_probe_r2", "delta_psnr_db", "psnr_over_copy_db", "perplexity_ratio", "vocabulary_utilisation")
    return {name: metrics[name] for name in names if name in metrics}


def _with_probe_actions(store: FrameStore, cfg: TrainQuantizerConfig) -> FrameStore:
    """`store` with the actions of `probe_data`, where that is named."""
    if cfg.probe_data is None:
        return store
    probe_store = open_frames(cfg.probe_data, cfg.model.image_size, cfg.data.cache_dir)
    if probe_store.actions is None:
        raise ValueError(f"probe_data {cfg.probe_data} has no actions: name a data set with actions, or null")
    if not np.array_equal(probe_store.episode_offsets, store.episode_offsets):
        raise ValueError(
            f"probe_data {cfg.probe_data} has {probe_store.num_episodes} episodes of other lengths than the "
            f"{store.num_episodes} of data.path: expected the same episodes with actions"
        )
    return replace(store, actions=probe_store.actions)
