"""Latent actions of pairs of a data set: inferred, applied to first frames, listed.

Shapes: B pairs, C colours, H and W pixels, N columns of codes, L code_length, D latent_dim, A action dimensions,
F features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapa.data import FramePairs, to_float
from lapa.metrics import gradient_similarity, multi_scale_ssim
from lapa.quantizer.base import LatentActionQuantizer
from lapa.runtime import Compute

BATCH = 128
ACTIVE_VARIANCE = 0.01  # of a latent dimension over pairs (active units of Burda et al., arXiv 1509.00519)
SMALL_SIZE = 16  # pixels a side of the images that the pixel baselines see


@dataclass(frozen=True)
class LatentActions:
    """Codes (B, N), and latents (B, L * D) float32 that the forward model reads, of pairs with indices (B,)."""

    indices: np.ndarray
    codes: np.ndarray
    latents: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What latent actions do to first frames, a row a pair.

    error_to_future, error_to_present (B,): mean squared differences of the prediction. ssim, gradient_similarity (B,):
    its likeness to the second frame. read: the latent action inferred from the first frame and the prediction.
    """

    error_to_future: np.ndarray
    error_to_present: np.ndarray
    ssim: np.ndarray
    gradient_similarity: np.ndarray
    read: LatentActions


def sample_pairs(pairs: FramePairs, most: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `most` pairs, without repetition."""
    count = min(most, len(pairs))
    return np.sort(np.random.default_rng(seed).choice(len(pairs), count, replace=False))


def episodes_of(pairs: FramePairs, indices: np.ndarray) -> np.ndarray:
    """Episode (B,) of each pair."""
    return pairs.store.episode_of_frame()[pairs.first_frames[indices]]


@torch.inference_mode()
def encode_pairs(
    model: LatentActionQuantizer, pairs: FramePairs, indices: np.ndarray, compute: Compute
) -> LatentActions:
    """Latent actions of the pairs with these indices."""
    codes, latents = [], []
    for start in range(0, len(indices), BATCH):
        frames = to_float(pairs.frames(indices[start : start + BATCH]), compute.device)
        with compute.autocast():
            codes_BN, latents_BLD = model.encode(frames)
        codes.append(codes_BN.cpu().numpy())
        latents.append(latents_BLD.flatten(1).float().cpu().numpy())
    return LatentActions(indices, np.concatenate(codes), np.concatenate(latents))


@torch.inference_mode()
def apply_codes(
    model: LatentActionQuantizer,
    pairs: FramePairs,
    indices: np.ndarray,
    codes_BN: np.ndarray,
    compute: Compute,
    perceptual: bool = False,
    read_back: bool = True,
) -> Outcome:
    """The forward model moves the first frames of pairs by latent actions (B, N), which need not be theirs.

    Without `perceptual` or `read_back` the fields that need them are empty.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("future", "present", "ssim", "gradient")}
    codes, latents = [], []
    for start in range(0, len(indices), BATCH):
        chunk = slice(start, start + BATCH)
        first, second = to_float(pairs.frames(indices[chunk]), compute.device).unbind(1)
        with compute.autocast():
            applied_BLD = model.codebook.lookup(torch.from_numpy(codes_BN[chunk]).to(compute.device))
            predicted = model.decode(first, applied_BLD).float()
        rows["future"].append(squared_error(predicted, second))
        rows["present"].append(squared_error(predicted, first))
        if perceptual:
            rows["ssim"].append(multi_scale_ssim(predicted, second).cpu().numpy())
            rows["gradient"].append(gradient_similarity(predicted, second).cpu().numpy())
        if read_back:
            # Through 8 bits, as a picture would be: nothing can be read that is too faint to be seen.
            picture = predicted.clamp(0, 1).mul(255).round().div(255)
            with compute.autocast():
                read_BN, read_BLD = model.encode(torch.stack([first, picture], 1))
            codes.append(read_BN.cpu().numpy())
            latents.append(read_BLD.flatten(1).float().cpu().numpy())
    columns = {name: np.concatenate(values) if values else np.empty(0) for name, values in rows.items()}
    read = LatentActions(
        indices, np.concatenate(codes) if codes else codes_BN[:0], np.concatenate(latents) if latents else np.empty(0)
    )
    return Outcome(columns["future"], columns["present"], columns["ssim"], columns["gradient"], read)


def squared_error(one_BCHW: Tensor, other_BCHW: Tensor) -> np.ndarray:
    """Mean squared difference (B,)."""
    return (one_BCHW - other_BCHW).square().mean((1, 2, 3)).cpu().numpy()


def small_pixels(pairs: FramePairs, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First frames and differences of the frames, each averaged down to 16 x 16: (B, 768) twice."""
    first, change = [], []
    for start in range(0, len(indices), BATCH):
        first_BCHW, second_BCHW = to_float(pairs.frames(indices[start : start + BATCH])).unbind(1)
        first.append(shrink(first_BCHW))
        change.append(shrink(second_BCHW - first_BCHW))
    return np.concatenate(first), np.concatenate(change)


def shrink(image_BCHW: Tensor) -> np.ndarray:
    """Images averaged down to 16 x 16 (B, 768)."""
    return torch.nn.functional.adaptive_avg_pool2d(image_BCHW, SMALL_SIZE).flatten(1).cpu().numpy()


def code_statistics(encoded: LatentActions, actions_BA: np.ndarray | None) -> list[dict[str, float | str]]:
    """A row a latent action in use, most used first: code, count, share; mean and deviation of its displacement."""
    unique, groups, counts = np.unique(encoded.codes, axis=0, return_inverse=True, return_counts=True)
    groups = groups.reshape(-1)
    rows = []
    for position in np.argsort(-counts, kind="stable"):
        row: dict[str, float | str] = {
            "code": code_name(unique[position]),
            "count": int(counts[position]),
            "share": float(counts[position] / len(groups)),
        }
        if actions_BA is not None:
            members = actions_BA[groups == position]
            for axis, (mean, deviation) in enumerate(zip(members.mean(0), members.std(0), strict=True)):
                row |= {f"mean_{axis}": float(mean), f"standard_deviation_{axis}": float(deviation)}
        rows.append(row)
    return rows


def code_name(codes_N: np.ndarray) -> str:
    """A latent action by its codes: 3-0-7."""
    return "-".join(map(str, codes_N.tolist()))
