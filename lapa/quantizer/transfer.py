"""What a latent action does to its own scene and to others: reconstruction, and transfer between scenes.

Shapes: B pairs, C colours, H and W pixels, N columns of codes, L code_length, D latent_dim, A action dimensions,
F features, R resamples.
"""

import numpy as np

from lapa.data import FramePairs, to_float
from lapa.metrics import (
    EpisodeBootstrap,
    gradient_similarity,
    kappa,
    multi_scale_ssim,
    psnr_db,
    r_squared_samples,
)
from lapa.quantizer.base import LatentActionQuantizer
from lapa.quantizer.latent_actions import (
    BATCH,
    LatentActions,
    Outcome,
    apply_codes,
    encode_pairs,
    episodes_of,
    sample_pairs,
    squared_error,
)
from lapa.quantizer.probes import Probes
from lapa.runtime import Compute


def reconstruction_and_transfer(
    model: LatentActionQuantizer,
    pairs: FramePairs,
    held_out: LatentActions,
    probes: Probes | None,
    seed: int,
    bootstrap: EpisodeBootstrap,
    compute: Compute,
) -> dict[str, float]:
    """The predicted second frame against its rivals, and what a latent action does to other first frames.

    delta_psnr_db is against the latent action of a pair of another episode; delta_psnr_uniform_db against codes
    drawn uniformly, which may be ones that the forward model never saw. transfer_*: see `transfer_metrics`;
    roundtrip_* are the same numbers without a change of scene, their ceiling.
    """
    rng = np.random.default_rng(seed)
    sources = np.array(pairs.store.sources)
    episode_B = episodes_of(pairs, held_out.indices)
    source_B = sources[episode_B]

    own = apply_codes(model, pairs, held_out.indices, held_out.codes, compute, perceptual=True)
    donors_B = draw_donors(episode_B, source_B, rng, same_source=True)
    transferred = apply_codes(model, pairs, held_out.indices, held_out.codes[donors_B], compute)
    result = reconstruction(pairs, held_out, own, transferred, bootstrap)
    if model.codebook.is_discrete:
        uniform_BN = rng.integers(model.codebook.codebook_size, size=held_out.codes.shape)
        uniform = apply_codes(model, pairs, held_out.indices, uniform_BN, compute, read_back=False)
        result |= bootstrap.estimate("delta_psnr_uniform_db", psnr_gain(own, uniform, bootstrap))

    actions = pairs.displacements(held_out.indices) if probes is not None else None
    everyone_B = np.arange(len(held_out.indices))
    arguments = (model.codebook.is_discrete, held_out, actions, probes, bootstrap)
    result |= transfer_metrics("roundtrip", own, everyone_B, *arguments)
    result |= transfer_metrics("transfer", transferred, donors_B, *arguments)
    if len(set(source_B)) > 1:
        donors_B = draw_donors(episode_B, source_B, rng, same_source=False)
        across = apply_codes(model, pairs, held_out.indices, held_out.codes[donors_B], compute)
        result |= transfer_metrics("transfer_across", across, donors_B, *arguments)
    return result


def psnr_gain(own: Outcome, rival: Outcome, bootstrap: EpisodeBootstrap) -> np.ndarray:
    """PSNR of one prediction above another's (R + 1,)."""
    return psnr_samples(own.error_to_future, bootstrap) - psnr_samples(rival.error_to_future, bootstrap)


def psnr_samples(error_B: np.ndarray, bootstrap: EpisodeBootstrap) -> np.ndarray:
    """PSNR (R + 1,) of the mean of squared errors (B,)."""
    return np.array([psnr_db(error) for error in bootstrap.means(error_B[:, None])[:, 0]])


def reconstruction(
    pairs: FramePairs, held_out: LatentActions, own: Outcome, rival: Outcome, bootstrap: EpisodeBootstrap
) -> dict[str, float]:
    """PSNR and structural similarity of the prediction, and of repeating the first frame."""
    rows = []
    for start in range(0, len(held_out.indices), BATCH):
        first, second = to_float(pairs.frames(held_out.indices[start : start + BATCH])).unbind(1)
        similarities = (multi_scale_ssim(first, second).numpy(), gradient_similarity(first, second).numpy())
        rows.append(np.stack([squared_error(first, second), *similarities], 1))
    copy_error_B, copy_ssim_B, copy_gradient_B = np.concatenate(rows).T
    psnr_R, copy_R = psnr_samples(own.error_to_future, bootstrap), psnr_samples(copy_error_B, bootstrap)
    samples = {
        "psnr_db": psnr_R,
        "copy_psnr_db": copy_R,
        "psnr_over_copy_db": psnr_R - copy_R,
        "delta_psnr_db": psnr_gain(own, rival, bootstrap),
    }
    means = {
        "ssim": own.ssim,
        "copy_ssim": copy_ssim_B,
        "ssim_over_copy": own.ssim - copy_ssim_B,
        "gradient_similarity": own.gradient_similarity,
        "copy_gradient_similarity": copy_gradient_B,
        "gradient_similarity_over_copy": own.gradient_similarity - copy_gradient_B,
        "error_to_future": own.error_to_future,
        "error_to_present": own.error_to_present,
    }
    samples |= {name: bootstrap.means(values_B[:, None])[:, 0] for name, values_B in means.items()}
    result: dict[str, float] = {}
    for name, samples_R in samples.items():
        result |= bootstrap.estimate(name, samples_R)
    return result


def draw_donors(episode_B: np.ndarray, source_B: np.ndarray, rng: np.random.Generator, same_source: bool) -> np.ndarray:
    """For every pair, a pair (B,) of another episode of the same source, or of another source.

    Where there is none the next best serves: any other episode, and with a single episode any other pair.
    """
    donors_B = np.empty(len(episode_B), np.int64)
    for episode in np.unique(episode_B):
        rows = np.flatnonzero(episode_B == episode)
        elsewhere = episode_B != episode
        candidates = np.flatnonzero(elsewhere & ((source_B == source_B[rows[0]]) == same_source))
        if not len(candidates):
            candidates = np.flatnonzero(elsewhere)
        if len(candidates):
            donors_B[rows] = rng.choice(candidates, len(rows))
        else:
            donors_B[rows] = np.roll(rows, 1)
    return donors_B


def transfer_metrics(
    name: str,
    outcome: Outcome,
    donors_B: np.ndarray,
    is_discrete: bool,
    held_out: LatentActions,
    actions_BA: np.ndarray | None,
    probes: Probes | None,
    bootstrap: EpisodeBootstrap,
) -> dict[str, float]:
    """Whether the latent action of pair `donors_B[b]` makes the same change to the first frame of pair b.

    It is applied there, and read again from the first frame and the prediction:
        <name>_agreement    share of the codes that come back
        <name>_chance       share that would if applied and read codes were unrelated, with the same frequencies
        <name>_kappa        agreement beyond chance, 0 to 1: 0 for a forward model that ignores the codes
        <name>_latent_r2    variance of the applied latents that the read ones explain (discrete or not)
        <name>_probe_r2     displacement of the donor, told from the read latents by the linear probe

    Even a perfect quantizer stays below its roundtrip: a move that leaves the picture cannot be read, and one that a
    scene does not allow need not come out the same.
    """
    samples = {"latent_r2": r_squared_samples(outcome.read.latents, held_out.latents[donors_B], bootstrap)}
    if is_discrete:
        samples |= agreement_samples(held_out.codes[donors_B], outcome.read.codes, bootstrap)
    if probes is not None and actions_BA is not None:
        actions_BA = actions_BA[donors_B]
        samples["probe_r2"] = r_squared_samples(probes.latent(outcome.read.latents), actions_BA, bootstrap)
    result: dict[str, float] = {}
    for suffix, samples_R in samples.items():
        result |= bootstrap.estimate(f"{name}_{suffix}", samples_R)
    return result


def agreement_samples(
    applied_BN: np.ndarray, read_BN: np.ndarray, bootstrap: EpisodeBootstrap
) -> dict[str, np.ndarray]:
    """Agreement of two sets of codes, the agreement expected by chance, and Cohen's kappa, each (R + 1,)."""
    agreement_R = bootstrap.means((applied_BN == read_BN).mean(1)[:, None])[:, 0]
    chances = []
    for applied_B, read_B in zip(applied_BN.T, read_BN.T, strict=True):
        present, positions = np.unique(np.concatenate([applied_B, read_B]), return_inverse=True)
        counts = [bootstrap.histograms(codes_B, len(present)) for codes_B in np.split(positions, 2)]
        shares = [counts_RU / counts_RU.sum(1, keepdims=True) for counts_RU in counts]
        chances.append((shares[0] * shares[1]).sum(1))
    chance_R = np.mean(chances, 0)
    return {"agreement": agreement_R, "chance": chance_R, "kappa": kappa(agreement_R, chance_R)}


def other_data_metrics(
    model: LatentActionQuantizer,
    pairs: FramePairs,
    held_out: LatentActions,
    other_pairs: FramePairs,
    probes: Probes | None,
    num_pairs: int,
    seed: int,
    compute: Compute,
) -> dict[str, float]:
    """The quantizer on other data: latent actions of `pairs` in its scenes, and the probe carried over unchanged."""
    other = encode_pairs(model, other_pairs, sample_pairs(other_pairs, num_pairs, seed), compute)
    bootstrap = EpisodeBootstrap(episodes_of(other_pairs, other.indices), seed)
    own = apply_codes(model, other_pairs, other.indices, other.codes, compute, perceptual=True)
    donors_B = np.random.default_rng(seed).integers(len(held_out.indices), size=len(other.indices))
    transferred = apply_codes(model, other_pairs, other.indices, held_out.codes[donors_B], compute)
    numbers = reconstruction(other_pairs, other, own, transferred, bootstrap)
    result = {f"data2_{name}": value for name, value in numbers.items() if name.startswith(("psnr_over", "delta"))}
    result["data2_num_pairs"] = float(len(other.indices))
    actions = pairs.displacements(held_out.indices) if probes is not None else None
    result |= transfer_metrics(
        "transfer_data2", transferred, donors_B, model.codebook.is_discrete, held_out, actions, probes, bootstrap
    )
    if probes is not None and actions is not None and other_pairs.store.actions is not None:
        other_actions = other_pairs.displacements(other.indices)
        if other_actions.shape[1] == actions.shape[1]:
            samples_R = r_squared_samples(probes.latent(other.latents), other_actions, bootstrap)
            result |= bootstrap.estimate("data2_linear_probe_r2", samples_R)
    return result
