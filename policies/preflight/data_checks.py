"""Checks that need no prediction: features, units, timing, images.

Thresholds are wide on purpose: they catch degrees for radians, a camera that stood still, statistics of another
robot, and not a data set that is merely a little different.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE

from lapa.data import STILL, action_nearness
from policies.lapa.processor_lapa import STATISTICS, missing_statistics
from policies.preflight.recording import Finding, Recording
from policies.serving.served_policy import ServedPolicy

DEGREES = 180 / np.pi
FACTORS = {
    "degrees for radians": DEGREES,
    "radians for degrees": 1 / DEGREES,
    "millimetres for metres": 1000.0,
    "metres for millimetres": 0.001,
}
ANGLES = ("degrees for radians", "radians for degrees")
RARE = 0.005  # of the steps: a gripper that opens and shuts jumps more often than that
FAR = 5.0  # standard deviations of the policy from its mean: values it has hardly seen
MAX_LAG_S = 0.5
GRIPPER_WORDS = ("grip", "hand", "finger", "thumb", "claw")
DARK, BRIGHT = 8, 247  # mean grey levels below and above which a frame shows nothing
FROZEN_SHARE = 0.2  # of an episode's frames that repeat the one before, while the robot moves


def worst(check: str, findings: Iterable[Finding], fine: str, numbers: dict | None = None) -> list[Finding]:
    """The findings, or one that says that all is well."""
    return list(findings) or [Finding(check, "pass", fine, numbers)]


def check_features(recording: Recording, policy: ServedPolicy | None, rename_map: dict[str, str]) -> list[Finding]:
    """Does the data set have what the policy reads and writes, by name and shape?"""
    features = recording.meta.features
    cameras = list(recording.meta.camera_keys)
    if policy is None:
        if not cameras:
            return [Finding("features", "fail", f"no camera among {sorted(features)}: record one")]
        state = "no state" if recording.states is None else f"{recording.states.shape[1]}-D state"
        found = f"{recording.actions.shape[1]}-D action, {state}, cameras {cameras}"
        return [Finding("features", "pass", found)]
    return worst("features", _feature_faults(recording, policy, rename_map), "the policy's inputs and output are there")


def _feature_faults(recording: Recording, policy: ServedPolicy, rename_map: dict[str, str]) -> Iterator[Finding]:
    features = recording.meta.features
    renamed = {rename_map.get(name, name): name for name in features}
    for wanted, shape in policy.inputs.items():
        if wanted not in renamed:
            yield Finding(
                "features",
                "fail",
                f"the policy reads {wanted!r}, which the data set does not have ({sorted(features)}): "
                f"rename_map='{{<its name>: {wanted}}}', or record it",
            )
            continue
        stored = tuple(features[renamed[wanted]]["shape"])
        if len(shape) == 1 and stored != shape:
            yield Finding("features", "fail", f"{wanted} has shape {stored}, the policy was made for {shape}")
        if len(shape) == 3 and len(stored) == 3:
            height, width = stored[:2] if stored[2] in (1, 3) else stored[1:]
            if abs(np.log(height / width * shape[2] / shape[1])) > 0.05:
                yield Finding(
                    "features",
                    "warn",
                    f"{wanted} is {width}x{height} pixels, the policy sees {shape[2]}x{shape[1]}: pictures "
                    "are squeezed. That is well where the training pictures were squeezed alike",
                )
    size = policy.action_shape[1]
    if recording.actions.shape[1] != size:
        yield Finding("features", "fail", f"actions have {recording.actions.shape[1]} numbers, the policy's {size}")


def check_units(recording: Recording, policy: ServedPolicy | None) -> list[Finding]:
    """Are numbers finite, moving, in one unit, and in the unit that the policy was trained in?"""
    findings = list(_number_faults(recording))
    findings += _kind_of_action(recording)
    if policy is not None:
        findings += _statistics_faults(recording, policy)
    return findings


def _number_faults(recording: Recording) -> Iterator[Finding]:
    for name, values in ((ACTION, recording.actions), (OBS_STATE, recording.states)):
        if values is None:
            continue
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            yield Finding(
                "units", "fail", f"{name} has numbers that are not finite, first in row {row}: leave the episode out"
            )
            continue
        still = values.std(0) < STILL
        names = [label for label, is_still in zip(recording.names(name), still, strict=True) if is_still]
        if names:
            held = [label for label in names if any(word in label.lower() for word in GRIPPER_WORDS)]
            advice = f"; {held} is a gripper that never moves, so grasping cannot be learned" if held else ""
            yield Finding("units", "warn", f"{name} never changes in {names}{advice}")
    steps = [np.abs(np.diff(recording.actions[recording.rows(e)], axis=0)) for e in range(recording.num_episodes)]
    jumps = np.concatenate(steps) if steps else np.zeros((0, 1))
    # A jump is larger than half of all that a dimension ever does, within one step.
    spread = np.ptp(recording.actions, axis=0)
    is_jump = (jumps > 0.5 * spread) & (spread > STILL)
    rare = is_jump.any(0) & (is_jump.mean(0) < RARE)
    if rare.any():
        names = [name for name, found in zip(recording.names(ACTION), rare, strict=True) if found]
        yield Finding(
            "units",
            "warn",
            f"the action jumps by more than half of its range in {int(is_jump[:, rare].any(1).sum())} steps ({names}): "
            "look at these steps for glitches before a robot repeats them",
        )


def _factor(ratio: float) -> str:
    """The mistake of units that explains the ratio of two spreads; empty where none does."""
    return next((text for text, factor in FACTORS.items() if abs(np.log(ratio / factor)) < 0.25), "")


def _moving(values: np.ndarray) -> np.ndarray:
    return values.std(0) > STILL


def _kind_of_action(recording: Recording) -> list[Finding]:
    """Positions to go to, displacements, or neither; and their scale against the state's."""
    actions, states = recording.actions, recording.states
    if states is None or states.shape[1] != actions.shape[1]:
        return [Finding("units", "pass", "action and state differ in size, so their units are not compared")]
    moving = _moving(actions) & _moving(states)
    if not moving.any():
        return [Finding("units", "fail", "neither action nor state ever changes: the robot did not move")]
    near_state, near_change = action_nearness(actions, states, recording.starts)
    ratio = float(np.median(actions[:, moving].std(0) / states[:, moving].std(0)))
    numbers = {"near_state": near_state, "near_state_change": near_change, "action_std_to_state_std": ratio}
    unit = _factor(ratio)
    if unit in ANGLES and near_state > 1 / DEGREES and near_change > 0.7:
        message = f"actions vary {ratio:.3g} times as much as states, as with {unit}: convert one of them"
        return [Finding("units", "fail", message, numbers)]
    if near_change < 0.7 and near_change < near_state:
        return [Finding("units", "pass", "actions are displacements: they are near the change of the state", numbers)]
    if near_state < 1.0:
        if near_state < STILL:
            return [
                Finding(
                    "units",
                    "warn",
                    "the action of every frame is the state of that frame: a policy that copies the state has no loss, "
                    "and moves nothing. Record commands, or shift the actions by a step",
                    numbers,
                )
            ]
        return [Finding("units", "pass", "actions are positions: they are near the state", numbers)]
    return [
        Finding(
            "units",
            "warn",
            "actions are near neither the state nor its change: say in which unit they are before a robot gets them",
            numbers,
        )
    ]


def normalizer(policy: ServedPolicy) -> NormalizerProcessorStep | None:
    return next((step for step in policy.preprocess.steps if isinstance(step, NormalizerProcessorStep)), None)


def _statistics_faults(recording: Recording, policy: ServedPolicy) -> list[Finding]:
    step = normalizer(policy)
    if step is None:
        return [Finding("units", "warn", "the policy's preprocessor normalises nothing: it works in raw units")]
    all_missing = missing_statistics(step.features, step.norm_map, step.stats)
    findings = [
        Finding(
            "units",
            "fail",
            f"the policy has no statistics {missing} of {name}, by which it normalises: LeRobot passes it on in raw "
            "units. Make the policy's processors from the data set's statistics",
        )
        for name, missing in all_missing.items()
    ]
    for name, feature in step.features.items():
        mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
        stored = (step.stats or {}).get(name, {})
        values = {ACTION: recording.actions, OBS_STATE: recording.states}.get(name)
        if (
            name in all_missing
            or values is None
            or mode == NormalizationMode.IDENTITY
            or feature.type == FeatureType.VISUAL
        ):
            continue
        if len(np.ravel(np.asarray(stored[STATISTICS[mode][0]]))) == values.shape[1]:
            findings.append(_compare(recording.names(name), name, values, mode, stored))
    return findings


def centre_and_spread(mode: NormalizationMode, stored: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What stands for mean and standard deviation (A,) in the statistics that the policy normalises by."""
    low, high = (np.ravel(np.asarray(stored[key], np.float64)) for key in STATISTICS[mode])
    if mode == NormalizationMode.MEAN_STD:
        return low, high
    return (low + high) / 2, (high - low) / 4


def _compare(labels: list[str], name: str, values: np.ndarray, mode: NormalizationMode, stored: dict) -> Finding:
    """The policy's statistics against those of the data."""
    centre, spread = centre_and_spread(mode, stored)
    moving = _moving(values) & (spread > STILL)
    if not moving.any():
        return Finding("units", "warn", f"nothing of {name} moves both here and in the policy's training data")
    ratio = float(np.median(values.std(0)[moving] / spread[moving]))
    far = (np.abs(values - centre) > FAR * np.maximum(spread, STILL)).mean(0)
    numbers = {"data_std_to_policy_std": ratio, "share_far": dict(zip(labels, far.round(4).tolist(), strict=True))}
    unit = _factor(ratio)
    if unit or ratio > 10 or np.median(far[moving]) > 0.5:
        return Finding(
            "units",
            "fail",
            f"{name} varies {ratio:.3g} times as much as in the policy's training data"
            f"{f', as with {unit}' if unit else ''}; "
            f"{np.median(far[moving]):.0%} of its values lie more than {FAR:g} standard deviations off: other units or "
            "another robot",
            numbers,
        )
    strange = [label for label, share in zip(labels, far, strict=True) if share > 0.05]
    if strange:
        return Finding(
            "units",
            "warn",
            f"{name} of {strange} is often further than {FAR:g} standard deviations from what the policy was trained "
            "on: it has to extrapolate there",
            numbers,
        )
    return Finding("units", "pass", f"{name} has the scale that the policy was trained in", numbers)


def check_timing(recording: Recording, policy: ServedPolicy | None) -> list[Finding]:
    """Are timestamps regular, and does the state follow the action?"""
    return worst("timing", _timing_faults(recording, policy), "timestamps are regular") + _lag(recording)


def _timing_faults(recording: Recording, policy: ServedPolicy | None) -> Iterator[Finding]:
    step_s = 1 / recording.fps
    for episode in range(recording.num_episodes):
        steps = np.diff(recording.timestamps[recording.rows(episode)])
        if (steps <= 0).any():
            yield Finding(
                "timing",
                "fail",
                f"the time of episode {episode} goes back at frame {int(np.argmax(steps <= 0)) + 1}: leave it out",
            )
        elif len(steps) and np.abs(steps - step_s).max() > 0.5 * step_s:
            yield Finding(
                "timing",
                "fail",
                f"a step of episode {episode} lasts {steps[np.abs(steps - step_s).argmax()]:.3f} s, not {step_s:.3f}: "
                "frames were dropped, record it again or leave it out",
            )
    lengths = np.diff(recording.starts)
    num_steps = 1 if policy is None else policy.action_shape[0]
    if (lengths < num_steps).any():
        yield Finding(
            "timing",
            "warn",
            f"{int((lengths < num_steps).sum())} episodes are shorter than the policy's chunk of {num_steps} steps "
            f"({num_steps * step_s:.2f} s)",
        )


def _lag(recording: Recording) -> list[Finding]:
    """How many frames later the state is where the action asked it to be."""
    actions, states = recording.actions, recording.states
    if states is None or states.shape[1] != actions.shape[1]:
        return []
    within = np.mean([states[recording.rows(e)].std(0) for e in range(recording.num_episodes)], axis=0)
    # An arm that rests says nothing about time, though it may rest elsewhere in another episode.
    moving = _moving(actions) & _moving(states) & (within > 0.5 * states.std(0))
    if not moving.any():
        return []
    scale = states[:, moving].std(0)
    distances = {}
    for lag in range(-3, round(MAX_LAG_S * recording.fps) + 1):
        gaps = []
        for episode in range(recording.num_episodes):
            a, s = actions[recording.rows(episode)][:, moving], states[recording.rows(episode)][:, moving]
            if len(a) > abs(lag) + 1:
                gap = a[: len(a) - lag] - s[lag:] if lag >= 0 else a[-lag:] - s[: len(s) + lag]
                gaps.append(np.abs(gap) / scale)
        if gaps:
            distances[lag] = float(np.concatenate(gaps).mean())
    if not distances or min(distances.values()) > 0.5:
        return []  # not positions
    lag = min(distances, key=lambda key: distances[key])
    numbers = {"lag_frames": lag, "lag_s": lag / recording.fps}
    if lag < 0:
        return [
            Finding(
                "timing",
                "warn",
                f"the state is {-lag} frames ahead of the action: a frame's action should be the one sent after it",
                numbers,
            )
        ]
    follows = f"the state follows the action by {lag} frames ({lag / recording.fps:.2f} s)"
    return [Finding("timing", "pass", follows, numbers)]


def check_images(recording: Recording, num_episodes: int = 3) -> list[Finding]:
    """Do the cameras show something, and does it change when the robot moves? In a few episodes, spread evenly."""
    episodes = np.unique(np.linspace(0, recording.num_episodes - 1, num_episodes).round().astype(int)).tolist()
    cameras = list(recording.meta.camera_keys)
    faults = [fault for camera in cameras for e in episodes for fault in _image_faults(recording, camera, e)]
    return worst("images", faults, f"{cameras} show something that changes, in episodes {episodes}")


def _image_faults(recording: Recording, camera: str, episode: int) -> Iterator[Finding]:
    where = f"{camera} in episode {episode}"
    levels, repeats = [], []
    before = None
    try:
        for frame in recording.frames(episode, camera):
            small = frame[::8, ::8].astype(np.int16)
            levels.append(small.mean())
            if before is not None:
                repeats.append(bool((small == before).all()))
            before = small
    except (av.error.FFmpegError, OSError) as error:
        yield Finding("images", "fail", f"{where} cannot be decoded behind frame {len(levels)}: {error}")
        return
    expected = int(recording.starts[episode + 1] - recording.starts[episode])
    if len(levels) != expected:
        yield Finding("images", "fail", f"{where} has {len(levels)} frames that can be decoded, of {expected}")
        return
    for text, share in (("black", np.mean(np.array(levels) < DARK)), ("white", np.mean(np.array(levels) > BRIGHT))):
        if share > 0.05:
            message = f"{where} is {text} in {share:.0%} of its frames: check the camera, or leave the episode out"
            yield Finding("images", "fail", message)
    motion = np.abs(np.diff(recording.actions[recording.rows(episode)], axis=0)).sum(1) > STILL
    frozen = float(np.mean(np.array(repeats) & motion)) if repeats else 0.0
    if frozen > FROZEN_SHARE:
        status = "fail" if frozen > 0.8 else "warn"
        yield Finding(
            "images",
            status,
            f"{where} repeats the frame before in {frozen:.0%} of the steps in which the action changes: a frozen "
            "camera, or one slower than the control loop",
        )
