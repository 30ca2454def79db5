"""What a quantizer shows on held-out episodes, and the gate that keeps a collapsed one out of pretraining.

Shapes: B pairs, C colours, H and W pixels, L code_length, D latent_dim, A action dimensions.
"""

from dataclasses import dataclass

import numpy as np
import torch

from lapa.data import FramePairs, to_float
from lapa.metrics import code_usage, linear_probe_r2, mlp_probe_r2, psnr_db
from lapa.quantizer.base import LatentActionQuantizer
from lapa.runtime import Compute
from lapa.schema import QuantizerGate

BATCH = 128


@dataclass(frozen=True)
class LatentActions:
    """codes (B, L) int64 and quantised latents (B, L * D) float32 of the pairs with these indices (B,)."""

    indices: np.ndarray
    codes: np.ndarray
    latents: np.ndarray


def sample_pairs(pairs: FramePairs, most: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `most` pairs, without repetition."""
    count = min(most, len(pairs))
    return np.sort(np.random.default_rng(seed).choice(len(pairs), count, replace=False))


@torch.inference_mode()
def encode_pairs(
    model: LatentActionQuantizer, pairs: FramePairs, indices: np.ndarray, compute: Compute
) -> LatentActions:
    """Latent actions of the pairs with these indices."""
    codes, latents = [], []
    for start in range(0, len(indices), BATCH):
        frames = to_float(pairs.frames(indices[start : start + BATCH]), compute.device)
        with compute.autocast():
            codes_BL, latents_BLD = model.encode(frames)
        codes.append(codes_BL.cpu().numpy())
        latents.append(latents_BLD.flatten(1).float().cpu().numpy())
    return LatentActions(indices, np.concatenate(codes), np.concatenate(latents))


@torch.inference_mode()
def reconstruction(
    model: LatentActionQuantizer, pairs: FramePairs, encoded: LatentActions, seed: int, compute: Compute
) -> dict[str, float]:
    """PSNR of the predicted second frame against its rivals.

    The random code is that of another held-out pair: codes drawn uniformly may be ones that the forward model
    never saw, which would flatter the inferred code.
    """
    sums = {"inferred": 0.0, "random": 0.0, "copy": 0.0, "present": 0.0}
    shuffled = encoded.codes[np.random.default_rng(seed).permutation(len(encoded.codes))]
    for start in range(0, len(encoded.indices), BATCH):
        chunk = slice(start, start + BATCH)
        first, second = to_float(pairs.frames(encoded.indices[chunk]), compute.device).unbind(1)
        with compute.autocast():
            inferred = model.decode(first, torch.from_numpy(encoded.codes[chunk]).to(compute.device)).float()
            random = model.decode(first, torch.from_numpy(shuffled[chunk]).to(compute.device)).float()
        for name, one, other in (
            ("inferred", inferred, second),
            ("random", random, second),
            ("copy", first, second),
            ("present", inferred, first),
        ):
            sums[name] += float((one - other).square().mean((1, 2, 3)).sum())
    error = {name: value / len(encoded.indices) for name, value in sums.items()}
    return {
        "psnr_db": psnr_db(error["inferred"]),
        "copy_psnr_db": psnr_db(error["copy"]),
        "psnr_over_copy_db": psnr_db(error["inferred"]) - psnr_db(error["copy"]),
        "delta_psnr_db": psnr_db(error["inferred"]) - psnr_db(error["random"]),
        "error_to_future": error["inferred"],
        "error_to_present": error["present"],
    }


def probes(
    train_pairs: FramePairs, train: LatentActions, pairs: FramePairs, held_out: LatentActions, seed: int
) -> dict[str, float]:
    """How well latent actions tell the true displacement, beside the first frame alone, which should not."""
    train_actions = train_pairs.displacements(train.indices)
    actions = pairs.displacements(held_out.indices)
    linear = linear_probe_r2(train.latents, train_actions, held_out.latents, actions)
    present = linear_probe_r2(
        _small_first_frames(train_pairs, train.indices),
        train_actions,
        _small_first_frames(pairs, held_out.indices),
        actions,
    )
    return {
        "linear_probe_r2": linear,
        "linear_probe_nmse": 1 - linear,
        "mlp_probe_r2": mlp_probe_r2(train.latents, train_actions, held_out.latents, actions, seed),
        "present_frame_probe_r2": present,
    }


def _small_first_frames(pairs: FramePairs, indices: np.ndarray, size: int = 8) -> np.ndarray:
    """First frames averaged down to 8 x 8 (B, 192): little enough for a probe of a few hundred pairs."""
    first = pairs.store.frames[pairs.first_frames[indices]]
    block = first.shape[1] // size
    return first.reshape(len(first), size, block, size, block, 3).mean((2, 4)).reshape(len(first), -1) / 255


def evaluate(
    model: LatentActionQuantizer,
    train_pairs: FramePairs,
    pairs: FramePairs,
    num_pairs: int,
    seed: int,
    compute: Compute,
) -> tuple[dict[str, float], LatentActions]:
    """All metrics on at most `num_pairs` held-out pairs, and the latent actions of those pairs.

    The probes are left out where the store behind the pairs has no actions.
    """
    model.eval()
    held_out = encode_pairs(model, pairs, sample_pairs(pairs, num_pairs, seed), compute)
    result = {"num_pairs": float(len(held_out.indices))}
    result |= code_usage(held_out.codes, model.codebook_config.codebook_size)
    result |= reconstruction(model, pairs, held_out, seed, compute)
    if pairs.store.actions is not None:
        train = encode_pairs(model, train_pairs, sample_pairs(train_pairs, num_pairs, seed), compute)
        result |= probes(train_pairs, train, pairs, held_out, seed)
    return result, held_out


def check_gate(metrics: dict[str, float], gate: QuantizerGate) -> dict:
    """{"passed": bool, "reasons": [why not, one sentence each]}."""
    reasons = []
    # No more latent actions can be seen than there are pairs.
    reachable = min(metrics["perplexity"] / metrics["perplexity_ratio"], metrics["num_pairs"])
    if metrics["perplexity"] < gate.min_perplexity_ratio * reachable:
        reasons.append(
            f"the codebook collapsed: perplexity {metrics['perplexity']:.1f} is "
            f"{metrics['perplexity'] / reachable:.1%} of the {reachable:.0f} latent actions that could be in use, "
            f"expected at least {gate.min_perplexity_ratio:.1%}"
        )
    if gate.require_all_codes and metrics["vocabulary_utilisation"] < 1:
        reasons.append(f"only {metrics['vocabulary_utilisation']:.0%} of the codes of a token are in use, expected all")
    if gate.require_all_codes and metrics["token_utilisation"] < 0.5:
        reasons.append(f"one of the tokens uses only {metrics['token_utilisation']:.0%} of its codes")
    if metrics["delta_psnr_db"] <= gate.min_delta_psnr_db:
        reasons.append(
            f"the forward model ignores the latent action: delta-PSNR against random codes is "
            f"{metrics['delta_psnr_db']:.2f} dB, expected more than {gate.min_delta_psnr_db:.2f} dB"
        )
    if gate.require_beat_copy and metrics["psnr_over_copy_db"] <= 0:
        reasons.append(
            f"the prediction ({metrics['psnr_db']:.2f} dB) is no better than repeating the first frame "
            f"({metrics['copy_psnr_db']:.2f} dB)"
        )
    if "linear_probe_r2" in metrics and metrics["linear_probe_r2"] <= max(0.0, metrics["present_frame_probe_r2"]):
        reasons.append(
            f"the latent actions tell the true action no better (R2 {metrics['linear_probe_r2']:.2f}) than the first "
            f"frame alone does (R2 {metrics['present_frame_probe_r2']:.2f})"
        )
    return {"passed": not reasons, "reasons": reasons}


def require_gate(gate: dict, folder: object) -> None:
    """Raise ValueError with the reasons where the quantizer behind `folder` failed its gate."""
    if not gate["passed"]:
        reasons = "\n".join(f"  - {reason}" for reason in gate["reasons"])
        raise ValueError(
            f"the quantizer behind {folder} failed its gate; a policy pretrained on its codes would learn nothing:\n"
            f"{reasons}\nTrain it longer (training.num_steps), change frame_gap_s or the codebook, or set "
            "ignore_gate=true to go on regardless"
        )
