"""`lapa label`: the trained quantizer writes a latent action for every frame of a data set.

The labels at frame t come from the pair (t, t + gap); frames whose partner lies beyond the end of their
episode are marked invalid. A label folder holds

    labels.json          the quantizer's config.json, sizes, store fingerprint, gate result, histogram
    labels.safetensors   latent_action (N, L) int64 (zero where invalid), is_valid (N,) bool
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lapa.checkpoint import load_config, read_json, write_json, write_tensors
from lapa.data import FramePairs, FrameStore, frame_gap, open_frames, to_float
from lapa.metrics import code_usage
from lapa.quantizer.base import load_quantizer
from lapa.runtime import setup
from lapa.schema import LabelConfig

LABELS_FILE = "labels.safetensors"


@dataclass(frozen=True)
class Labels:
    """latent_action (N, L) int64 and is_valid (N,) bool for the N frames of a store."""

    latent_action: np.ndarray
    is_valid: np.ndarray
    code_length: int
    codebook_size: int
    frame_gap_frames: int
    frame_gap_s: float
    gate: dict  # {"passed": bool, "reasons": [str]}
    quantizer: dict  # the quantizer's config.json


def run(cfg: LabelConfig) -> dict:
    """Label every frame; returns how many, and how evenly the codes are used."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(cfg.quantizer, "train_quantizer")
    metrics_file = Path(cfg.quantizer) / "metrics.json"
    if not metrics_file.is_file():
        raise ValueError(f"no metrics.json in {cfg.quantizer}: run `lapa train_quantizer` there to its end")
    model = load_quantizer(cfg.quantizer).to(compute.device)
    store = open_frames(cfg.data, config["image_size"], cfg.cache_dir)
    # The gap is a time: another data set at another frame rate has another gap in frames.
    gap = config["frame_gap_frames"] if store.fps == config["fps"] else frame_gap(store, config["frame_gap_s"], None)
    pairs = FramePairs(store, gap, np.arange(store.num_episodes))

    code_length, codebook_size = config["codebook"]["code_length"], config["codebook"]["codebook_size"]
    latent_action = np.zeros((store.num_frames, code_length), np.int64)
    is_valid = np.zeros(store.num_frames, bool)
    with torch.inference_mode(), tqdm(total=len(pairs), desc="label", unit="pair", mininterval=1.0) as progress:
        for start in range(0, len(pairs), cfg.batch_size):
            indices = np.arange(start, min(start + cfg.batch_size, len(pairs)))
            frames = to_float(pairs.frames(indices), compute.device)
            with compute.autocast():
                codes_BL, _ = model.encode(frames)
            latent_action[pairs.first_frames[indices]] = codes_BL.cpu().numpy()
            progress.update(len(indices))
    is_valid[pairs.first_frames] = True

    codes = latent_action[is_valid]
    write_tensors(
        output_dir / LABELS_FILE,
        {"latent_action": torch.from_numpy(latent_action), "is_valid": torch.from_numpy(is_valid)},
    )
    histogram = [np.bincount(token, minlength=codebook_size).tolist() for token in codes.T]
    write_json(
        output_dir / "labels.json",
        {
            "quantizer": config,
            "gate": read_json(metrics_file)["gate"],
            "code_length": code_length,
            "codebook_size": codebook_size,
            "frame_gap_frames": gap,
            "frame_gap_s": gap / store.fps,
            "store_fingerprint": store.fingerprint,
            "num_frames": store.num_frames,
            "num_valid": int(is_valid.sum()),
            "histogram": histogram,
        },
    )
    usage = code_usage(codes, codebook_size)
    return {"num_labels": int(is_valid.sum()), "share_valid": float(is_valid.mean())} | {
        name: usage[name] for name in ("perplexity", "perplexity_ratio", "vocabulary_utilisation")
    }


def load_labels(folder: str | Path, store: FrameStore) -> Labels:
    """The labels in `folder`; ValueError where there are none, or they were made from other frames."""
    folder = Path(folder)
    if not (folder / "labels.json").is_file():
        raise ValueError(f"no labels.json in {folder}: expected a folder written by `lapa label`")
    meta = read_json(folder / "labels.json")
    if meta["store_fingerprint"] != store.fingerprint:
        raise ValueError(
            f"the labels in {folder} belong to a data set of {meta['num_frames']} frames (fingerprint "
            f"{meta['store_fingerprint']}), the data in {store.folder} have {store.num_frames} (fingerprint "
            f"{store.fingerprint}): run `lapa label` on these data"
        )
    tensors = load_file(folder / LABELS_FILE)
    return Labels(
        latent_action=tensors["latent_action"].numpy(),
        is_valid=tensors["is_valid"].numpy(),
        code_length=meta["code_length"],
        codebook_size=meta["codebook_size"],
        frame_gap_frames=meta["frame_gap_frames"],
        frame_gap_s=meta["frame_gap_s"],
        gate=meta["gate"],
        quantizer=meta["quantizer"],
    )
