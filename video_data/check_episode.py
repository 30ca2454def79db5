"""Is an episode of a LeRobotDataset v2 whole: its rows, its timestamps, and every frame of its videos?

Run in worker processes, so nothing heavy is imported: a damaged file may crash a decoder.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from video_data.lerobot_files import pixel_histograms
from video_data.sources.lerobot import path_v2
from video_data.video_output import read_packets

TIMESTAMP_TOLERANCE_S = 1e-4  # LeRobot's own: rows further than this from their frame are refused when read
PIXEL_STRIDE = 8  # of the pixels counted in statistics, in both directions


def check_episode(root: str, info: dict, listed: dict, tasks: list[int]) -> dict:
    """{"histograms": {camera: (3, 256) list}} of the pixels of a whole episode, or {"reason": str} of a broken one.

    info: meta/info.json; listed: the episode's line in meta/episodes.jsonl; tasks: the numbers that tasks.jsonl has.
    """
    try:
        table = read_rows(Path(root), info, listed)
        if unknown := set(table["task_index"].to_pylist()) - set(tasks):
            raise ValueError(f"meta/tasks.jsonl has no task {min(unknown)}, which rows of the episode refer to")
        histograms = {}
        for name, feature in info["features"].items():
            if feature["dtype"] == "video":
                video = Path(root) / path_v2(info, "video_path", listed["episode_index"], name)
                frames = _video_frames(video, len(table), info["fps"])
            elif feature["dtype"] == "image":
                frames = _stored_images(name, table)
            else:
                continue
            histograms[name] = _count_pixels(name, feature, frames, len(table)).tolist()
    except (ValueError, OSError, av.error.FFmpegError, pa.ArrowException) as error:
        return {"reason": " ".join(f"{error}".split())}
    return {"histograms": histograms}


def read_rows(root: Path, info: dict, listed: dict) -> pa.Table:
    """The episode's rows; ValueError where they are not what info.json and episodes.jsonl promise."""
    path = root / path_v2(info, "data_path", listed["episode_index"])
    if not path.is_file():
        raise ValueError(f"no file {path}")
    table = pq.read_table(path)
    features = info["features"]
    wanted = [name for name, feature in features.items() if feature["dtype"] != "video"]
    if absent := [name for name in wanted if name not in table.column_names]:
        raise ValueError(f"{path} has no column {absent[0]!r}: it has {table.column_names}")
    if len(table) != listed["length"] or not len(table):
        raise ValueError(f"{path} has {len(table)} rows, episodes.jsonl says {listed['length']}")
    if (table["frame_index"].to_numpy() != np.arange(len(table))).any():
        raise ValueError(f"the frame_index of {path} does not count from 0 to {len(table) - 1}")
    late_s = np.abs(table["timestamp"].to_numpy() - np.arange(len(table)) / info["fps"]).max()
    if not late_s <= TIMESTAMP_TOLERANCE_S:
        raise ValueError(f"the timestamps of {path} are up to {late_s:.4f} s off those of {info['fps']} frames/s")
    for name in wanted:
        if features[name]["dtype"].startswith("float"):
            values = numbers(table, name)
            if values.shape[1] != int(np.prod(features[name]["shape"])):
                raise ValueError(f"{name} in {path} has {values.shape[1]} numbers a row, not {features[name]['shape']}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} in {path} has numbers that are not finite")
    return table


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers or of lists of numbers, as (N, D) float64."""
    column = table[name].combine_chunks()
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if column.null_count:
        raise ValueError(f"the column {name!r} has empty cells")
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    if len(values) % len(table):
        raise ValueError(f"the rows of the column {name!r} differ in length")
    return values.reshape(len(table), -1)


def _video_frames(path: Path, num_frames: int, fps: float) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        if read_packets(container, stream, num_frames) is None:
            raise ValueError(f"the packets of {path} are not {num_frames} frames, one each, from a key frame on")
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        first_s = None
        for number, frame in enumerate(container.decode(stream)):
            first_s = frame.time if first_s is None else first_s
            if frame.time is None or abs(frame.time - first_s - number / fps) > 0.5 / fps:
                raise ValueError(f"frame {number} of {path} is shown at {frame.time} s, expected {number / fps:.3f} s")
            yield frame.to_ndarray(format="rgb24")


def _stored_images(name: str, table: pa.Table) -> Iterator[np.ndarray]:
    for number, stored in enumerate(table[name].to_pylist()):
        encoded = stored.get("bytes") if isinstance(stored, dict) else None
        if not encoded:
            raise ValueError(f"row {number} has no picture in the column {name!r}, only {str(stored)[:80]}")
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"the picture of row {number} in the column {name!r} is damaged")
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _count_pixels(name: str, feature: dict, frames: Iterator[np.ndarray], num_frames: int) -> np.ndarray:
    """(3, 256): how often each level occurs; ValueError where a frame is missing or of another size."""
    histograms = np.zeros((3, 256), np.int64)
    found = 0
    for frame in frames:
        if sorted(frame.shape) != sorted(feature["shape"]):
            raise ValueError(f"frame {found} of {name} is {frame.shape}, expected {feature['shape']}")
        histograms += pixel_histograms(frame[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3))
        found += 1
    if found != num_frames:
        raise ValueError(f"{name} has {found} frames that can be decoded, of {num_frames}")
    return histograms
