"""Open-loop error: chunks predicted from recorded frames against the actions that were recorded.

For every frame t the policy predicts actions t to t + T - 1. They are compared with the recorded ones, and with what
two rules that look at nothing would say: the mean action of the policy's training data, and the action before t held
for the whole chunk. Errors are absolute, in standard deviations of the training data's actions, averaged over
dimensions and over the chunk. At a high frame rate holding is hard to beat one step ahead and easy at the end of a
chunk, so errors are reported for both.

Shapes: F frames, T chunk size, A action dimensions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE

from lapa.data import STILL
from lapa.report import png
from lapa.statistics import interval
from policies.preflight.recording import Recording

NUM_RESAMPLES = 2000
Predict = Callable[[dict[str, Any]], np.ndarray]  # a batch of observations -> chunks (B, T, A) in the robot's units


@dataclass(frozen=True)
class Scale:
    """Mean (A,) and standard deviation (A,) of the actions that errors are measured in."""

    mean: np.ndarray
    std: np.ndarray

    @property
    def is_moving(self) -> np.ndarray:
        """(A,): dimensions that are compared; one that never moved has no scale."""
        return self.std > STILL


@dataclass(frozen=True)
class OpenLoop:
    """Absolute errors in standard deviations (F, T), NaN behind the end of the episode; and where they come from."""

    errors: dict[str, np.ndarray]  # policy, mean_action, hold_last_action
    by_dimension: dict[str, np.ndarray]  # (A,)
    block: np.ndarray  # (F,): frames of a chunk's length in one episode are resampled together
    chunk_size: int


def predictor(policy, preprocess, postprocess) -> Predict:
    def predict(batch: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            return postprocess(policy.predict_action_chunk(preprocess(batch))).float().cpu().numpy()

    return predict


@dataclass(frozen=True)
class Reading:
    """What a policy reads (name and shape of each input), under which names, and how many frames at once."""

    inputs: dict[str, tuple]
    rename_map: dict[str, str]  # the data set's name: the policy's
    stride: int
    batch_size: int


def observations(recording: Recording, reading: Reading, episode: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """(frame numbers, batch) of every stride-th frame of an episode."""
    stored = {reading.rename_map.get(name, name): name for name in recording.meta.features}
    pictured = [name for name, shape in reading.inputs.items() if name in stored and len(shape) == 3]
    cameras = {name: recording.frames(episode, stored[name]) for name in pictured}
    first, behind = recording.starts[episode : episode + 2]
    waiting: dict[str, list] = {name: [] for name in cameras}
    numbers: list[int] = []
    for number in range(int(behind - first)):
        frames = {name: next(source, None) for name, source in cameras.items()}
        if missing := [name for name, frame in frames.items() if frame is None]:
            raise ValueError(
                f"{missing[0]} of episode {episode} ends at frame {number} of {behind - first}: leave the episode out"
            )
        if number % reading.stride:
            continue
        numbers.append(number)
        for name, frame in frames.items():
            waiting[name].append(frame)
        is_last = number + reading.stride >= behind - first
        if len(numbers) == reading.batch_size or is_last:
            batch: dict[str, Any] = {"task": [recording.instruction(episode)] * len(numbers)}
            for name, collected in waiting.items():
                pixels = torch.from_numpy(np.stack(collected)).permute(0, 3, 1, 2)
                batch[name] = pixels.float() / 255
            if OBS_STATE in reading.inputs and recording.states is not None:
                batch[OBS_STATE] = torch.from_numpy(recording.states[first + np.array(numbers)]).float()
            if ACTION in reading.inputs:
                # The action before; the first frame, which has none, is not compared.
                before = first + np.maximum(np.array(numbers) - 1, 0)
                batch[ACTION] = torch.from_numpy(recording.actions[before]).float()[:, None]
            yield np.array(numbers), batch
            waiting, numbers = {name: [] for name in cameras}, []


def predict_episode(
    predict: Predict, recording: Recording, reading: Reading, episode: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers (F,) and predicted chunks (F, T, A)."""
    numbers, chunks = [], []
    for picked, batch in observations(recording, reading, episode):
        numbers.append(picked)
        chunks.append(predict(batch))
    return np.concatenate(numbers), np.concatenate(chunks)


def compare(recording: Recording, predicted: dict[int, tuple[np.ndarray, np.ndarray]], scale: Scale) -> OpenLoop:
    """The errors of predicted chunks, {episode: (frame numbers, chunks)}, and of the two rules."""
    errors: dict[str, list[np.ndarray]] = {"policy": [], "mean_action": [], "hold_last_action": []}
    blocks: list[np.ndarray] = []
    chunk_size = 1
    for episode, (numbers, chunks) in predicted.items():
        recorded = recording.actions[recording.rows(episode)]
        chunk_size = chunks.shape[1]
        # From the first frame there is no action before it to hold.
        numbers, chunks = numbers[numbers > 0], chunks[numbers > 0]
        ahead = numbers[:, None] + np.arange(chunk_size)
        is_past = ahead >= len(recorded)
        true = recorded[np.minimum(ahead, len(recorded) - 1)]
        guesses = {
            "policy": chunks,
            "mean_action": np.broadcast_to(scale.mean, true.shape),
            "hold_last_action": np.broadcast_to(recorded[numbers - 1][:, None], true.shape),
        }
        for name, guess in guesses.items():
            error = np.abs(guess - true) / np.maximum(scale.std, STILL)
            errors[name].append(np.where(is_past[..., None], np.nan, error)[..., scale.is_moving])
        blocks.append(np.stack([np.full(len(numbers), episode), numbers // chunk_size], axis=1))
    joined = {name: np.concatenate(parts) for name, parts in errors.items()}
    _, block = np.unique(np.concatenate(blocks), axis=0, return_inverse=True)
    return OpenLoop(
        errors={name: error.mean(-1) for name, error in joined.items()},
        by_dimension={name: np.nanmean(error, axis=(0, 1)) for name, error in joined.items()},
        block=block.ravel(),
        chunk_size=chunk_size,
    )


def summary(result: OpenLoop, seed: int = 0) -> dict[str, Any]:
    """Mean errors, also by step of a chunk, and policy minus each rule with a 95% interval.

    The interval resamples blocks: neighbouring frames have nearly the same chunk ahead of them.
    """
    sums = {name: (np.nansum(e, 1), np.isfinite(e).sum(1)) for name, e in result.errors.items()}
    numbers: dict[str, Any] = {}
    for name, (total, count) in sums.items():
        at_step = [step[np.isfinite(step)] for step in result.errors[name].T]
        by_step = [float(errors.mean()) for errors in at_step if len(errors)]
        numbers[name] = {"error": float(total.sum() / count.sum()), "by_step": [round(e, 4) for e in by_step]}
    num_blocks = int(result.block.max()) + 1
    of_block = {name: np.bincount(result.block, total, num_blocks) for name, (total, _) in sums.items()}
    counts = np.bincount(result.block, sums["policy"][1], num_blocks)
    picks = np.random.default_rng(seed).integers(num_blocks, size=(NUM_RESAMPLES, num_blocks))
    for rule in ("mean_action", "hold_last_action"):
        difference = of_block["policy"] - of_block[rule]
        low, high = interval(difference[picks].sum(1) / counts[picks].sum(1))
        value = numbers["policy"]["error"] - numbers[rule]["error"]
        numbers[f"minus_{rule}"] = {"value": value, "low": low, "high": high}
    return numbers | {"num_frames": len(result.block), "num_blocks": num_blocks, "chunk_size": result.chunk_size}


def plot(path: Path, recording: Recording, episode: int, numbers: np.ndarray, chunks: np.ndarray) -> None:
    """Each dimension over time: recorded, and predicted chunk after chunk, as a robot would carry them out."""
    from matplotlib.figure import Figure

    recorded = recording.actions[recording.rows(episode)]
    names = recording.names(ACTION)
    columns = min(4, len(names))
    num_rows = -(-len(names) // columns)
    height = 1.7 * num_rows + 1.0
    # Placed by hand: matplotlib's own layout takes longer than the prediction where a robot has many joints.
    figure = Figure(figsize=(3.4 * columns, height))
    all_axes = figure.subplots(num_rows, columns, squeeze=False, sharex=True)
    figure.subplots_adjust(
        left=0.6 / (3.4 * columns), right=0.99, top=1 - 0.6 / height, bottom=0.55 / height, hspace=0.35, wspace=0.25
    )
    time_s = np.arange(len(recorded)) / recording.fps
    begins, last = [], -chunks.shape[1]
    for place, number in enumerate(numbers):
        if number >= last + chunks.shape[1]:
            begins.append(place)
            last = number
    for axes, dimension in zip(all_axes.flat, range(len(names)), strict=False):
        axes.plot(time_s, recorded[:, dimension], color="#222", lw=1.2, label="recorded")
        for place in begins:
            steps = numbers[place] + np.arange(chunks.shape[1])
            steps = steps[steps < len(recorded)]
            axes.plot(
                time_s[steps],
                chunks[place, : len(steps), dimension],
                color="#c8452d",
                lw=1.2,
                label="predicted, a chunk at a time" if place == begins[0] else None,
            )
            axes.plot(time_s[steps[0]], chunks[place, 0, dimension], ".", color="#c8452d", ms=4)
        axes.set_title(names[dimension], fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(all_axes.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("time (s)", fontsize=8)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
