"""Probes of the executed displacement: fitted once on training episodes, measured on held-out ones.

Shapes: B pairs, C colours, H and W pixels, N columns of codes, L code_length, D latent_dim, A action dimensions,
F features, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lapa.data import FramePairs
from lapa.metrics import (
    EpisodeBootstrap,
    Predictor,
    between_code_share,
    fit_code_table,
    fit_linear_probe,
    fit_mlp_probe,
    fit_principal_components,
    joint_codes,
    r_squared_samples,
)
from lapa.quantizer.latent_actions import LatentActions, small_pixels


@dataclass(frozen=True)
class Probes:
    """Predictors of the executed displacement, fitted on training episodes; `table` is None for continuous codes."""

    latent: Predictor
    latent_mlp: Predictor
    table: Predictor | None
    present: Predictor
    present_mlp: Predictor
    change: Predictor
    change_mlp: Predictor
    present_and_latent: Callable[[np.ndarray, np.ndarray], np.ndarray]  # first frames and latents


def fit_probes(train_pairs: FramePairs, train: LatentActions, is_discrete: bool, seed: int) -> Probes:
    """Probes of the displacement between two frames, and the two baselines that see pixels only.

    The baselines get the same regressions, from the first frame and from the difference of the frames, each
    downsampled to 16 x 16 and reduced to its 64 principal components. One more regression sees the first frame and the
    latent action: what the latter adds is what a policy, which sees the frame itself, can gain from it.
    """
    actions = train_pairs.displacements(train.indices)
    features = [train.latents, *small_pixels(train_pairs, train.indices)]
    reducers = [_unchanged, *(fit_principal_components(values) for values in features[1:])]
    fitted: list[Predictor] = []
    for values, reduce in zip(features, reducers, strict=True):
        reduced = reduce(values)
        fitted.append(_chain(reduce, fit_linear_probe(reduced, actions)))
        fitted.append(_chain(reduce, fit_mlp_probe(reduced, actions, seed)))
    latent, latent_mlp, present, present_mlp, change, change_mlp = fitted
    reduce_present = reducers[1]
    both = fit_linear_probe(np.hstack([reduce_present(features[1]), train.latents]), actions)
    table = fit_code_table(train.codes, actions) if is_discrete else None
    return Probes(
        latent,
        latent_mlp,
        table,
        present,
        present_mlp,
        change,
        change_mlp,
        present_and_latent=lambda present, latents: both(np.hstack([reduce_present(present), latents])),
    )


def _unchanged(values: np.ndarray) -> np.ndarray:
    return values


def _chain(first: Predictor, second: Predictor) -> Predictor:
    return lambda values: second(first(values))


def probe_metrics(
    probes: Probes, pairs: FramePairs, held_out: LatentActions, bootstrap: EpisodeBootstrap
) -> dict[str, float]:
    """How well latent actions tell the executed displacement, beside the first frame alone and the pixels' change.

    latent_gain_r2 is what the latent action adds to the first frame: R2 of a linear probe that sees both (or the
    latent action alone, where that is better), less that of the first frame (or 0, the mean's). code_mean_probe_r2
    predicts the mean displacement that a latent action has on training episodes; action_variance_between_codes is the
    share of the displacement's variance between latent actions.
    """
    actions = pairs.displacements(held_out.indices)
    present, change = small_pixels(pairs, held_out.indices)
    predicted = {
        "linear_probe": probes.latent(held_out.latents),
        "mlp_probe": probes.latent_mlp(held_out.latents),
        "present_frame_probe": probes.present(present),
        "present_frame_mlp_probe": probes.present_mlp(present),
        "pixel_difference_probe": probes.change(change),
        "pixel_difference_mlp_probe": probes.change_mlp(change),
        "present_frame_and_latent_probe": probes.present_and_latent(present, held_out.latents),
    }
    result: dict[str, float] = {}
    if probes.table is not None:
        predicted["code_mean_probe"] = probes.table(held_out.codes)
        shares_R = between_code_share(joint_codes(held_out.codes), actions, bootstrap)
        result |= bootstrap.estimate_count("action_variance_between_codes", shares_R, most=1.0)
    samples: dict[str, np.ndarray] = {}
    for name, values in predicted.items():
        samples[name] = r_squared_samples(values, actions, bootstrap)
        result |= bootstrap.estimate(f"{name}_r2", samples[name])
        if name in ("linear_probe", "mlp_probe"):
            result |= bootstrap.estimate(f"{name}_nmse", 1 - samples[name])
    with_latent_R = np.maximum(samples["present_frame_and_latent_probe"], samples["linear_probe"])
    gain_R = with_latent_R - samples["present_frame_probe"].clip(min=0)
    return result | bootstrap.estimate("latent_gain_r2", gain_R)
