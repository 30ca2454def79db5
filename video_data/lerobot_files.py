"""Video files and captions to a LeRobotDataset v3 folder, in one pass.

LeRobot's own writer appends one episode at a time, at about a tenth of a second each, and importing it takes longer
than ingesting a thousand clips. So the files of the format (codebase version v3.0, as LeRobot 0.6 writes and reads
it) are written here; LeRobotDataset reads the result.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.top"
FILES_PER_CHUNK = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
COLUMNS = {
    "timestamp": "float32",  # seconds from the episode's first frame
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
PIXELS_KEPT_EVERY = 16  # of an episode's sample, for the statistics of the whole


class Episode(NamedTuple):
    """Where one clip lies, and what it is called."""

    file: Path
    start: int  # first frame within the file
    length: int  # frames
    caption: str


def write_dataset(folder: Path, episodes: list[Episode], pixels: Iterable[np.ndarray], fps: int) -> None:
    """Write one data set of video and instructions at `folder`, which appears only when it is complete.

    pixels: a sample (P, 3) uint8 of each episode. The video files stay where they are, too.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    task_of = {text: index for index, text in enumerate(dict.fromkeys(episode.caption for episode in episodes))}
    lengths = np.array([episode.length for episode in episodes])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    frame_index = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    columns: dict[str, np.ndarray] = {
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(starts[-1]),
        "task_index": np.repeat([task_of[episode.caption] for episode in episodes], lengths),
    }
    number_of = {file: number for number, file in enumerate(dict.fromkeys(episode.file for episode in episodes))}
    rows, kept_pixels = [], []
    for index, (episode, sample) in enumerate(zip(episodes, pixels, strict=True)):
        first, last = int(starts[index]), int(starts[index + 1])
        row = _episode_row(index, episode, first, number_of[episode.file], fps)
        of_episode = column_statistics({name: values[first:last] for name, values in columns.items()})
        for name, values in {**of_episode, CAMERA: pixel_statistics(sample)}.items():
            row |= {f"stats/{name}/{key}": value.tolist() for key, value in values.items()}
        rows.append(row)
        kept_pixels.append(sample[::PIXELS_KEPT_EVERY])
    overall = column_statistics(columns)
    overall[CAMERA] = pixel_statistics(np.concatenate(kept_pixels))

    _place_videos(partial, number_of)
    _write_data(partial / DATA_PATH.format(chunk_index=0, file_index=0), columns)
    _write_table(partial / EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(rows))
    _write_tasks(partial / "meta" / "tasks.parquet", task_of)
    stats = {name: {key: value.tolist() for key, value in values.items()} for name, values in overall.items()}
    _write_json(partial / "meta" / "stats.json", stats)
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": _features(episodes[0].file, fps),
        "total_episodes": len(episodes),
        "total_frames": int(starts[-1]),
        "total_tasks": len(task_of),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "robot_type": None,
        "splits": {"train": f"0:{len(episodes)}"},
    }
    _write_json(partial / "meta" / "info.json", info)
    partial.replace(folder)


def _episode_row(index: int, episode: Episode, first: int, file_number: int, fps: int) -> dict:
    chunk_index, file_index = divmod(file_number, FILES_PER_CHUNK)
    return {
        "episode_index": index,
        "tasks": [episode.caption],
        "length": episode.length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": first,
        "dataset_to_index": first + episode.length,
        f"videos/{CAMERA}/chunk_index": chunk_index,
        f"videos/{CAMERA}/file_index": file_index,
        f"videos/{CAMERA}/from_timestamp": episode.start / fps,
        f"videos/{CAMERA}/to_timestamp": (episode.start + episode.length) / fps,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _features(video: Path, fps: int) -> dict:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        height, width = stream.height, stream.width
        codec, pixel_format = stream.codec.canonical_name, stream.codec_context.pix_fmt
    camera = {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": codec,
            "video.pix_fmt": pixel_format,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        },
    }
    return {CAMERA: camera} | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COLUMNS.items()}


def _place_videos(folder: Path, number_of: dict[Path, int]) -> None:
    for file, number in number_of.items():
        chunk_index, file_index = divmod(number, FILES_PER_CHUNK)
        path = folder / VIDEO_PATH.format(video_key=CAMERA, chunk_index=chunk_index, file_index=file_index)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link, so that the shards stay whole until the data set is; a copy where the disk has no links.
        try:
            os.link(file, path)
        except OSError:
            shutil.copyfile(file, path)


def _write_data(path: Path, columns: dict[str, np.ndarray]) -> None:
    # The `datasets` package reads the types of the columns from here.
    described = {"info": {"features": {name: {"dtype": dtype, "_type": "Value"} for name, dtype in COLUMNS.items()}}}
    table = pa.table({name: pa.array(columns[name]) for name in COLUMNS})
    _write_table(path, table.replace_schema_metadata({"huggingface": json.dumps(described)}))


def _write_tasks(path: Path, task_of: dict[str, int]) -> None:
    from pandas import DataFrame, Index

    tasks = DataFrame({"task_index": list(task_of.values())}, index=Index(list(task_of), name="task"))
    tasks.to_parquet(path)


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics over the first axis of (N, D)."""
    rows = rows.astype(np.float64)
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def column_statistics(columns: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The same of columns (N,) each, all at once: a thousand episodes have five thousand columns."""
    of_all = statistics(np.stack(list(columns.values()), axis=1))
    return {
        name: {key: value if key == "count" else value[index : index + 1] for key, value in of_all.items()}
        for index, name in enumerate(columns)
    }


def pixel_statistics(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The same of pixels (P, 3) uint8, in [0, 1] and shaped (3, 1, 1)."""
    of_rows = statistics(pixels / 255)
    return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in of_rows.items()}
