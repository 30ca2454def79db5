"""`lapa train_quantizer`: frame pairs to latent actions that explain the change between them."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from lapa import distributed
from lapa.checkpoint import save_model
from lapa.data import FramePairs, frame_gap
from lapa.mixture import Mixture, open_mixture
from lapa.quantizer.base import build_quantizer
from lapa.quantizer.evaluate_quantizer import measure, with_probe_data
from lapa.quantizer.evaluation import quantizer_digest
from lapa.quantizer.targets.batches import PairSampler
from lapa.quantizer.targets.objective import build_objective
from lapa.runtime import setup
from lapa.schema import TrainQuantizerConfig
from lapa.trainer import finish, fit


def run(cfg: TrainQuantizerConfig) -> dict:
    """Train, measure on held-out episodes, check the gate, draw the gallery; returns the headline metrics."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    data = cfg.data
    mixture = open_mixture(data.path, data.mixture, cfg.model.image_size, data.cache_dir, "data.path")
    store = mixture.store
    gap = frame_gap(store, data.frame_gap_s, data.frame_gap_frames)
    train_episodes, held_out_episodes = mixture.split(data.holdout_fraction, data.holdout_seed, data.holdout_sources)
    if not len(held_out_episodes):
        raise ValueError("data.holdout_fraction is 0: metrics and gate need held-out episodes, such as 0.1 of them")
    # Actions reach the probes of `evaluate` and, for the episodes that `grounding` names, the sampler; nothing else.
    store = with_probe_data(store, cfg.probe_data, data.cache_dir)
    train_pairs = FramePairs(store, gap, train_episodes)
    pairs = FramePairs(store, gap, held_out_episodes)

    torch.manual_seed(cfg.training.seed)
    # First of all weights: the same quantizer comes out of this seed whatever is trained around it.
    model = build_quantizer(cfg.model, cfg.codebook)
    sampler = PairSampler(train_pairs, cfg, compute.device, mixture.sampler(train_pairs.first_frames))
    objective = build_objective(cfg, model, sampler)
    fit(objective, sampler, compute.maybe_compile(objective), cfg.training, compute, output_dir, "train quantizer")
    objective.finish()
    if not distributed.is_main():
        return {}

    config = model.description() | {
        "image_size": cfg.model.image_size,
        "frame_gap_frames": gap,
        "frame_gap_s": data.frame_gap_s if data.frame_gap_frames is None else gap / store.fps,
        "is_gap_in_frames": data.frame_gap_frames is not None,
        "fps": store.fps,
        "data_fingerprint": store.fingerprint,
        "holdout_episodes": held_out_episodes.tolist(),
        "mixture": splits_by_data_set(mixture, held_out_episodes),
        "target": asdict(cfg.target),
        "language": asdict(cfg.language),
        "proprioception": asdict(cfg.proprioception),
        "grounding": asdict(cfg.grounding),
    }
    # A verdict on other weights must not outlive them, whenever this process is killed.
    (output_dir / "metrics.json").unlink(missing_ok=True)
    save_model(output_dir, model.state_dict(), config)
    # Drawn by the holdout's seed, so that runs of every training seed are measured on the same pairs.
    results = measure(
        output_dir,
        model,
        quantizer_digest(output_dir),
        train_pairs,
        pairs,
        cfg.num_eval_pairs,
        data.holdout_seed,
        cfg.gate,
        compute,
    )
    finish(output_dir)
    return results


def splits_by_data_set(mixture: Mixture, held_out_episodes: np.ndarray) -> list[dict]:
    """What was held out of each data set, so that `lapa evaluate_quantizer` knows it again; nothing of a single one."""
    if len(mixture.parts) == 1:
        return []
    splits, first = [], 0
    for part, store in zip(mixture.parts, mixture.stores, strict=True):
        own = held_out_episodes - first
        own = own[(own >= 0) & (own < store.num_episodes)]
        splits.append(
            {
                "path": part.path,
                "weight": part.weight,
                "data_fingerprint": store.fingerprint,
                "holdout_episodes": own.tolist(),
            }
        )
        first += store.num_episodes
    return splits
