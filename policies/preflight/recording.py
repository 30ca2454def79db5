"""A robot's data set, as the checks look at it: its numbers at once, its frames one by one at their own size.

Shapes: N frames of all episodes, A action dimensions, S state dimensions, T chunk size.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from lerobot.utils.constants import ACTION, OBS_STATE

from lapa.checkpoint import read_json
from lapa.data import decode_span


@dataclass(frozen=True)
class Finding:
    """What one check found: status is pass, warn, fail or skip."""

    check: str
    status: str
    message: str  # what was found, and what to do about it
    numbers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Recording:
    """A LeRobotDataset v3.0 with actions.

    actions (N, A) and states (N, S) are float64, states None where the data set has none; timestamps (N,) seconds;
    starts (E + 1): the rows of episode e are starts[e] to starts[e + 1].
    """

    folder: Path
    meta: Any  # LeRobotDatasetMetadata
    actions: np.ndarray
    states: np.ndarray | None
    timestamps: np.ndarray
    starts: np.ndarray

    @property
    def fps(self) -> float:
        return float(self.meta.fps)

    @property
    def num_episodes(self) -> int:
        return len(self.starts) - 1

    @property
    def episode_of_row(self) -> np.ndarray:
        return np.repeat(np.arange(self.num_episodes), np.diff(self.starts))

    def rows(self, episode: int) -> slice:
        return slice(int(self.starts[episode]), int(self.starts[episode + 1]))

    def instruction(self, episode: int) -> str:
        tasks = self.meta.episodes[episode]["tasks"]
        return tasks[0] if len(tasks) else ""

    def names(self, feature: str) -> list[str]:
        """One name for each number of a feature: the data set's, or "action 3"."""
        size = int(np.prod(self.meta.features[feature]["shape"]))
        names = self.meta.features[feature].get("names")
        known = isinstance(names, list) and len(names) == size and all(isinstance(name, str) for name in names)
        return list(names) if known else [f"{feature.rsplit('.', 1)[-1]} {number}" for number in range(size)]

    def frames(self, episode: int, camera: str) -> Iterator[np.ndarray]:
        """The episode's frames (H, W, 3) uint8, as they are stored."""
        num_frames = int(self.starts[episode + 1] - self.starts[episode])
        if camera in self.meta.video_keys:
            start_s = float(self.meta.episodes[episode][f"videos/{camera}/from_timestamp"])
            video = self.folder / self.meta.get_video_file_path(episode, camera)
            yield from decode_span(video, start_s, num_frames, self.fps)
            return
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        dataset = LeRobotDataset(self.folder.name, root=self.folder, episodes=[episode], video_backend="pyav")
        for row in range(num_frames):
            yield (dataset[row][camera].permute(1, 2, 0) * 255).round().byte().numpy()


def read_recording(folder: Path) -> Recording:
    """Read everything but the frames; ValueError where it is no LeRobotDataset v3.0 with actions."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    info = folder / "meta" / "info.json"
    if not info.is_file():
        raise ValueError(f"no {info}: data must name the folder of a LeRobotDataset v3.0")
    version = str(read_json(info).get("codebase_version"))
    if version.startswith("v2"):
        raise ValueError(f"{folder} is of LeRobot version {version}: run `lapa convert` on it first")
    meta = LeRobotDatasetMetadata(folder.resolve().name, root=folder)
    if ACTION not in meta.features:
        raise ValueError(
            f"{folder} has no feature 'action', only {sorted(meta.features)}: a robot cannot learn from it"
        )
    columns = ["episode_index", "timestamp", ACTION, *([OBS_STATE] if OBS_STATE in meta.features else [])]
    tables = [pq.read_table(path, columns=columns) for path in sorted((folder / "data").rglob("*.parquet"))]
    values = {
        name: np.concatenate([np.array(table[name].to_pylist(), np.float64) for table in tables]) for name in columns
    }
    episode_of_row = values["episode_index"].astype(np.int64)
    if (np.diff(episode_of_row) < 0).any():
        raise ValueError(f"the rows of {folder} are not in the order of its episodes")
    lengths = np.bincount(episode_of_row, minlength=meta.total_episodes)
    if not lengths.all():
        raise ValueError(f"episode {int(np.argmin(lengths))} of {folder} has no rows")
    states = values.get(OBS_STATE)
    return Recording(
        folder=folder,
        meta=meta,
        actions=values[ACTION].reshape(len(episode_of_row), -1),
        states=None if states is None else states.reshape(len(episode_of_row), -1),
        timestamps=values["timestamp"],
        starts=np.concatenate([[0], np.cumsum(lengths)]),
    )
