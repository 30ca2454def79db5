"""What a trunk is pretrained on: latent actions (codes or numbers), true or pseudo actions, or the frame a gap ahead.

Each function reads its targets, builds the model and says how it is trained, measured and described in config.json;
`build_objective` chooses one, the stage `pretrain` runs it.

Shapes: N frames of the data, B batch, T steps of a chunk, L codes of a latent action, K codebook size, A actions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lapa.data import FramePairs, FrameStore, action_chunks, frame_gap
from lapa.latent_vla.heads import UNKNOWN, BinnedActionHead, DenoisingActionHead, build_action_head
from lapa.latent_vla.model import ActionModel, ContinuousLatentModel, LatentActionModel, VisionLanguageTrunk
from lapa.latent_vla.planner import FramePlanner
from lapa.latent_vla.transfusion import TransfusionModel
from lapa.metrics import psnr_db
from lapa.mixture import Mixture
from lapa.quantizer.base import quantizer_pairs
from lapa.quantizer.evaluation import require_gate
from lapa.quantizer.label import Labels, join_labels, load_labels
from lapa.quantizer.label_actions import load_action_labels
from lapa.schema import FutureFrame, PretrainConfig

NUM_PICTURED_FRAMES = 8


@dataclass(frozen=True)
class Objective:
    """What the trunk is trained on.

    model: trunk and head. is_usable (N,): frames with a target. loss: of (images, text ids, frame indices).
    evaluate: the same inputs, to sums over the batch by name. baseline: what a guess without looking gets.
    config: what config.json says beside the trunk. derive: further numbers from the means of what `evaluate` sums.
    future_N: the frame that images hold behind each frame, as channels 3 to 5; None: images are single frames.
    imagine: of a few of the same inputs and a folder for pictures: numbers of sampled future frames.
    """

    model: nn.Module
    is_usable: np.ndarray
    loss: Callable[[Tensor, Tensor, np.ndarray], tuple[Tensor, dict[str, Tensor]]]
    evaluate: Callable[[Tensor, Tensor, np.ndarray], dict[str, Tensor]]
    baseline: dict[str, float]
    config: dict[str, Any]
    derive: Callable[[dict[str, float]], dict[str, float]] = lambda means: {}
    future_N: np.ndarray | None = None
    imagine: Callable[[Tensor, Tensor, np.ndarray, Path], dict[str, float]] | None = None


def build_objective(
    cfg: PretrainConfig, mixture: Mixture, trunk: VisionLanguageTrunk, in_training: np.ndarray, device: torch.device
) -> Objective:
    """What `predict` names, for the frames (N,) of which some are `in_training`."""
    if cfg.predict == "latent":
        return latent_objective(cfg, mixture, trunk, in_training, device)
    if cfg.predict == "action":
        if cfg.future_frame.weight:
            raise ValueError("future_frame.weight needs predict=latent: the frame follows latent action tokens")
        return action_objective(cfg, mixture, trunk, in_training, device)
    if cfg.predict == "frame":
        return frame_objective(cfg, mixture.store, trunk, device)
    raise ValueError(f"predict is {cfg.predict!r}, expected latent, action or frame")


def latent_objective(
    cfg: PretrainConfig, mixture: Mixture, trunk: VisionLanguageTrunk, in_training: np.ndarray, device: torch.device
) -> Objective:
    """Latent actions, from the labels of these very data sets."""
    if cfg.mixture and cfg.labels is not None:
        raise ValueError(f"labels={cfg.labels} beside a mixture: name them in it, {{path: ..., labels: ...}}")
    store, of_parts = mixture.store, []
    for part, own_store in zip(mixture.parts, mixture.stores, strict=True):
        folder = part.labels if cfg.mixture else cfg.labels
        if folder is None:
            raise ValueError(f"predict=latent needs labels=<folder written by `lapa label`> of {part.path}")
        of_parts.append(load_labels(folder, own_store))
        if not cfg.ignore_gate:
            require_gate(of_parts[-1].gate, folder)
    labels = join_labels(of_parts)
    if labels.is_discrete:
        future_N = frames_ahead(labels, store)
        latent_NTL = torch.from_numpy(latent_chunks(labels, future_N, cfg.latent_chunk_size)).to(device)
        objective = code_objective(labels, latent_NTL, cfg.future_frame, trunk, in_training)
        return with_future_frame(objective, latent_NTL, future_N) if cfg.future_frame.weight else objective
    if cfg.future_frame.weight:
        raise ValueError("future_frame.weight needs labels that are codes: label with a discrete codebook, or set it 0")
    if cfg.latent_chunk_size != 1:
        raise ValueError(
            f"latent_chunk_size is {cfg.latent_chunk_size}, and the labels are numbers: chunks are of codes; "
            "label with a discrete codebook, or set it 1"
        )
    return number_objective(labels, trunk, in_training, device)


def frames_ahead(labels: Labels, store: FrameStore) -> np.ndarray:
    """(N,): the frame that the quantizer saw beside each one; the frame itself where the episode ends before."""
    episodes = np.arange(store.num_episodes)
    if store.episode_fps is None:
        pairs = FramePairs(store, labels.frame_gap_frames, episodes)
    else:
        pairs = quantizer_pairs(store, labels.quantizer, episodes)
    future_N = np.arange(store.num_frames)
    future_N[pairs.first_frames] += pairs.gaps
    return future_N


def latent_chunks(labels: Labels, future_N: np.ndarray, chunk_size: int) -> np.ndarray:
    """(N, T, L) int64: the latent action of each frame and of those that lie 1, 2, ... gaps ahead.

    UNKNOWN where the episode has ended, or the frame has no label.
    """
    if chunk_size < 1:
        raise ValueError(f"latent_chunk_size is {chunk_size}, expected at least 1")
    chunks_NTL = np.full((len(future_N), chunk_size, labels.num_codes), UNKNOWN, np.int64)
    frames_N, is_known_N = np.arange(len(future_N)), labels.is_valid
    for step in range(chunk_size):
        chunks_NTL[is_known_N, step] = labels.latent_action[frames_N[is_known_N]]
        has_next_N = future_N[frames_N] != frames_N
        frames_N = future_N[frames_N]
        is_known_N = is_known_N & has_next_N & labels.is_valid[frames_N]
    return chunks_NTL


def code_objective(
    labels: Labels,
    latent_NTL: Tensor,
    future_frame: FutureFrame,
    trunk: VisionLanguageTrunk,
    in_training: np.ndarray,
) -> Objective:
    """Chunks of latent action tokens, by cross-entropy."""
    largest = int(labels.latent_action.max())
    if largest >= labels.codebook_size:
        raise ValueError(
            f"codebook_size is {labels.codebook_size}, the labels of these data use code {largest}: "
            "run `lapa label` again"
        )
    chunk_size = latent_NTL.shape[1]
    model = LatentActionModel(trunk, labels.num_codes, labels.codebook_size, chunk_size)
    if future_frame.weight:
        model = TransfusionModel(trunk, labels.num_codes, labels.codebook_size, future_frame, chunk_size)

    def sums(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray) -> dict[str, Tensor]:
        target_BTL = latent_NTL[frames]
        target_BL = target_BTL[:, 0]
        hidden_BLD = model.hidden(images_BCHW, ids_BW, target_BL[:, :-1])
        logits_BLK = model.latent_head.logits(hidden_BLD).float()
        log_p_BLK = logits_BLK.log_softmax(-1)
        hit_BL = logits_BLK.argmax(-1) == target_BL
        greedy_BL = model.generate(images_BCHW, ids_BW)
        readout_BTL = model.latent_head.readout_cross_entropy(hidden_BLD[:, 0], target_BTL)
        later = {}
        for step in range(1, chunk_size):
            later[f"is_known_{step}_ahead"] = (target_BTL[:, step, 0] != UNKNOWN).sum()
            later[f"readout_cross_entropy_{step}_ahead"] = readout_BTL[:, step].mean(1).sum()
        return {
            "token_cross_entropy": -log_p_BLK.gather(-1, target_BL[..., None]).mean((1, 2)).sum(),
            "token_accuracy": hit_BL.float().mean(1).sum(),
            **{f"token_{i}_accuracy": hit_BL[:, i].sum() for i in range(labels.num_codes)},
            "joint_accuracy": (greedy_BL == target_BL).all(1).sum(),
            "readout_cross_entropy": readout_BTL[:, 0].mean(1).sum(),
            **later,
        }

    def derive(means: dict[str, float]) -> dict[str, float]:
        """Of the frames whose episode goes on so far."""
        own = {}
        for step in range(1, chunk_size):
            name = f"readout_cross_entropy_{step}_ahead"
            own[name] = means[name] / max(means[f"is_known_{step}_ahead"], 1e-9)
        return own

    return Objective(
        model=model,
        is_usable=labels.is_valid,
        loss=lambda images, ids, frames: model.loss(images, ids, latent_NTL[frames]),
        evaluate=sums,
        derive=derive,
        baseline=marginal_baseline(labels.latent_action[in_training & labels.is_valid], labels.codebook_size),
        config={
            "is_discrete": True,
            "num_codes": labels.num_codes,
            "codebook_size": labels.codebook_size,
            "latent_chunk_size": chunk_size,
        },
    )


def with_future_frame(objective: Objective, latent_NTL: Tensor, future_N: np.ndarray) -> Objective:
    """The same objective, and the frame that the quantizer saw beside each one is denoised after its latent action."""
    model = objective.model
    assert isinstance(model, TransfusionModel)

    def loss(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        return model.joint_loss(images_BCHW[:, :3], ids_BW, latent_NTL[frames], images_BCHW[:, 3:])

    def sums(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray) -> dict[str, Tensor]:
        present_BCHW, future_BCHW = images_BCHW[:, :3], images_BCHW[:, 3:]
        # The same noise whenever it is asked for, so that the curve shows the model alone.
        generator = torch.Generator().manual_seed(0)
        _, numbers = model.joint_loss(present_BCHW, ids_BW, latent_NTL[frames], future_BCHW, generator)
        own = {"future_frame_loss": numbers["future_frame_loss"] * len(frames)}
        return objective.evaluate(present_BCHW, ids_BW, frames) | own

    def imagine(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray, folder: Path) -> dict[str, float]:
        present_BCHW, future_BCHW = images_BCHW[:, :3], images_BCHW[:, 3:]
        shown = {
            "present": (model.frame.shrink(present_BCHW) + 1) / 2,
            "future": (model.frame.shrink(future_BCHW) + 1) / 2,
            "sampled after its latent action": model.imagine(present_BCHW, ids_BW, latent_NTL[frames, 0]),
            "sampled after the model's own": model.imagine(present_BCHW, ids_BW, model.generate(present_BCHW, ids_BW)),
        }
        draw_frames({name: images[:NUM_PICTURED_FRAMES] for name, images in shown.items()}, folder)
        copied, true, told, own = shown.values()
        return {
            f"future_frame_{name}_psnr_db": psnr_db(float((images - true).square().mean()))
            for name, images in (("copy", copied), ("told", told), ("own", own))
        }

    return replace(objective, loss=loss, evaluate=sums, imagine=imagine, future_N=future_N)


def frame_objective(
    cfg: PretrainConfig, store: FrameStore, trunk: VisionLanguageTrunk, device: torch.device
) -> Objective:
    """The frame a gap ahead, by diffusion alone."""
    model = FramePlanner(trunk, cfg.future_frame)
    gap = frame_gap(store, cfg.frame_gap_s, cfg.frame_gap_frames)
    pairs = FramePairs(store, gap, np.arange(store.num_episodes))
    is_usable, future_N = np.zeros(store.num_frames, bool), np.arange(store.num_frames)
    is_usable[pairs.first_frames] = True
    future_N[pairs.first_frames] += pairs.gaps

    def sums(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray) -> dict[str, Tensor]:
        # The same noise whenever it is asked for, so that the curve shows the model alone.
        loss, _ = model.loss(images_BCHW[:, :3], ids_BW, images_BCHW[:, 3:], torch.Generator().manual_seed(0))
        return {"future_frame_loss": loss * len(frames)}

    def imagine(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray, folder: Path) -> dict[str, float]:
        present_BCHW, true_BCHW = ((model.frame.shrink(part) + 1) / 2 for part in images_BCHW.split(3, dim=1))
        planned_BCHW = model.imagine(images_BCHW[:, :3], ids_BW)
        rows = {"present": present_BCHW, "future": true_BCHW, "planned": planned_BCHW}
        draw_frames({name: images[:NUM_PICTURED_FRAMES] for name, images in rows.items()}, folder)
        return {
            f"future_frame_{name}_psnr_db": psnr_db(float((images - true_BCHW).square().mean()))
            for name, images in (("copy", present_BCHW), ("planned", planned_BCHW))
        }

    return Objective(
        model=model,
        is_usable=is_usable,
        loss=lambda images, ids, frames: model.loss(images[:, :3], ids, images[:, 3:]),
        evaluate=sums,
        baseline={},
        config={"frame_gap_frames": int(gap)},
        future_N=future_N,
        imagine=imagine,
    )


def draw_frames(rows: dict[str, Tensor], folder: Path) -> None:
    """Write future_frames.png: a row of images (B, 3, S, S) in [0, 1] a name."""
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(columns, 1.2 * len(rows)))
    for row, (name, images_BCHW) in enumerate(rows.items()):
        for column, image_CHW in enumerate(images_BCHW.cpu()):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.imshow(image_CHW.permute(1, 2, 0).clamp(0, 1).numpy())
            axes.axis("off")
            if column == 0:
                axes.set_title(name, fontsize=7, loc="left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "future_frames.png", dpi=110, bbox_inches="tight")


def number_objective(
    labels: Labels, trunk: VisionLanguageTrunk, in_training: np.ndarray, device: torch.device
) -> Objective:
    """The numbers of a continuous latent action, normalised over the training frames, by regression."""
    known = labels.latent_action[in_training & labels.is_valid]
    if not len(known):
        raise ValueError("no frame to train on has a label: label this data set, or use a larger one")
    # A dimension that the quantizer does not use hardly varies: it stays as small as it is beside the others.
    mean, std = known.mean(0), np.maximum(known.std(0), 0.1 * known.std(0).max() + 1e-6)
    latent_NL = torch.from_numpy(((labels.latent_action - mean) / std).astype(np.float32)).to(device)
    model = ContinuousLatentModel(trunk, labels.num_codes)

    def sums(images_BCHW: Tensor, ids_BW: Tensor, frames: np.ndarray) -> dict[str, Tensor]:
        true_BL = latent_NL[frames]
        error_BL = model.predict(images_BCHW, ids_BW) - true_BL
        return {
            "latent_l1": error_BL.abs().mean(1).sum(),
            "latent_mse": error_BL.square().mean(1).sum(),
            # The mean is 0 after normalisation.
            "marginal_latent_l1": true_BL.abs().mean(1).sum(),
            "marginal_latent_mse": true_BL.square().mean(1).sum(),
        }

    return Objective(
        model=model,
        is_usable=labels.is_valid,
        loss=lambda images, ids, frames: model.loss(images, ids, latent_NL[frames]),
        evaluate=sums,
        baseline={},
        config={
            "is_discrete": False,
            "num_codes": labels.num_codes,
            "latent_mean": mean.tolist(),
            "latent_std": std.tolist(),
        },
        derive=lambda means: {"latent_r2": 1 - means["latent_mse"] / max(means["marginal_latent_mse"], 1e-12)},
    )


def marginal_baseline(latent_NL: np.ndarray, codebook_size: int) -> dict[str, float]:
    """What the label frequencies alone give: entropy a token in nats, and the accuracy of the commonest."""
    if not len(latent_NL):
        raise ValueError("no frame to train on has a label: label this data set, or use a larger one")
    share_LK = np.stack([np.bincount(column, minlength=codebook_size) for column in latent_NL.T]) / len(latent_NL)
    entropy = -(share_LK * np.log(np.maximum(share_LK, 1e-12))).sum(1).mean()
    _, counts = np.unique(latent_NL, axis=0, return_counts=True)
    return {
        "marginal_token_cross_entropy": float(entropy),
        "marginal_token_accuracy": float(share_LK.max(1).mean()),
        "marginal_joint_accuracy": float(counts.max() / len(latent_NL)),
    }


def action_labels(cfg: PretrainConfig, mixture: Mixture) -> tuple[np.ndarray, np.ndarray] | None:
    """Actions (N, A) and which are known (N,), where some data set has those of an inverse model; else None."""
    if not cfg.mixture:
        return None if cfg.action_labels is None else load_action_labels(cfg.action_labels, mixture.store)
    if cfg.action_labels is not None:
        raise ValueError(
            f"action_labels={cfg.action_labels} beside a mixture: name them in it, {{path: ..., labels: ...}}"
        )
    of_parts = []
    for part, store in zip(mixture.parts, mixture.stores, strict=True):
        if part.labels is not None:
            of_parts.append(load_action_labels(part.labels, store))
        elif store.actions is not None:
            of_parts.append((store.actions, np.ones(store.num_frames, bool)))
        else:
            raise ValueError(f"{part.path} has no actions: give it labels=<folder written by `lapa label_actions`>")
    numbers = {part.path: actions.shape[1] for part, (actions, _) in zip(mixture.parts, of_parts, strict=True)}
    if len(set(numbers.values())) > 1:
        raise ValueError(f"predict=action needs actions of one robot, the mixture has {numbers} numbers an action")
    actions, is_known = zip(*of_parts, strict=True)
    return np.concatenate(actions), np.concatenate(is_known)


def action_objective(
    cfg: PretrainConfig, mixture: Mixture, trunk: VisionLanguageTrunk, in_training: np.ndarray, device: torch.device
) -> Objective:
    """Chunks of actions, normalised by mean and standard deviation: the data's own, or an inverse model's."""
    chunks, is_pad = action_chunks(mixture.store, cfg.chunk_size, action_labels(cfg, mixture))
    is_usable = ~is_pad[:, 0]
    known = chunks[in_training & is_usable, 0]
    if not len(known):
        raise ValueError("no frame to train on has an action: label this data set, or use a larger one")
    mean, std = known.mean(0), np.maximum(known.std(0), 1e-6)
    actions_NTA = torch.from_numpy(((chunks - mean) / std).astype(np.float32)).to(device)
    is_pad_NT = torch.from_numpy(is_pad).to(device)
    action_dim = chunks.shape[2]
    spread = actions_NTA[torch.from_numpy(in_training & is_usable).to(device), 0]
    head = build_action_head(cfg.action_head, trunk.width, cfg.chunk_size, action_dim, cfg.num_bins)
    if isinstance(head, DenoisingActionHead):
        raise ValueError(f"action_head is {cfg.action_head!r}, expected chunk or bins: pretraining samples no chunks")
    if isinstance(head, BinnedActionHead):
        head.fit_bins(spread)
    model = ActionModel(trunk, head)

    def loss(images: Tensor, ids: Tensor, frames: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        loss_B, numbers = model.loss(images, ids, actions_NTA[frames], is_pad_NT[frames])
        return loss_B.mean(), numbers

    def sums(images: Tensor, ids: Tensor, frames: np.ndarray) -> dict[str, Tensor]:
        predicted_BTA, true_BTA = model.decode(images, ids), actions_NTA[frames]
        _, numbers = model.loss(images, ids, true_BTA, is_pad_NT[frames])
        error_B = (predicted_BTA[:, 0] - true_BTA[:, 0]).square().mean(-1)
        return {
            **{name: value * len(frames) for name, value in numbers.items()},
            "first_action_mse": error_B.sum(),
            "first_action_cosine": torch.cosine_similarity(predicted_BTA[:, 0], true_BTA[:, 0], dim=-1).sum(),
        }

    return Objective(
        model=model,
        is_usable=is_usable,
        loss=loss,
        evaluate=sums,
        baseline={"marginal_first_action_mse": float(spread.var(0, correction=0).mean())},
        config={
            "chunk_size": cfg.chunk_size,
            "action_head": cfg.action_head,
            "num_bins": cfg.num_bins,
            "action_dim": action_dim,
            "action_mean": mean.tolist(),
            "action_std": std.tolist(),
        },
    )
