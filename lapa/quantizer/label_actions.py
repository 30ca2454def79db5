"""`lapa label_actions`: an inverse model writes the actions that it believes were executed in a video (VPT).

A frame lies between the frames of up to as many pairs as the gap has frames; its action is the mean of what they say.
Frames after which no pair ends in their episode have no action. Where the data have another frame rate, an action of
the model lasts several frames, or less than one, and keeps its size. A folder holds

    actions.json          inverse model's config.json, store fingerprint, counts
    actions.safetensors   action (N, A) float32, zero where unknown; is_known (N,) bool
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lapa.checkpoint import load_config, read_json, write_json, write_tensors
from lapa.data import FramePairs, FrameStore, open_frames, to_float
from lapa.quantizer.inverse import load_inverse
from lapa.quantizer.train_inverse import require_rate
from lapa.runtime import setup
from lapa.schema import LabelActionsConfig

ACTIONS_FILE = "actions.safetensors"


def run(cfg: LabelActionsConfig) -> dict:
    """Label every frame that some pair spans; returns how many, and how the actions spread."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(cfg.inverse, "train_inverse")
    model = load_inverse(cfg.inverse).to(compute.device)
    store = open_frames(cfg.data, config["image_size"], cfg.cache_dir)
    model_gap, gap = config["frame_gap_frames"], cfg.frame_gap_frames
    if gap is None:
        require_rate(store, config)
        gap = model_gap
    pairs = FramePairs(store, gap, np.arange(store.num_episodes))
    sums, counts = np.zeros((store.num_frames, config["action_dim"])), np.zeros(store.num_frames, np.int64)
    with torch.inference_mode(), tqdm(total=len(pairs), desc="label", unit="pair", mininterval=1.0) as progress:
        for start in range(0, len(pairs), cfg.batch_size):
            indices = np.arange(start, min(start + cfg.batch_size, len(pairs)))
            with compute.autocast():
                actions_BGA = model.actions(to_float(pairs.frames(indices), compute.device)).cpu().numpy()
            for step in range(gap):
                sums[pairs.first_frames[indices] + step] += actions_BGA[:, step * model_gap // gap]
                counts[pairs.first_frames[indices] + step] += 1
            progress.update(len(indices))
    is_known = counts > 0
    actions = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    write_tensors(
        output_dir / ACTIONS_FILE, {"action": torch.from_numpy(actions), "is_known": torch.from_numpy(is_known)}
    )
    write_json(
        output_dir / "actions.json",
        {
            "inverse": config,
            "store_fingerprint": store.fingerprint,
            "num_frames": store.num_frames,
            "num_known": int(is_known.sum()),
        },
    )
    return {
        "num_labels": int(is_known.sum()),
        "share_known": float(is_known.mean()),
        "mean_standard_deviation": float(actions[is_known].std(0).mean()),
    }


def load_action_labels(folder: str | Path, store: FrameStore) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, A) and which are known (N,); ValueError where there are none, or they are of other frames."""
    folder = Path(folder)
    if not (folder / "actions.json").is_file():
        raise ValueError(f"no actions.json in {folder}: expected a folder written by `lapa label_actions`")
    meta = read_json(folder / "actions.json")
    if meta["store_fingerprint"] != store.fingerprint:
        raise ValueError(
            f"the actions in {folder} belong to a data set of {meta['num_frames']} frames, not to the "
            f"{store.num_frames} in {store.folder}: run `lapa label_actions` on these data"
        )
    tensors = load_file(folder / ACTIONS_FILE)
    return tensors["action"].numpy(), tensors["is_known"].numpy()
