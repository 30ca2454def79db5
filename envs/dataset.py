"""Shards to a LeRobotDataset v3 folder, in one pass.

LeRobot's own writer appends one episode at a time, at about a tenth of a second each. Here the shards' videos are
taken as they are, one file each, and the tables are written at once; the layout, names and file formats come from
LeRobot's own functions, and LeRobotDataset reads the result.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from envs.shards import CRF, KEYFRAME_INTERVAL, PIXEL_FORMAT, PRESET
from envs.suites import Body

CAMERA = "observation.images.top"
FILES_PER_CHUNK = 1000
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


@dataclass
class Shard:
    """A finished shard, read back. Rows of all its episodes one after the other."""

    folder: Path
    body: Body
    episodes: list[dict]
    skipped: list[dict]
    lengths: np.ndarray  # (E,)
    states: np.ndarray  # (N, S)
    actions: np.ndarray  # (N, A)
    pixels: np.ndarray  # (E, P, 3) uint8, a sample


def read_shard(folder: Path, options: Any) -> Shard:
    """Read a shard; ValueError where it was made with other options than this dataclass, such as ShardOptions."""
    summary = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
    if summary["options"] != json.loads(json.dumps(asdict(options))):
        raise ValueError(
            f"{folder} was made with {summary['options']}, asked for is {options}: "
            f"choose another output_dir, or delete {folder.parent}"
        )
    names = {key: tuple(summary["body"][key]) for key in ("state_names", "action_names")}
    body = Body(**summary["body"] | names)
    if not summary["episodes"]:
        empty = np.zeros((0, 0), np.float32)
        pixels = np.zeros((0, 1, 3), np.uint8)
        return Shard(folder, body, [], summary["skipped"], np.zeros(0, int), empty, empty, pixels)
    with np.load(folder / "steps.npz") as steps:
        return Shard(
            folder,
            body,
            summary["episodes"],
            summary["skipped"],
            steps["lengths"],
            steps["states"],
            steps["actions"],
            steps["pixels"],
        )


def statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics over the first axis of (N, D)."""
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def pixel_statistics(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The same of pixels (P, 3) uint8, in [0, 1] and shaped (3, 1, 1)."""
    of_rows = statistics(pixels.astype(np.float64) / 255)
    return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in of_rows.items()}


def write_dataset(
    folder: Path,
    shards: list[Shard],
    image_size: int,
    with_actions: bool,
    with_instructions: bool = True,
) -> None:
    """Write one LeRobotDataset v3 at `folder`, which appears only when it is complete.

    with_actions False leaves out action and observation.state: a data set of video and instructions.
    with_instructions False leaves every instruction empty.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.datasets.io_utils import write_info, write_stats, write_tasks
    from lerobot.datasets.utils import DEFAULT_EPISODES_PATH
    from pandas import DataFrame, Index

    shards = [shard for shard in shards if shard.episodes]
    body = shards[0].body
    features: dict[str, dict] = {
        CAMERA: {"dtype": "video", "shape": (image_size, image_size, 3), "names": ["height", "width", "channels"]}
    }
    if with_actions:
        for key, names in (("observation.state", body.state_names), ("action", body.action_names)):
            features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    meta = LeRobotDatasetMetadata.create(
        folder.name, fps=body.control_hz, features=features, root=partial, robot_type=body.robot_type
    )

    lengths = np.concatenate([shard.lengths for shard in shards])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    instructions = [episode["instruction"] if with_instructions else "" for s in shards for episode in s.episodes]
    task_of = {text: index for index, text in enumerate(dict.fromkeys(instructions))}
    meta.tasks = DataFrame({"task_index": list(task_of.values())}, index=Index(list(task_of), name="task"))
    write_tasks(meta.tasks, meta.root)

    frame_index = np.concatenate([np.arange(length) for length in lengths])
    columns: dict[str, np.ndarray] = {
        "timestamp": (frame_index / body.control_hz).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(starts[-1]),
        "task_index": np.repeat([task_of[text] for text in instructions], lengths),
    }
    if with_actions:
        columns["observation.state"] = np.concatenate([shard.states for shard in shards])
        columns["action"] = np.concatenate([shard.actions for shard in shards])
    schema = get_hf_features_from_features(meta.features).arrow_schema
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(columns[name].ravel()), columns[name].shape[1])
        if columns[name].ndim == 2
        else pa.array(columns[name])
        for name in schema.names
    ]
    data_path = meta.root / meta.data_path.format(chunk_index=0, file_index=0)
    data_path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), data_path)

    rows: list[dict] = []
    for number, shard in enumerate(shards):
        chunk_index, file_index = divmod(number, FILES_PER_CHUNK)
        video = meta.root / meta.video_path.format(video_key=CAMERA, chunk_index=chunk_index, file_index=file_index)
        video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shard.folder / "frames.mp4", video)
        video_start = 0
        for length, pixels in zip(shard.lengths, shard.pixels, strict=True):
            index = len(rows)
            first, last = int(starts[index]), int(starts[index + 1])
            row = {
                "episode_index": index,
                "tasks": [instructions[index]],
                "length": int(length),
                "data/chunk_index": 0,
                "data/file_index": 0,
                "dataset_from_index": first,
                "dataset_to_index": last,
                f"videos/{CAMERA}/chunk_index": chunk_index,
                f"videos/{CAMERA}/file_index": file_index,
                f"videos/{CAMERA}/from_timestamp": video_start / body.control_hz,
                f"videos/{CAMERA}/to_timestamp": (video_start + int(length)) / body.control_hz,
            }
            video_start += int(length)
            of_episode = {name: statistics(as_rows(values[first:last])) for name, values in columns.items()}
            for name, values in {**of_episode, CAMERA: pixel_statistics(pixels)}.items():
                row |= {f"stats/{name}/{key}": value.tolist() for key, value in values.items()}
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            rows.append(row)
    episodes_path = meta.root / DEFAULT_EPISODES_PATH.format(chunk_index=0, file_index=0)
    episodes_path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), episodes_path)

    overall = {name: statistics(as_rows(values)) for name, values in columns.items()}
    overall[CAMERA] = pixel_statistics(np.concatenate([shard.pixels.reshape(-1, 3)[::4] for shard in shards]))
    write_stats(overall, meta.root)
    meta.info.total_episodes = len(lengths)
    meta.info.total_frames = int(starts[-1])
    meta.info.total_tasks = len(task_of)
    meta.info.splits = {"train": f"0:{len(lengths)}"}
    encoder = RGBEncoderConfig(
        vcodec="h264", pix_fmt=PIXEL_FORMAT, crf=CRF, g=KEYFRAME_INTERVAL, preset=PRESET, extra_options={"bf": 0}
    )
    meta.update_video_info(CAMERA, video_encoder=encoder)
    write_info(meta.info, meta.root)
    partial.replace(folder)


def as_rows(values: np.ndarray) -> np.ndarray:
    """(N,) or (N, D) to float64 (N, D)."""
    return values.reshape(len(values), -1).astype(np.float64)
