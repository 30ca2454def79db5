"""Can the policy's class learn one episode by heart? If not, something between data and loss is broken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE

from lapa.data import STILL
from lapa.runtime import Compute
from lapa.trainer import finish, fit
from policies.lapa.configuration_lapa import LapaConfig
from policies.preflight import open_loop
from policies.preflight.recording import Finding, Recording
from policies.serving.served_policy import observed


def fresh_config(recording: Recording, folder: str | None) -> PreTrainedConfig:
    """The configuration of the policy folder, or LAPA's defaults for the data set's first camera."""
    if folder is not None:
        return PreTrainedConfig.from_pretrained(Path(folder).expanduser())
    size = LapaConfig().image_size
    return LapaConfig(
        input_features={recording.meta.camera_keys[0]: PolicyFeature(FeatureType.VISUAL, (3, size, size))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (recording.actions.shape[1],))},
        push_to_hub=False,
    )


def statistics(recording: Recording, episode: int) -> dict[str, dict[str, Any]]:
    """The data set's statistics, with those of action and state taken from the one episode."""
    stats = dict(recording.meta.stats or {})
    for name, values in ((ACTION, recording.actions), (OBS_STATE, recording.states)):
        if values is not None:
            rows = values[recording.rows(episode)]
            quantiles = {f"q{round(100 * q):02d}": np.quantile(rows, q, axis=0) for q in (0.01, 0.1, 0.5, 0.9, 0.99)}
            std = np.where(rows.std(0) > STILL, rows.std(0), 1.0)
            numbers = {"mean": rows.mean(0), "std": std, "min": rows.min(0), "max": rows.max(0), **quantiles}
            stats[name] = {key: torch.from_numpy(np.float32(value)) for key, value in numbers.items()}
    return stats


def check_overfit(recording: Recording, cfg, compute: Compute, output_dir: Path) -> list[Finding]:
    """Train a policy with fresh weights on one episode, and measure its open-loop error on the same."""
    episode = cfg.overfit_episode
    if not 0 <= episode < recording.num_episodes:
        raise ValueError(f"overfit_episode is {episode}, the data set has episodes 0 to {recording.num_episodes - 1}")
    config = fresh_config(recording, cfg.policy)
    config.device, config.pretrained_path = str(compute.device), None
    stats = statistics(recording, episode)
    torch.manual_seed(cfg.training.seed)
    policy = get_policy_class(config.type)(config, dataset_stats=stats)
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=stats)
    inputs = observed(config)
    reading = open_loop.Reading(inputs, dict(cfg.rename_map), 1, cfg.batch_size)
    # Pictures are kept at the size that the policy sees: a whole episode at the camera's may not fit into memory.
    kept: dict[str, list[torch.Tensor]] = {name: [] for name, shape in inputs.items() if len(shape) == 3}
    for _, batch in open_loop.observations(recording, reading, episode):
        for name, images in kept.items():
            images.append(_resized(batch[name], inputs[name]))
    pictures = {name: torch.cat(images) for name, images in kept.items()}
    recorded = recording.actions[recording.rows(episode)]
    ahead = np.arange(len(recorded))[:, None] + np.array(config.action_delta_indices or [0])
    chunks = torch.from_numpy(np.float32(recorded[ahead.clip(0, len(recorded) - 1)]))
    is_pad = torch.from_numpy((ahead < 0) | (ahead >= len(recorded)))

    def make_batch(rng: np.random.Generator) -> dict[str, Any]:
        rows = torch.from_numpy(rng.choice(len(recorded), cfg.training.batch_size))
        batch: dict[str, Any] = {name: images[rows] for name, images in pictures.items()}
        batch |= {ACTION: chunks[rows], "action_is_pad": is_pad[rows].to(compute.device)}
        batch["task"] = [recording.instruction(episode)] * len(rows)
        if OBS_STATE in inputs and recording.states is not None:
            batch[OBS_STATE] = torch.from_numpy(np.float32(recording.states[recording.rows(episode)]))[rows]
        return preprocess(batch)

    def loss_of(batch: dict[str, Any]):
        loss, _ = policy.forward(batch)
        return loss, {}

    numbers = fit(policy, make_batch, loss_of, cfg.training, compute, output_dir, description="overfit")
    finish(output_dir)
    predict = open_loop.predictor(policy, preprocess, postprocess)
    found = open_loop.predict_episode(predict, recording, replace(reading, stride=cfg.frame_stride), episode)
    open_loop.plot(output_dir / f"episode_{episode:06d}.png", recording, episode, *found)
    scale = open_loop.Scale(recorded.mean(0), recorded.std(0))
    measured = open_loop.summary(open_loop.compare(recording, {episode: found}, scale))
    better = min(measured[rule]["error"] for rule in ("mean_action", "hold_last_action"))
    ratio = measured["policy"]["error"] / max(better, STILL)
    measured |= {"loss": numbers["loss"], "ratio_to_better_baseline": ratio}
    what = (
        f"after {cfg.training.num_steps} steps on episode {episode} alone, a fresh {config.type} policy has an "
        f"open-loop error of {measured['policy']['error']:.3f} standard deviations on it, {ratio:.2f} of the better "
        "baseline's"
    )
    if ratio < cfg.overfit_ratio:
        return [Finding("overfit", "pass", what, measured)]
    advice = (
        "more training.num_steps may be enough; else the observation does not tell the action (a camera that misses "
        "the scene, actions of another time, a missing state)"
    )
    return [Finding("overfit", "fail" if ratio >= 1 else "warn", f"{what}: {advice}", measured)]


def _resized(images: torch.Tensor, shape: tuple) -> torch.Tensor:
    if images.shape[-2:] == shape[-2:]:
        return images
    return torch.nn.functional.interpolate(images, shape[-2:], mode="bilinear", antialias=True)
