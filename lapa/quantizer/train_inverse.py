"""`lapa train_inverse`: a few demonstrations teach which actions lie between two frames.

Writes config.json, model.safetensors, log.jsonl and metrics.json: how well the actions are told in demonstrations that
were held out and, with `test_data`, in other episodes whose true actions are known. Nothing is chosen by either.
"""

from pathlib import Path

import numpy as np
import torch

from lapa import distributed
from lapa.checkpoint import save_model, write_json
from lapa.data import FramePairs, FrameStore, frame_gap, open_frames, split_episodes, to_float
from lapa.quantizer.inverse import InverseDynamicsModel, build_inverse
from lapa.runtime import Compute, setup
from lapa.schema import TrainInverseConfig
from lapa.trainer import finish, fit

EVALUATION_BATCH = 256


def run(cfg: TrainInverseConfig) -> dict:
    """Train and measure; returns the numbers of metrics.json."""
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    store = open_with_actions(cfg.data, cfg.image_size, cfg.cache_dir)
    gap = frame_gap(store, cfg.frame_gap_s, cfg.frame_gap_frames)
    if gap.of_episode is not None:
        raise ValueError(f"the episodes of {cfg.data} have different frame rates: state frame_gap_frames instead")
    train_episodes, held_out_episodes = split_episodes(store, cfg.holdout_fraction, cfg.training.seed)
    train_pairs = FramePairs(store, gap, train_episodes)
    actions = between(train_pairs, np.arange(len(train_pairs)))
    mean, std = actions.mean((0, 1)), np.maximum(actions.std((0, 1)), 1e-6)

    torch.manual_seed(cfg.training.seed)
    config = {
        "image_size": cfg.image_size,
        "width": cfg.width,
        "num_keypoints": cfg.num_keypoints,
        "frame_gap_frames": int(gap),
        "action_dim": actions.shape[-1],
        "fps": store.fps,
        "data_fingerprint": store.fingerprint,
    }
    model = build_inverse(config)
    model.mean_A.copy_(torch.from_numpy(mean))
    model.std_A.copy_(torch.from_numpy(std))

    def make_batch(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        batch_size = cfg.training.batch_size
        indices = rng.integers(len(train_pairs), size=batch_size)[distributed.shard(batch_size)]
        frames_B2 = shift_pairs(train_pairs.frames(indices), cfg.random_shift_pixels, distributed.own_generator(rng))
        return to_float(frames_B2, compute.device), torch.from_numpy(actions[indices]).to(compute.device)

    fit(
        model,
        make_batch,
        lambda batch: model.loss(*batch),
        cfg.training,
        compute,
        output_dir,
        description="train inverse model",
    )
    if not distributed.is_main():
        return {}
    numbers: dict[str, float] = {"num_train_pairs": len(train_pairs)}
    if len(held_out_episodes):
        pairs = FramePairs(store, gap, held_out_episodes)
        numbers |= accuracy(model, pairs, mean, cfg.num_test_pairs, compute, "held_out")
    if cfg.test_data is not None:
        other = open_with_actions(cfg.test_data, cfg.image_size, cfg.cache_dir)
        require_rate(other, config)
        pairs = FramePairs(other, int(gap), np.arange(other.num_episodes))
        numbers |= accuracy(model, pairs, mean, cfg.num_test_pairs, compute, "test")
    write_json(output_dir / "metrics.json", numbers)
    save_model(output_dir, model.state_dict(), config)
    finish(output_dir)
    return numbers


def open_with_actions(path: str, image_size: int, cache_dir: str | None) -> FrameStore:
    """The store at `path`; ValueError where it has no actions."""
    store = open_frames(path, image_size, cache_dir)
    if store.actions is None:
        raise ValueError(f"{path} has no actions: an inverse model learns from, and is measured on, true ones")
    return store


def require_rate(store: FrameStore, config: dict) -> None:
    """ValueError where a frame of the store lasts longer or shorter than one that the model was trained on."""
    rates = {store.fps} if store.episode_fps is None else set(store.episode_fps.tolist())
    if rates != {config["fps"]}:
        raise ValueError(
            f"{store.folder} has {sorted(rates)} frames/s, the inverse model was trained at {config['fps']}: an action "
            "lasts one frame; for `lapa label_actions` state frame_gap_frames, its gap in these data"
        )


def between(pairs: FramePairs, indices: np.ndarray) -> np.ndarray:
    """The actions (B, G, A) executed between the two frames of each pair; all pairs have one gap."""
    assert pairs.store.actions is not None
    return pairs.store.actions[pairs.first_frames[indices, None] + np.arange(pairs.gap)]


def shift_pairs(frames_B2HWC: np.ndarray, pixels: int, generator: np.random.Generator) -> np.ndarray:
    """Both frames of a pair moved alike by up to `pixels` along both axes; the border repeats."""
    if pixels == 0:
        return frames_B2HWC
    height, width = frames_B2HWC.shape[2:4]
    padded = np.pad(frames_B2HWC, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    tops, lefts = generator.integers(0, 2 * pixels + 1, (2, len(padded)))
    return np.stack([pair[:, y : y + height, x : x + width] for pair, y, x in zip(padded, tops, lefts, strict=True)])


@torch.no_grad()
def accuracy(
    model: InverseDynamicsModel,
    pairs: FramePairs,
    mean_A: np.ndarray,
    num_pairs: int,
    compute: Compute,
    name: str,
) -> dict[str, float]:
    """R², L1 in the data's units and cosine of all actions between the frames, beside those of the mean action.

    R² is the share of the variance of these actions that is told; the mean action is that of the training data.
    """
    indices = np.random.default_rng(0).permutation(len(pairs))[:num_pairs]
    model.eval()
    parts = []
    for start in range(0, len(indices), EVALUATION_BATCH):
        frames_B2CHW = to_float(pairs.frames(indices[start : start + EVALUATION_BATCH]), compute.device)
        with compute.autocast():
            parts.append(model.actions(frames_B2CHW).cpu())
    predicted_PA = torch.cat(parts).flatten(0, 1)
    true_PA = torch.from_numpy(between(pairs, indices)).flatten(0, 1)
    guess_PA = torch.from_numpy(mean_A).expand_as(true_PA)
    spread = (true_PA - true_PA.mean(0)).square().sum()
    cosine = torch.nn.functional.cosine_similarity
    return {
        f"{name}_num_pairs": len(indices),
        f"{name}_r2": float(1 - (predicted_PA - true_PA).square().sum() / spread.clamp(min=1e-12)),
        f"{name}_l1": float((predicted_PA - true_PA).abs().mean()),
        f"{name}_cosine": float(cosine(predicted_PA, true_PA, dim=-1).mean()),
        f"{name}_mean_action_l1": float((guess_PA - true_PA).abs().mean()),
        f"{name}_mean_action_cosine": float(cosine(guess_PA, true_PA, dim=-1).mean()),
    }
