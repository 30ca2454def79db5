"""Video files and captions to a LeRobotDataset v3 folder, in one pass.

LeRobot's own writer appends one episode at a time, at about a tenth of a second each, and importing it takes longer
than ingesting a thousand clips. So the files of the format (codebase version v3.0, as LeRobot 0.6 writes and reads
it) are written here; LeRobotDataset reads the result.
"""

import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from video_data import json_lines

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
FRAMES_A_GROUP = 1 << 15  # rows of the table of frames in memory at once


class Episode(NamedTuple):
    """Where one clip lies, and what it is called."""

    file: Path
    start: int  # first frame within the file
    length: int  # frames
    caption: str


def write_dataset(
    folder: Path, list_episodes: Callable[[], Iterator[Episode]], pixels: Iterable[np.ndarray], fps: int
) -> None:
    """Write one data set of video and instructions at `folder`, which appears only when it is complete.

    list_episodes: called twice, so that nothing but numbers is kept of each. pixels: a sample (P, 3) uint8 of each
    episode. The video files stay where they are, too.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    task_of: dict[str, int] = {}
    number_of: dict[Path, int] = {}
    lengths, tasks = array("q"), array("q")
    for episode in list_episodes():
        lengths.append(episode.length)
        tasks.append(task_of.setdefault(episode.caption, len(task_of)))
        number_of.setdefault(episode.file, len(number_of))

    histograms = np.zeros((3, 256), np.int64)
    lines = partial / "episodes.jsonl"
    lines.parent.mkdir(parents=True)
    first = 0
    with lines.open("w", encoding="utf-8") as rows, _DataWriter(_path(partial, DATA_PATH)) as data:
        for index, (episode, sample) in enumerate(zip(list_episodes(), pixels, strict=True)):
            columns = _columns(index, first, episode.length, tasks[index], fps)
            data.add(columns)
            seen = pixel_histograms(sample)
            histograms += seen
            row = _episode_row(index, episode, first, number_of[episode.file], fps)
            for name, values in {**column_statistics(columns), CAMERA: pixel_statistics(seen)}.items():
                row |= {f"stats/{name}/{key}": value.tolist() for key, value in values.items()}
            rows.write(json.dumps(row) + "\n")
            first += episode.length
    json_lines.to_parquet(lines, _path(partial, EPISODES_PATH), _episode_schema())
    lines.unlink()

    _place_videos(partial, number_of)
    _write_tasks(partial / "meta" / "tasks.parquet", task_of)
    overall = {**overall_statistics(np.array(lengths), np.array(tasks), fps), CAMERA: pixel_statistics(histograms)}
    stats = {name: {key: value.tolist() for key, value in values.items()} for name, values in overall.items()}
    _write_json(partial / "meta" / "stats.json", stats)
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": _features(next(iter(number_of)), fps),
        "total_episodes": len(lengths),
        "total_frames": first,
        "total_tasks": len(task_of),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "robot_type": None,
        "splits": {"train": f"0:{len(lengths)}"},
    }
    _write_json(partial / "meta" / "info.json", info)
    partial.replace(folder)


def _path(folder: Path, pattern: str) -> Path:
    """The only file of a kind, in a folder made for it."""
    path = folder / pattern.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    return path


def _columns(index: int, first: int, length: int, task: int, fps: int) -> dict[str, np.ndarray]:
    """What the data set says of every frame of an episode."""
    frame_index = np.arange(length)
    return {
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.full(length, index),
        "index": np.arange(first, first + length),
        "task_index": np.full(length, task),
    }


class _DataWriter:
    """The table of all frames, written by row groups; a context manager."""

    def __init__(self, path: Path):
        fields = [(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS.items()]
        # The `datasets` package reads the types of the columns from here.
        described = {
            "info": {"features": {name: {"dtype": dtype, "_type": "Value"} for name, dtype in COLUMNS.items()}}
        }
        self._schema = pa.schema(fields, {"huggingface": json.dumps(described)})
        self._writer = pq.ParquetWriter(path, self._schema)
        self._waiting: list[dict[str, np.ndarray]] = []
        self._num_waiting = 0

    def __enter__(self) -> "_DataWriter":
        return self

    def __exit__(self, *_) -> None:
        self._write()
        self._writer.close()

    def add(self, columns: dict[str, np.ndarray]) -> None:
        self._waiting.append(columns)
        self._num_waiting += len(columns["index"])
        if self._num_waiting >= FRAMES_A_GROUP:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        arrays = []
        for field in self._schema:
            values = np.concatenate([columns[field.name] for columns in self._waiting])
            # Not by pa.array, which loads pandas first.
            arrays.append(pa.Array.from_buffers(field.type, len(values), [None, pa.py_buffer(values)]))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting, self._num_waiting = [], 0


def _episode_schema() -> pa.Schema:
    numbers = pa.list_(pa.float64())
    whole = ("data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index")
    fields = [("episode_index", pa.int64()), ("tasks", pa.list_(pa.string())), ("length", pa.int64())]
    fields += [(name, pa.int64()) for name in whole]
    fields += [(f"videos/{CAMERA}/{name}", pa.int64()) for name in ("chunk_index", "file_index")]
    fields += [(f"videos/{CAMERA}/{name}", pa.float64()) for name in ("from_timestamp", "to_timestamp")]
    fields += [(f"meta/episodes/{name}", pa.int64()) for name in ("chunk_index", "file_index")]
    for column in (*COLUMNS, CAMERA):
        kind = pa.list_(pa.list_(numbers)) if column == CAMERA else numbers
        for name in ("min", "max", "mean", "std", "count", *QUANTILES):
            fields.append((f"stats/{column}/{name}", pa.list_(pa.int64()) if name == "count" else kind))
    return pa.schema(fields)


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


def _write_tasks(path: Path, task_of: dict[str, int]) -> None:
    """task_index by task, with what makes `task` the index where pandas reads it, as LeRobot does."""
    described = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ],
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], {"pandas": json.dumps(described)})
    lines = path.with_suffix(".jsonl")
    with lines.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"task_index": index, "task": task}) + "\n" for task, index in task_of.items())
    json_lines.to_parquet(lines, path, schema)
    lines.unlink()


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


def weighted_statistics(values: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """`statistics` of `np.repeat(values, counts)`, without making it: values (V,) in ascending order."""
    values, counts = values[counts > 0].astype(np.float64), counts[counts > 0]
    total, behind = int(counts.sum()), np.cumsum(counts)
    mean = (values @ counts) / total
    places = (total - 1) * np.array(list(QUANTILES.values()))
    below, above = (values[np.searchsorted(behind, edge(places), side="right")] for edge in (np.floor, np.ceil))
    quantiles = below + (above - below) * (places % 1)
    return {
        "min": values[:1],
        "max": values[-1:],
        "mean": np.array([mean]),
        "std": np.array([np.sqrt((values - mean) ** 2 @ counts / total)]),
        "count": np.array([total]),
        **dict(zip(QUANTILES, quantiles[:, None], strict=True)),
    }


def overall_statistics(lengths: np.ndarray, tasks: np.ndarray, fps: int) -> dict[str, dict[str, np.ndarray]]:
    """`column_statistics` of all episodes together, from their lengths and tasks (E,)."""
    steps, episodes, num_frames = np.arange(lengths.max()), np.arange(len(lengths)), int(lengths.sum())
    num_longer = len(lengths) - np.searchsorted(np.sort(lengths), steps, side="right")
    by_task = np.zeros(tasks.max() + 1, np.int64)
    np.add.at(by_task, tasks, lengths)
    index = weighted_statistics(np.array([0, num_frames - 1]), np.array([1, 1]))
    # Numbers in steps of one: all but the spread is a straight line between the first and the last.
    index |= {"std": np.array([np.sqrt((num_frames**2 - 1) / 12)]), "count": np.array([num_frames])}
    return {
        "timestamp": weighted_statistics((steps / fps).astype(np.float32), num_longer),
        "frame_index": weighted_statistics(steps, num_longer),
        "episode_index": weighted_statistics(episodes, lengths),
        "index": index,
        "task_index": weighted_statistics(np.arange(len(by_task)), by_task),
    }


def pixel_histograms(pixels: np.ndarray) -> np.ndarray:
    """(3, 256): how often each level occurs in pixels (P, 3) uint8."""
    return np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])


def pixel_statistics(histograms: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of the pixels that were counted in (3, 256), in [0, 1] and shaped (3, 1, 1)."""
    channels = [weighted_statistics(np.arange(256) / 255, counts) for counts in histograms]
    return {
        name: channels[0][name] if name == "count" else np.stack([of[name] for of in channels]).reshape(3, 1, 1)
        for name in channels[0]
    }
