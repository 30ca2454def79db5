"""`lapa convert`: a LeRobotDataset v2.1 becomes v3.0, with every episode looked at first.

v2.1 keeps a parquet file and a video file an episode; v3.0 joins episodes to larger files and tells in
meta/episodes/*.parquet which part is whose. LeRobot's own converter renames the source, and stops at the first broken
episode. Here the source is only read, episodes that are broken are left out, videos are joined packet by packet, and
the statistics of v3.0 (with the quantiles that v2.1 lacks) are computed from every row and frame.

output_dir/
    lerobot/          the data set; appears when it is complete
    left_out.jsonl    {"episode", "reason"} of every broken episode of the source
    checked/          what was found of every episode, so that a killed run goes on
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from video_data.check_episode import check_episode, numbers, read_rows
from video_data.lerobot_files import pixel_statistics, statistics
from video_data.sources.documents import read_json
from video_data.sources.lerobot import INFO, KEYS, path_v2, read_episodes_v2
from video_data.store import write_text
from video_data.video_output import VideoOutput, read_packets
from video_data.workers import call_in_order

VERSIONS = ("v2.1", "v2.0")  # v2.0 lacks only the statistics an episode, which are computed anyway
FILES_PER_CHUNK = 1000
MEGABYTE = 1 << 20


def run(cfg) -> dict:
    """Convert `cfg.data` (lapa.schema.ConvertConfig); returns num_episodes, num_left_out and num_frames.

    Raises ValueError for another version, a source that cannot be read, and where every episode is broken.
    """
    source, output_dir = Path(cfg.data).expanduser(), Path(cfg.output_dir).expanduser()
    if output_dir.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output_dir {output_dir} lies in the source {source}, which is only read: choose another")
    info = read_info(source)
    task_of, episodes = read_tasks(source), pick(list(read_episodes_v2(source)), list(cfg.episodes))
    findings = check_all(source, info, episodes, sorted(task_of), output_dir / "checked", cfg.num_workers)
    whole = [(listed, found) for listed, found in zip(episodes, findings, strict=True) if "reason" not in found]
    left_out = [
        {"episode": listed["episode_index"], "reason": found["reason"]}
        for listed, found in zip(episodes, findings, strict=True)
        if "reason" in found
    ]
    write_text(output_dir / "left_out.jsonl", "".join(json.dumps(row) + "\n" for row in left_out))
    if not whole:
        raise ValueError(f"all {len(episodes)} episodes of {source} are broken; the first: {left_out[:1]}")
    if not (output_dir / "lerobot").is_dir():
        write_dataset(output_dir / "lerobot", source, info, task_of, whole, cfg)
    num_frames = sum(listed["length"] for listed, _ in whole)
    return {"num_episodes": len(whole), "num_left_out": len(left_out), "num_frames": num_frames}


def pick(episodes: list[dict], wanted: list[int]) -> list[dict]:
    """The wanted ones in the source's order; all where none is named."""
    known = [listed["episode_index"] for listed in episodes]
    if absent := sorted(set(wanted) - set(known)):
        raise ValueError(f"episodes {absent} are not in the source: it has {known[0]} to {known[-1]}")
    return [listed for listed in episodes if not wanted or listed["episode_index"] in wanted]


def read_info(source: Path) -> dict:
    """meta/info.json of a data set that can be converted; ValueError with what to do for any other."""
    if not (source / INFO).is_file():
        if (source / "meta_data" / "info.json").is_file():
            raise ValueError(
                f"{source} is of LeRobot version v1.x: LeRobot 0.3 has the script convert_dataset_v1_to_v2, "
                "convert it to v2.0 with that first"
            )
        raise ValueError(f"no {INFO} in {source}: data must name the folder of a LeRobotDataset")
    info = read_json(source / INFO)
    if absent := [key for key in (*KEYS, "fps", "chunks_size") if key not in info]:
        raise ValueError(f"{source / INFO} has no key {absent[0]!r}: it has {sorted(info)}")
    version = str(info["codebase_version"])
    if version.startswith("v3"):
        raise ValueError(f"{source} is of LeRobot version {version} already: use it as it is")
    if version not in VERSIONS:
        raise ValueError(f"{source} is of LeRobot version {version}, expected {' or '.join(VERSIONS)}")
    if info["fps"] != int(info["fps"]) or info["fps"] <= 0:
        raise ValueError(f"{source} has {info['fps']} frames/s: LeRobot v3.0 counts whole frames a second")
    if absent := [name for name in ("timestamp", "frame_index", "task_index") if name not in info["features"]]:
        raise ValueError(f"{source} has no feature {absent[0]!r}: it has {sorted(info['features'])}")
    return info


def check_all(
    source: Path, info: dict, episodes: list[dict], tasks: list[int], folder: Path, num_workers: int
) -> list[dict]:
    """What `check_episode` found of every episode, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)

    def kept(listed: dict) -> Path:
        return folder / f"episode_{listed['episode_index']:06d}.json"

    missing = [listed for listed in episodes if not kept(listed).is_file()]
    results = call_in_order(check_episode, [(str(source), info, listed, tasks) for listed in missing], num_workers)
    progress = tqdm(total=len(episodes), desc="check", unit="episode", initial=len(episodes) - len(missing))
    with progress, contextlib.closing(results):
        for listed, found in zip(missing, results, strict=True):
            write_text(kept(listed), json.dumps(found or {"reason": "it crashes the decoder"}))
            progress.update()
    return [json.loads(kept(listed).read_text(encoding="utf-8")) for listed in episodes]


def write_dataset(
    folder: Path, source: Path, info: dict, task_of: dict[int, str], whole: list[tuple[dict, dict]], cfg
) -> None:
    """Write the data set at `folder`, which appears when it is complete."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.datasets.io_utils import write_info, write_stats, write_tasks
    from lerobot.datasets.utils import DEFAULT_EPISODES_PATH
    from pandas import DataFrame, Index

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    features = {name: feature | {"names": flat_names(feature)} for name, feature in info["features"].items()}
    meta = LeRobotDatasetMetadata.create(
        source.resolve().name,
        fps=int(info["fps"]),
        features=features,
        robot_type=info.get("robot_type"),
        root=partial,
        use_videos=any(feature["dtype"] == "video" for feature in features.values()),
        data_files_size_in_mb=cfg.data_file_size_mb,
        video_files_size_in_mb=cfg.video_file_size_mb,
    )
    schema = get_hf_features_from_features(meta.features).arrow_schema
    tasks = Tasks()
    rows: list[dict] = []
    values: dict[str, list[np.ndarray]] = {}
    histograms = {name: np.zeros((3, 256), np.int64) for name in meta.camera_keys}
    first = 0
    with TableFiles(partial, meta.data_path, schema, cfg.data_file_size_mb) as tables, contextlib.ExitStack() as stack:
        videos = {
            name: stack.enter_context(VideoFiles(partial, meta.video_path, name, info["fps"], cfg.video_file_size_mb))
            for name in meta.video_keys
        }
        for index, (listed, found) in enumerate(tqdm(whole, desc="convert", unit="episode", mininterval=1.0)):
            table = renumbered(read_rows(source, info, listed), index, first, task_of, tasks)
            length = len(table)
            row = {
                "episode_index": index,
                "tasks": listed.get("tasks") or tasks.names_of(table),
                "length": length,
                **tables.add(table),
                "dataset_from_index": first,
                "dataset_to_index": first + length,
            }
            for name, files in videos.items():
                video = source / path_v2(info, "video_path", listed["episode_index"], name)
                row |= {f"videos/{name}/{key}": value for key, value in files.add(video, length).items()}
            of_episode = {}
            for name, feature in meta.features.items():
                if name in histograms:
                    seen = np.array(found["histograms"][name])
                    histograms[name] += seen
                    of_episode[name] = pixel_statistics(seen)
                elif feature["dtype"] not in ("string", "language"):
                    values.setdefault(name, []).append(numbers(table, name))
                    of_episode[name] = statistics(values[name][-1])
            row |= as_lists({f"stats/{name}/{key}": v for name, of in of_episode.items() for key, v in of.items()})
            rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
            first += length
    episodes_path = partial / DEFAULT_EPISODES_PATH.format(chunk_index=0, file_index=0)
    episodes_path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), episodes_path)

    overall = {name: statistics(np.concatenate(parts)) for name, parts in values.items()}
    write_stats(overall | {name: pixel_statistics(seen) for name, seen in histograms.items()}, partial)
    write_tasks(DataFrame({"task_index": range(len(tasks.names))}, index=Index(tasks.names, name="task")), partial)
    meta.info.total_episodes, meta.info.total_frames, meta.info.total_tasks = len(rows), first, len(tasks.names)
    # Episodes that are left out move the others, so the source's splits hold only where none is.
    complete = len(rows) == info.get("total_episodes")
    meta.info.splits = info.get("splits", {}) if complete else {"train": f"0:{len(rows)}"}
    write_info(meta.info, partial)
    partial.replace(folder)


def flat_names(feature: dict) -> Any:
    """The names of a vector's numbers as one list; v2.1 often nests them: [["x", "y"]] or {"motors": ["x", "y"]}."""
    names = feature.get("names")
    nested = list(names.values()) if isinstance(names, dict) else names
    if isinstance(nested, list) and len(nested) == 1 and isinstance(nested[0], list) and len(feature["shape"]) == 1:
        return nested[0] if len(nested[0]) == feature["shape"][0] else names
    return names


def read_tasks(source: Path) -> dict[int, str]:
    """Instructions by their numbers in the source."""
    path = source / "meta" / "tasks.jsonl"
    if not path.is_file():
        raise ValueError(f"no file {path}, which a LeRobotDataset v2.1 lists its tasks in")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {int(line["task_index"]): str(line["task"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


class Tasks:
    """Instructions numbered in the order in which episodes need them, as LeRobot looks them up by position."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._number_of: dict[str, int] = {}

    def number(self, name: str) -> int:
        if name not in self._number_of:
            self._number_of[name] = len(self.names)
            self.names.append(name)
        return self._number_of[name]

    def names_of(self, table: pa.Table) -> list[str]:
        return [self.names[number] for number in dict.fromkeys(table["task_index"].to_pylist())]


def renumbered(table: pa.Table, episode: int, first: int, task_of: dict[int, str], tasks: Tasks) -> pa.Table:
    """The rows with the numbers they have in the new data set."""
    columns = {
        "episode_index": [episode] * len(table),
        "index": range(first, first + len(table)),
        "task_index": [tasks.number(task_of[old]) for old in table["task_index"].to_pylist()],
    }
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table


class TableFiles:
    """Parquet files of rows, one row group an episode; a context manager."""

    def __init__(self, folder: Path, pattern: str, schema: pa.Schema, size_mb: int):
        self._folder, self._pattern, self._schema, self._max_bytes = folder, pattern, schema, size_mb * MEGABYTE
        self._number, self._num_bytes = -1, 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "TableFiles":
        return self

    def __exit__(self, *_) -> None:
        if self._writer:
            self._writer.close()

    def add(self, table: pa.Table) -> dict[str, int]:
        """Append an episode; returns where it is."""
        table = table.select(self._schema.names).cast(self._schema)
        if self._writer is None or self._num_bytes + table.nbytes > self._max_bytes:
            if self._writer:
                self._writer.close()
            self._number, self._num_bytes = self._number + 1, 0
            path = file_path(self._folder, self._pattern, self._number)
            self._writer = pq.ParquetWriter(path, self._schema)
        self._writer.write_table(table)
        self._num_bytes += table.nbytes
        chunk_index, file_index = divmod(self._number, FILES_PER_CHUNK)
        return {"data/chunk_index": chunk_index, "data/file_index": file_index}


class VideoFiles:
    """Video files of one camera, joined packet by packet; a context manager."""

    def __init__(self, folder: Path, pattern: str, camera: str, fps: float, size_mb: int):
        self._folder, self._pattern, self._camera = folder, pattern, camera
        self._fps, self._max_bytes = int(fps), size_mb * MEGABYTE
        self._number, self._num_bytes = -1, 0
        self._output: VideoOutput | None = None

    def __enter__(self) -> "VideoFiles":
        return self

    def __exit__(self, *_) -> None:
        if self._output:
            self._output.close()

    def add(self, video: Path, num_frames: int) -> dict[str, int | float]:
        """Append an episode; returns where it is. A new file begins where its packets do not fit the last one."""
        num_bytes = video.stat().st_size
        with av.open(str(video), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            packets = read_packets(container, stream, num_frames)
            if packets is None:
                raise ValueError(f"{video} has changed since it was checked: run again into another output_dir")
            is_full = self._num_bytes + num_bytes > self._max_bytes
            if self._output is None or is_full or not self._output.takes(stream, packets.delay):
                if self._output:
                    self._output.close()
                self._number, self._num_bytes = self._number + 1, 0
                path = file_path(self._folder, self._pattern, self._number, self._camera)
                self._output = VideoOutput.copy_of(path, stream, packets.delay, self._fps)
            start = self._output.append(packets)
        self._num_bytes += num_bytes
        chunk_index, file_index = divmod(self._number, FILES_PER_CHUNK)
        return {
            "chunk_index": chunk_index,
            "file_index": file_index,
            "from_timestamp": start / self._fps,
            "to_timestamp": (start + num_frames) / self._fps,
        }


def file_path(folder: Path, pattern: str, number: int, camera: str = "") -> Path:
    chunk_index, file_index = divmod(number, FILES_PER_CHUNK)
    path = folder / pattern.format(chunk_index=chunk_index, file_index=file_index, video_key=camera)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def as_lists(values: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: value.tolist() for name, value in values.items()}
