"""Stage `ground`: the image tokenizer and the text encoder learn from video what an instruction is about.

Writes config.json, model.safetensors, log.jsonl, metrics.json and images/changes.png: frames, what is expected to
leave its cell by the end and next, what does, and where keypoints will look for the object; with test_data the same of
another data set, as test_* and images/test_changes.png.
"""

import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapa import distributed
from lapa.checkpoint import save_model, write_json
from lapa.data import FrameStore, open_frames
from lapa.latent_vla.grounding import MAPS, GroundingModel, targets
from lapa.latent_vla.inputs import (
    CURVE_EVERY_LOGS,
    EVALUATION_BATCH,
    MAX_EVALUATION_FRAMES,
    NUM_CURVE_FRAMES,
    Inputs,
)
from lapa.latent_vla.objectives import NUM_PICTURED_FRAMES
from lapa.latent_vla.vision import BODY_SHARE, FEATURE_STRIDE, GROUNDED_GAIN
from lapa.mixture import open_mixture
from lapa.runtime import Compute, setup
from lapa.schema import GroundConfig
from lapa.trainer import finish, fit


def run(cfg: GroundConfig) -> dict:
    """Train and measure; returns the numbers of metrics.json."""
    compute = setup(cfg.runtime)
    if cfg.text.name == "huggingface":
        raise ValueError("text=huggingface is part of its backbone, and comes grounded: leave `lapa ground` out")
    if cfg.image_size % (2 * FEATURE_STRIDE):
        raise ValueError(f"image_size is {cfg.image_size}, expected a multiple of {2 * FEATURE_STRIDE}")
    mixture = open_mixture(cfg.data, cfg.mixture, cfg.image_size, cfg.cache_dir)
    store, training, output_dir = mixture.store, cfg.training, Path(cfg.output_dir)
    train_episodes, held_out_episodes = mixture.split(cfg.holdout_fraction, training.seed)
    torch.manual_seed(training.seed)
    model = GroundingModel(cfg.text, cfg.width)
    model.text_encoder.fit([store.instructions[episode] for episode in train_episodes], training.seed)
    of_frame = store.episode_of_frame()
    train_frames, held_out_frames = (np.flatnonzero(np.isin(of_frame, e)) for e in (train_episodes, held_out_episodes))
    held_out_frames = np.random.default_rng(0).permutation(held_out_frames)[:MAX_EVALUATION_FRAMES]
    choose = mixture.sampler(train_frames)
    inputs = inputs_of(store, model, cfg.next_s, compute)

    def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
        frames = train_frames[choose(rng, training.batch_size)][distributed.shard(training.batch_size)]
        return inputs.read(frames, cfg.random_shift_pixels, distributed.own_generator(rng))

    def loss(batch: tuple[Tensor, Tensor, np.ndarray]) -> tuple[Tensor, dict]:
        images_B9HW, ids_BW, _ = batch
        left_B2P, counts_B2 = targets(images_B9HW, cfg.full_change)
        entropy_B2 = cross_entropy(model(images_B9HW[:, :3], ids_BW), left_B2P)
        return (entropy_B2 * counts_B2).sum() / counts_B2.sum(), {}

    fit(
        model,
        make_batch,
        loss,
        training,
        compute,
        output_dir,
        description="ground",
        evaluate=lambda: measure(model, inputs, held_out_frames[:NUM_CURVE_FRAMES], cfg.full_change, compute),
        evaluate_every_steps=CURVE_EVERY_LOGS * training.log_every_steps,
    )
    if not distributed.is_main():
        return {}
    numbers = measure(model, inputs, held_out_frames, cfg.full_change, compute)
    images = output_dir / "images"
    draw(model, inputs, held_out_frames[:NUM_PICTURED_FRAMES], cfg.full_change, compute, images / "changes.png")
    if cfg.test_data is not None:
        test = inputs_of(open_frames(cfg.test_data, cfg.image_size, cfg.cache_dir), model, cfg.next_s, compute)
        frames = np.random.default_rng(0).permutation(test.store.num_frames)[:MAX_EVALUATION_FRAMES]
        numbers |= measure(model, test, frames, cfg.full_change, compute, "test")
        draw(model, test, frames[:NUM_PICTURED_FRAMES], cfg.full_change, compute, images / "test_changes.png")
    write_json(
        output_dir / "metrics.json",
        {"num_train_frames": len(train_frames), "num_held_out_frames": len(held_out_frames), **numbers},
    )
    config = {"text": asdict(cfg.text), "width": cfg.width, "image_size": cfg.image_size, "maps": list(MAPS)}
    save_model(output_dir, model.state_dict(), config)
    finish(output_dir)
    return numbers


def inputs_of(store: FrameStore, model: GroundingModel, next_s: float, compute: Compute) -> Inputs:
    """Every frame, behind it its clip's last one, and the one `next_s` ahead: the last, where the clip ends before."""
    episode_N = store.episode_of_frame()
    last_N = np.asarray(store.episode_offsets)[1:][episode_N] - 1
    fps_E = np.full(store.num_episodes, store.fps) if store.episode_fps is None else store.episode_fps
    gap_E = np.maximum(1, np.round(next_s * fps_E)).astype(np.int64)
    next_N = np.minimum(np.arange(store.num_frames) + gap_E[episode_N], last_N)
    return Inputs(store, model.text_encoder.encode_text(store.instructions), compute.device, [last_N, next_N])


def cross_entropy(logits_B2P: Tensor, left_B2P: Tensor) -> Tensor:
    """(B, 2): of each map, in nats a cell."""
    return F.binary_cross_entropy_with_logits(logits_B2P.float(), left_B2P, reduction="none").mean(-1)


@torch.no_grad()
def measure(
    model: GroundingModel,
    inputs: Inputs,
    frames: np.ndarray,
    full_change: float,
    compute: Compute,
    prefix: str = "held_out",
) -> dict[str, float]:
    """Cross-entropy a cell in nats; the same with another frame's instruction; and its least, that of the targets.

    The second minus the first is what the instruction tells. Means over the maps that a frame teaches.
    """
    names = [f"{prefix}_{name}" for name in ("cross_entropy", "with_other_instructions", "least")]
    sums, count = dict.fromkeys(names, 0.0), 0.0
    for start in range(0, len(frames), EVALUATION_BATCH):
        images_B9HW, ids_BW, _ = inputs.read(frames[start : start + EVALUATION_BATCH])
        present_BCHW, (left_B2P, counts_B2) = images_B9HW[:, :3], targets(images_B9HW, full_change)
        with compute.autocast():
            own_B2P, other_B2P = model(present_BCHW, ids_BW), model(present_BCHW, ids_BW.roll(1, 0))
        least_B2 = (torch.special.entr(left_B2P) + torch.special.entr(1 - left_B2P)).mean(-1)
        count += float(counts_B2.sum())
        values = (cross_entropy(own_B2P, left_B2P), cross_entropy(other_B2P, left_B2P), least_B2)
        for name, value_B2 in zip(names, values, strict=True):
            sums[name] += float((value_B2 * counts_B2).sum())
    return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def draw(
    model: GroundingModel, inputs: Inputs, frames: np.ndarray, full_change: float, compute: Compute, path: Path
) -> None:
    """Write a picture with a column a frame."""
    from matplotlib.figure import Figure

    images_B9HW, ids_BW, _ = inputs.read(frames)
    with compute.autocast():
        logits_B2P = model(images_B9HW[:, :3], ids_BW).float()
    side = images_B9HW.shape[-1] // FEATURE_STRIDE
    left_B2P, _ = targets(images_B9HW, full_change)
    maps = {}
    for index, name in enumerate(MAPS):
        maps[f"expected: {name}"], maps[name] = logits_B2P[:, index].sigmoid(), left_B2P[:, index]
    object_BP = (GROUNDED_GAIN * (logits_B2P[:, 0] - BODY_SHARE * logits_B2P[:, 1])).softmax(-1)
    maps["keypoints look for the object"] = object_BP / object_BP.amax(-1, keepdim=True)
    rows = len(maps) + 1
    figure = Figure(figsize=(2.2 * len(frames), 2.2 * rows))
    axes = figure.subplots(rows, len(frames), squeeze=False)
    for column, frame in enumerate(frames):
        axes[0, column].imshow(images_B9HW[column, :3].permute(1, 2, 0).cpu().numpy())
        instruction = inputs.store.instructions[inputs.episode_of_frame[frame]]
        axes[0, column].set_title(textwrap.fill(instruction, 24), fontsize=7)
        for row, (name, map_BP) in enumerate(maps.items(), start=1):
            axes[row, column].imshow(map_BP[column].view(side, side).cpu().numpy(), vmin=0, vmax=1)
            if column == 0:
                axes[row, column].set_title(name, fontsize=7, loc="left")
    for each in axes.flat:
        each.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
