"""Stage `pretrain`: the trunk learns to predict what happens next, as latent actions or as true actions.

predict=latent reads the labels of `lapa label` (arXiv 2410.11758). predict=action reads the data set's own
actions: ActionVLA, the upper bound of what the videos could teach; with action_labels those of an inverse model that
knows the demonstrations alone: VPT (arXiv 2206.11795). With future_frame.weight the future frame is
denoised too, in the same sequence (lapa/latent_vla/transfusion.py). predict=frame denoises the future frame alone: the
planner of UniPi (lapa/latent_vla/planner.py).

Writes config.json, model.safetensors, log.jsonl, metrics.json and, of a tokenizer of keypoints, images/keypoints.png:
where they look in held-out frames; of a model that denoises also images/future_frames.png.
"""

import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lapa import distributed
from lapa.backbones.upcycle import initial_state
from lapa.checkpoint import save_model, write_json
from lapa.latent_vla.grounding import grounded_prefixes, start_grounded
from lapa.latent_vla.inputs import (
    CURVE_EVERY_LOGS,
    EVALUATION_BATCH,
    MAX_EVALUATION_FRAMES,
    NUM_CURVE_FRAMES,
    Inputs,
)
from lapa.latent_vla.model import VisionLanguageTrunk, build_trunk
from lapa.latent_vla.objectives import NUM_PICTURED_FRAMES, Objective, build_objective
from lapa.latent_vla.vision import NUM_GROUNDED_KEYPOINTS, KeypointTokenizer
from lapa.mixture import open_mixture
from lapa.runtime import Compute, setup
from lapa.schema import PretrainConfig
from lapa.trainer import finish, fit

NUM_IMAGINED_FRAMES = 128  # held-out frames whose future is sampled


def run(cfg: PretrainConfig) -> dict:
    """Pretrain and return held-out numbers; ValueError for labels that do not fit or failed their gate."""
    compute = setup(cfg.runtime)
    mixture = open_mixture(cfg.data, cfg.mixture, cfg.image_size, cfg.cache_dir)
    store = mixture.store
    train_episodes, held_out_episodes = mixture.split(cfg.holdout_fraction, cfg.training.seed)
    in_training = np.isin(store.episode_of_frame(), train_episodes)
    torch.manual_seed(cfg.training.seed)
    trunk = build_trunk(cfg.backbone, cfg.text, cfg.image_tokenizer, cfg.image_size)
    if cfg.grounding is not None:
        start_grounded(trunk, cfg.grounding, cfg.text)
    else:
        trunk.text_encoder.fit([store.instructions[episode] for episode in train_episodes], cfg.training.seed)
    objective = build_objective(cfg, mixture, trunk, in_training, compute.device)
    if cfg.init_from is not None:
        start_from(cfg.init_from, cfg, objective.model)
    train_frames = np.flatnonzero(in_training & objective.is_usable)
    held_out_frames = np.flatnonzero(np.isin(store.episode_of_frame(), held_out_episodes) & objective.is_usable)
    if not len(train_frames) or not len(held_out_frames):
        raise ValueError(
            f"{len(train_frames)} frames to train on and {len(held_out_frames)} held out have a target: "
            "use a larger data set or another holdout_fraction"
        )
    held_out_frames = np.random.default_rng(0).permutation(held_out_frames)[:MAX_EVALUATION_FRAMES]

    grounded = [] if cfg.grounding is None else grounded_prefixes(objective.model, trunk)
    output_dir, training = Path(cfg.output_dir), cfg.training
    draw = mixture.sampler(train_frames)
    futures = [] if objective.future_N is None else [objective.future_N]
    inputs = Inputs(store, trunk.encode_text(store.instructions), compute.device, futures)
    if compute.compile:
        trunk.compile()

    def make_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
        frames = train_frames[draw(rng, training.batch_size)][distributed.shard(training.batch_size)]
        return inputs.read(frames, cfg.random_shift_pixels, distributed.own_generator(rng))

    def held_out_numbers(frames: np.ndarray) -> dict[str, float]:
        return evaluate(objective, inputs, frames, compute)

    fit(
        objective.model,
        make_batch,
        lambda batch: objective.loss(*batch),
        training,
        compute,
        output_dir,
        description=f"pretrain on {cfg.predict}s",
        evaluate=lambda: {f"held_out_{k}": v for k, v in held_out_numbers(held_out_frames[:NUM_CURVE_FRAMES]).items()},
        evaluate_every_steps=CURVE_EVERY_LOGS * training.log_every_steps,
        warmup_steps=dict.fromkeys(grounded, cfg.grounding_warmup_steps),
    )
    if not distributed.is_main():
        return {}
    numbers = held_out_numbers(held_out_frames) | objective.baseline
    if objective.imagine is not None:
        with compute.autocast():
            batch = inputs.read(held_out_frames[:NUM_IMAGINED_FRAMES])
            numbers |= objective.imagine(*batch, output_dir / "images")
    draw_keypoints(trunk, inputs, held_out_frames[:NUM_PICTURED_FRAMES], compute, output_dir / "images")
    write_json(
        output_dir / "metrics.json",
        {
            "target": cfg.predict,
            "num_train_frames": len(train_frames),
            "num_held_out_frames": len(held_out_frames),
            "num_instructions_cut": trunk.text_encoder.count_longer(store.instructions),
            "num_parameters": sum(p.numel() for p in objective.model.parameters()),
            **numbers,
        },
    )
    config = {
        "target": cfg.predict,
        # As built: a model of transformers then needs its folder no more.
        "backbone": asdict(trunk.backbone.config),
        "text": asdict(cfg.text),
        "image_tokenizer": cfg.image_tokenizer,
        "image_size": cfg.image_size,
        "future_frame": asdict(cfg.future_frame),
        **objective.config,
    }
    save_model(output_dir, objective.model.state_dict(), config)
    finish(output_dir)
    return numbers


def start_from(folder: str, cfg: PretrainConfig, model: nn.Module) -> None:
    """Give the model the weights of another pretraining; ValueError where they are of another model."""
    try:
        model.load_state_dict(initial_state(folder, cfg.backbone, cfg.training.seed))
    except RuntimeError as error:
        raise ValueError(
            f"init_from={folder} is of another model than these options describe; only the backbone may differ: {error}"
        ) from None


@torch.no_grad()
def evaluate(objective: Objective, inputs: Inputs, frames: np.ndarray, compute: Compute) -> dict[str, float]:
    """Means over the frames of what `objective.evaluate` sums, and what is derived from them."""
    sums: dict[str, float] = {}
    for start in range(0, len(frames), EVALUATION_BATCH):
        with compute.autocast():
            batch_sums = objective.evaluate(*inputs.read(frames[start : start + EVALUATION_BATCH]))
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    means = {name: value / len(frames) for name, value in sums.items()}
    return means | objective.derive(means)


@torch.no_grad()
def draw_keypoints(
    trunk: VisionLanguageTrunk, inputs: Inputs, frames: np.ndarray, compute: Compute, folder: Path
) -> None:
    """Write keypoints.png, numbered on a column a frame; nothing for tokenizers without keypoints.

    Circles are those that `lapa ground` begins, if there is a grounding: the first half of them on the body, the others
    on the named object.
    """
    from matplotlib.figure import Figure

    tokenizer = trunk.image_tokenizer
    if not isinstance(tokenizer, KeypointTokenizer):
        return
    images_BCHW, ids_BW, _ = inputs.read(frames)
    images_B3HW = images_BCHW[:, :3]
    with compute.autocast():
        xy_BI2 = tokenizer.places(images_B3HW, trunk.text_encoder(ids_BW).summary_BD)
    pixels_BI2 = ((xy_BI2 + 1) / 2 * images_B3HW.shape[-1] - 0.5).cpu()
    figure = Figure(figsize=(2.4 * len(frames), 3.0))
    for column, (image_3HW, pixels_I2, frame) in enumerate(zip(images_B3HW.cpu(), pixels_BI2, frames, strict=True)):
        axes = figure.add_subplot(1, len(frames), column + 1)
        axes.imshow(image_3HW.permute(1, 2, 0).numpy())
        for keypoint, (x, y) in enumerate(pixels_I2.tolist()):
            marker = "o" if keypoint < NUM_GROUNDED_KEYPOINTS else "x"
            axes.plot(x, y, marker, color=f"C{keypoint % 10}", markersize=5, markerfacecolor="none")
            axes.annotate(str(keypoint), (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
        instruction = inputs.store.instructions[inputs.episode_of_frame[frame]]
        axes.set_title(textwrap.fill(instruction, 26), fontsize=7)
        axes.axis("off")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "keypoints.png", dpi=110, bbox_inches="tight")
