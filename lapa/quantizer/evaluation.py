"""What a quantizer shows on held-out episodes, and the gate that keeps a collapsed one out of pretraining.

Every number comes with `<name>_low` and `<name>_high`, the 95% interval of a bootstrap over episodes. Probes are
fitted once, on training episodes; only the episodes they are measured on are resampled.

Shapes: B pairs, N columns of codes, R resamples.
"""

import hashlib
import math
from pathlib import Path

import numpy as np

from lapa.checkpoint import MODEL_FILE
from lapa.data import FramePairs
from lapa.metrics import EpisodeBootstrap, usage_samples
from lapa.quantizer.base import LatentActionQuantizer
from lapa.quantizer.latent_actions import ACTIVE_VARIANCE, LatentActions, encode_pairs, episodes_of, sample_pairs
from lapa.quantizer.probes import fit_probes, probe_metrics
from lapa.quantizer.transfer import other_data_metrics, reconstruction_and_transfer
from lapa.runtime import Compute
from lapa.schema import QuantizerGate


def evaluate(
    model: LatentActionQuantizer,
    train_pairs: FramePairs,
    pairs: FramePairs,
    num_pairs: int,
    seed: int,
    compute: Compute,
    other_pairs: FramePairs | None = None,
) -> tuple[dict[str, float], LatentActions]:
    """All metrics on at most `num_pairs` held-out pairs, and the latent actions of those pairs.

    Probes are left out where the store behind the pairs has no actions. `other_pairs` come from another data set:
    latent actions of `pairs` are applied to its first frames too.
    """
    model.eval()
    held_out = encode_pairs(model, pairs, sample_pairs(pairs, num_pairs, seed), compute)
    bootstrap = EpisodeBootstrap(episodes_of(pairs, held_out.indices), seed)
    probes = None
    if pairs.store.actions is not None:
        train = encode_pairs(model, train_pairs, sample_pairs(train_pairs, num_pairs, seed), compute)
        probes = fit_probes(train_pairs, train, model.codebook.is_discrete, seed)

    result = {"num_pairs": float(len(held_out.indices)), "num_episodes": float(bootstrap.num_episodes)}
    result |= usage(model, held_out, bootstrap)
    result |= reconstruction_and_transfer(model, pairs, held_out, probes, seed, bootstrap, compute)
    if probes is not None:
        result |= probe_metrics(probes, pairs, held_out, bootstrap)
    if other_pairs is not None:
        result |= other_data_metrics(model, pairs, held_out, other_pairs, probes, num_pairs, seed, compute)
    return result, held_out


# Use of the codes


def usage(model: LatentActionQuantizer, held_out: LatentActions, bootstrap: EpisodeBootstrap) -> dict[str, float]:
    """How much of what the codebook offers is in use: codes of a discrete one, dimensions of a continuous one."""
    if not model.codebook.is_discrete:
        return continuous_usage(held_out.codes, bootstrap)
    size, num_codes = model.codebook.codebook_size, model.codebook.num_codes
    samples = usage_samples(held_out.codes, size, bootstrap)
    # No more latent actions can be seen than there are pairs.
    ceiling = float(min(size**num_codes, len(held_out.codes)))
    samples |= {
        "joint_utilisation": samples["codes_in_use"] / ceiling,
        "perplexity_of_ceiling": samples["perplexity"] / ceiling,
    }
    most = {"codes_in_use": ceiling, "perplexity": ceiling, "token_perplexity": float(size)}
    result = {"perplexity_ceiling": ceiling}
    for name, samples_R in samples.items():
        result |= bootstrap.estimate_count(name, samples_R, most.get(name, 1.0))
    return result


def continuous_usage(codes_BN: np.ndarray, bootstrap: EpisodeBootstrap) -> dict[str, float]:
    """active_dimensions: how many vary over the pairs; effective_dimensions and information_bits: how much they tell.

    Dimensions may repeat each other, so the last two look along the principal axes of the codes: (sum of variances)
    squared over the sum of their squares, and the sum of -log2(1 - variance) / 2. That is what a Gaussian channel
    carries about a pair where the posterior fills the unit prior, as training asks; an axis counts 5 bits at most.
    """
    centred_BN = codes_BN - codes_BN.mean(0)
    axes_NN = np.linalg.eigh(np.cov(centred_BN.T).reshape(codes_BN.shape[1], -1))[1]
    variance_RN, along_RN = (
        bootstrap.means(np.square(values_BN)) - bootstrap.means(values_BN) ** 2
        for values_BN in (centred_BN, centred_BN @ axes_NN)
    )
    squares_R = np.square(along_RN).sum(1)
    effective_R = along_RN.sum(1) ** 2 / np.maximum(squares_R, 1e-12)
    bits_R = -0.5 * np.log2(1 - along_RN.clip(0, 1 - 1e-3)).sum(1)
    return (
        {"num_dimensions": float(codes_BN.shape[1])}
        | bootstrap.estimate("active_dimensions", (variance_RN > ACTIVE_VARIANCE).sum(1))
        | bootstrap.estimate("effective_dimensions", effective_R)
        | bootstrap.estimate("information_bits", bits_R)
    )


def quantizer_digest(folder: str | Path) -> str:
    """Identifies the weights of a quantizer, so that an evaluation is never taken for another's."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"no {MODEL_FILE} in {folder}: expected a trained or imported quantizer")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The numbers that a reader looks for first."""
    names = (
        "linear_probe_r2",
        "delta_psnr_db",
        "psnr_over_copy_db",
        "perplexity_ratio",
        "vocabulary_utilisation",
        "active_dimensions",
        "transfer_kappa",
        "transfer_probe_r2",
    )
    return {name: metrics[name] for name in names if name in metrics}


def check_gate(metrics: dict[str, float], gate: QuantizerGate) -> dict:
    """{"passed": bool, "reasons": [why not, one sentence each]}."""
    reasons = [f"{name} is not a number" for name, value in metrics.items() if not math.isfinite(value)]
    if "active_dimensions" in metrics:
        if metrics["active_dimensions"] < gate.min_active_dimensions:
            reasons.append(
                f"the latents collapsed: {metrics['active_dimensions']:.0f} of {metrics['num_dimensions']:.0f} "
                f"dimensions vary over the pairs, expected at least {gate.min_active_dimensions}"
            )
    else:
        reasons += _usage_reasons(metrics, gate)
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
    if gate.require_nearer_future and metrics["error_to_future"] >= metrics["error_to_present"]:
        reasons.append(
            f"the prediction is nearer the first frame (error {metrics['error_to_present']:.5f}) than the second "
            f"({metrics['error_to_future']:.5f}): it hardly moves"
        )
    # One held-out episode gives no interval: then the number itself has to do.
    if "latent_gain_r2" in metrics and metrics.get("latent_gain_r2_low", metrics["latent_gain_r2"]) <= 0:
        between = ""
        if "latent_gain_r2_low" in metrics:
            between = f" ({metrics['latent_gain_r2_low']:.2f} to {metrics['latent_gain_r2_high']:.2f})"
        reasons.append(
            f"the latent actions tell nothing of the true action that the first frame does not: beside it they add "
            f"{metrics['latent_gain_r2']:.2f}{between} to an R2 of {max(0.0, metrics['present_frame_probe_r2']):.2f}"
        )
    return {"passed": not reasons, "reasons": reasons}


def _usage_reasons(metrics: dict[str, float], gate: QuantizerGate) -> list[str]:
    reasons = []
    reachable = metrics["perplexity_ceiling"]
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
    return reasons


def require_gate(gate: dict, folder: object) -> None:
    """Raise ValueError with the reasons where the quantizer behind `folder` failed its gate."""
    if not gate["passed"]:
        reasons = "\n".join(f"  - {reason}" for reason in gate["reasons"])
        raise ValueError(
            f"the quantizer behind {folder} failed its gate; a policy pretrained on its codes would learn nothing:\n"
            f"{reasons}\nTrain it longer (training.num_steps), change frame_gap_s or the codebook, or set "
            "ignore_gate=true to go on regardless"
        )
