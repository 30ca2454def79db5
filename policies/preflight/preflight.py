"""`lapa preflight`: before a robot moves, checks of a data set and a policy for what a low loss hides.

output_dir/
    preflight.json      what every check found
    open_loop/          a picture an episode: predicted against recorded, each dimension
    overfit/            the same of the policy that was trained on one episode, and its loss curve
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lapa.checkpoint import read_json, write_json
from lapa.runtime import Compute, setup
from lapa.schema import PreflightConfig
from policies.preflight import open_loop
from policies.preflight.data_checks import (
    check_features,
    check_images,
    check_timing,
    check_units,
    normalizer,
)
from policies.preflight.overfit import check_overfit
from policies.preflight.recording import Finding, Recording, read_recording
from policies.preflight.replay import check_replay
from policies.serving.served_policy import ServedPolicy

CHECKS = ("features", "units", "timing", "images", "open_loop", "overfit", "replay")


def run(cfg: PreflightConfig) -> dict:
    """Run the checks; returns how many passed, warned, were skipped.

    Raises ValueError, after all have run and preflight.json is written, where one failed.
    """
    if unknown := sorted(set(cfg.checks) - set(CHECKS)):
        raise ValueError(f"checks {unknown} are not known, expected some of {list(CHECKS)}")
    for name in ("frame_stride", "batch_size", "num_replays"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected at least 1")
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    recording = read_recording(Path(cfg.data).expanduser())
    policy = None
    if cfg.policy:
        policy = ServedPolicy(cfg.policy, compute.device, require_statistics=False)  # they are one of the checks
    findings: list[Finding] = []
    for check in (check for check in CHECKS if check in cfg.checks):
        # What needs the policy's inputs cannot run where the data set lacks them.
        if check in ("open_loop", "overfit") and any(f.status == "fail" and f.check == "features" for f in findings):
            findings.append(Finding(check, "skip", "the features do not fit, see above"))
        else:
            findings += run_check(check, recording, policy, cfg, compute, output_dir)
    counts = {status: sum(f.status == status for f in findings) for status in ("pass", "warn", "fail", "skip")}
    write_json(output_dir / "preflight.json", {"counts": counts, "findings": [asdict(f) for f in findings]})
    print(table(findings))
    if counts["fail"]:
        failed = "; ".join(f"{f.check}: {f.message}" for f in findings if f.status == "fail")
        raise ValueError(f"{counts['fail']} of {len(findings)} checks failed. {failed}")
    numbers = {f"num_{name}": count for name, count in counts.items()}
    for finding in findings:
        if finding.check == "open_loop" and finding.numbers:
            errors = {name: finding.numbers[name]["error"] for name in ("policy", "mean_action", "hold_last_action")}
            numbers |= {f"{name}_error": error for name, error in errors.items()}
    return numbers


def run_check(
    check: str,
    recording: Recording,
    policy: ServedPolicy | None,
    cfg: PreflightConfig,
    compute: Compute,
    output_dir: Path,
) -> list[Finding]:
    if check == "features":
        return check_features(recording, policy, cfg.rename_map)
    if check == "units":
        return check_units(recording, policy)
    if check == "timing":
        return check_timing(recording, policy)
    if check == "images":
        return check_images(recording)
    if check == "open_loop":
        return check_open_loop(recording, policy, cfg, output_dir / "open_loop")
    if check == "overfit":
        return check_overfit(recording, cfg, compute, output_dir / "overfit")
    return check_replay(recording, cfg)


def check_open_loop(
    recording: Recording, policy: ServedPolicy | None, cfg: PreflightConfig, folder: Path
) -> list[Finding]:
    """The policy's chunks against the recorded actions and against two rules that look at nothing."""
    if policy is None:
        return [Finding("open_loop", "skip", "no policy to ask: policy=<folder>")]
    episodes, is_held_out = held_out_episodes(recording, cfg)
    predict = open_loop.predictor(policy.policy, policy.preprocess, policy.postprocess)
    reading = open_loop.Reading(policy.inputs, dict(cfg.rename_map), cfg.frame_stride, cfg.batch_size)
    progress = tqdm(episodes, desc="open loop", unit="episode", mininterval=1.0)
    predicted = {e: open_loop.predict_episode(predict, recording, reading, e) for e in progress}
    for episode, found in predicted.items():
        open_loop.plot(folder / f"episode_{episode:06d}.png", recording, episode, *found)
    result = open_loop.compare(recording, predicted, training_scale(recording, policy))
    numbers = open_loop.summary(result) | {"episodes": episodes}
    numbers["by_dimension"] = {name: error.round(4).tolist() for name, error in result.by_dimension.items()}
    horizon_s = result.chunk_size / recording.fps
    what = (
        f"error over chunks of {horizon_s:.2f} s in episodes {episodes}, in standard deviations: policy "
        f"{numbers['policy']['error']:.3f}, mean action {numbers['mean_action']['error']:.3f}, holding the last action "
        f"{numbers['hold_last_action']['error']:.3f}"
    )
    if not is_held_out:
        what += ". The policy may have been trained on these episodes: name others with episodes="
    differences = [numbers[f"minus_{rule}"] for rule in ("mean_action", "hold_last_action")]
    if any(difference["value"] >= 0 for difference in differences):
        advice = "A rule that looks at nothing does better: more demonstrations, steps, or the state as an input"
        return [Finding("open_loop", "fail", f"{what}. {advice}", numbers)]
    if any(difference["high"] >= 0 for difference in differences) or not is_held_out:
        return [Finding("open_loop", "warn", what, numbers)]
    return [Finding("open_loop", "pass", what, numbers)]


def held_out_episodes(recording: Recording, cfg: PreflightConfig) -> tuple[list[int], bool]:
    """The episodes to predict, and whether the policy is known not to have been trained on them."""
    if cfg.episodes:
        if outside := [e for e in cfg.episodes if not 0 <= e < recording.num_episodes]:
            raise ValueError(f"episodes {outside} are not in the data set: it has 0 to {recording.num_episodes - 1}")
        return list(cfg.episodes), True
    metrics = Path(cfg.policy or "").expanduser() / "metrics.json"
    num_trained = read_json(metrics).get("num_episodes") if metrics.is_file() else None
    if num_trained is not None and num_trained < recording.num_episodes:
        return list(range(num_trained, recording.num_episodes)), True
    num_last = max(1, round(0.1 * recording.num_episodes))
    return list(range(recording.num_episodes - num_last, recording.num_episodes)), False


def training_scale(recording: Recording, policy: ServedPolicy) -> open_loop.Scale:
    """What the policy's training data looked like; the data set's own numbers where the policy does not say."""
    step = normalizer(policy)
    stored = (step.stats or {}).get("action", {}) if step is not None else {}
    size = recording.actions.shape[1]
    if all(np.size(np.asarray(stored.get(name, ()))) == size for name in ("mean", "std")):
        return open_loop.Scale(*(np.ravel(np.asarray(stored[name], np.float64)) for name in ("mean", "std")))
    return open_loop.Scale(recording.actions.mean(0), recording.actions.std(0))


def table(findings: list[Finding]) -> str:
    width = max(len(finding.check) for finding in findings) if findings else 0
    return "\n".join(f"{f.status.upper():4}  {f.check:<{width}}  {f.message}" for f in findings)
