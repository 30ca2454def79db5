"""LeRobotDataset v3.0 and v2.1: episodes of a robot, seen by one of its cameras.

v2.1 has a video file an episode (meta/episodes.jsonl); v3.0 joins episodes to files, and meta/episodes/*.parquet
says which part is whose. Paths follow the patterns that meta/info.json declares. With `keep_actions` a clip's
`episode` also says where its actions are, and `read_actions` reads them; without, they are left behind.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from video_data.clips import ClipRequest, Rejected
from video_data.sources.documents import read_json

INFO = "meta/info.json"
KEYS = ("codebase_version", "features", "data_path", "video_path")


def looks_like(root: Path) -> bool:
    return (root / INFO).is_file()


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Episodes in order; ids are "episode_000000". options: camera, keep_actions.

    Raises ValueError for another version, a camera or actions that the data set does not have, and missing files.
    """
    if not (root / INFO).is_file():
        raise ValueError(f"no {INFO} in {root}: path must name a LeRobotDataset")
    info = read_json(root / INFO)
    if absent := [key for key in KEYS if key not in info]:
        raise ValueError(f"{root / INFO} has no key {absent[0]!r}: it has {sorted(info)}")
    version = str(info["codebase_version"])
    episodes = {"v3.0": _episodes_v3, "v2.1": _episodes_v2, "v2.0": _episodes_v2}.get(version)
    if episodes is None:
        raise ValueError(f"{root} is of LeRobot version {version}, expected v3.0 or v2.1")
    camera = _camera(root, info, options.camera)
    if options.keep_actions and "action" not in info["features"]:
        raise ValueError(f"{root} has no feature 'action': its features are {sorted(info['features'])}")
    for listed in episodes(root, info, camera):
        clip = f"episode_{listed.number:06d}"
        if not (root / listed.video).is_file():
            yield Rejected(clip, listed.video, f"no file {root / listed.video}")
            continue
        episode = {"camera": camera, "index": listed.number, "num_frames": listed.num_frames}
        if options.keep_actions:
            episode["table"] = listed.table
        caption = listed.tasks[0] if listed.tasks else ""
        yield ClipRequest(
            clip,
            listed.video,
            listed.start_s,
            listed.end_s,
            caption=caption,
            caption_origin="instruction" if caption else "none",
            source=root.resolve().name,
            split=_split(info, listed.number),
            episode=episode,
        )


def _camera(root: Path, info: dict, wanted: str | None) -> str:
    features = info["features"]
    cameras = sorted(name for name, feature in features.items() if feature["dtype"] == "video")
    if not cameras:
        images = [name for name, feature in features.items() if feature["dtype"] == "image"]
        stored = f"{images} are stored as images: write it again with video" if images else f"it has {sorted(features)}"
        raise ValueError(f"{root} has no video feature: {stored}")
    if wanted is None:
        return next((name for name in cameras if not _is_depth(name, features[name])), cameras[0])
    for camera in cameras:
        if wanted in (camera, camera.rsplit(".", 1)[-1]):
            return camera
    raise ValueError(f"camera is {wanted!r}, the video features of {root} are {cameras}")


def _is_depth(name: str, feature: dict) -> bool:
    return "depth" in name or bool((feature.get("info") or {}).get("video.is_depth_map"))


def _split(info: dict, number: int) -> str:
    for name, bounds in info.get("splits", {}).items():
        first, _, last = str(bounds).partition(":")
        if first.isdigit() and last.isdigit() and int(first) <= number < int(last):
            return {"val": "validation"}.get(name, name)
    return ""


class _Episode(NamedTuple):
    number: int
    video: str
    start_s: float | None
    end_s: float | None
    tasks: list[str]
    table: str  # the parquet file that has its rows
    num_frames: int


def _episodes_v2(root: Path, info: dict, camera: str) -> Iterator[_Episode]:
    for listed in read_episodes_v2(root):
        number = listed["episode_index"]
        video, table = (path_v2(info, pattern, number, camera) for pattern in ("video_path", "data_path"))
        yield _Episode(number, video, None, None, listed.get("tasks", []), table, listed["length"])


def read_episodes_v2(root: Path) -> Iterator[dict]:
    """The lines of meta/episodes.jsonl: episode_index, length and mostly tasks; ValueError where one is damaged."""
    listed = root / "meta" / "episodes.jsonl"
    if not listed.is_file():
        raise ValueError(f"no file {listed}, which a LeRobotDataset v2.1 lists its episodes in")
    with listed.open(encoding="utf-8") as file:
        for line in file:
            try:
                episode = json.loads(line)
                yield episode | {"episode_index": int(episode["episode_index"]), "length": int(episode["length"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{listed} is damaged, or lacks a key: {error!r} in {line[:80]!r}") from None


def path_v2(info: dict, pattern: str, number: int, camera: str = "") -> str:
    """Where episode `number` has its rows (pattern "data_path") or a camera's video ("video_path")."""
    chunk = number // info["chunks_size"]
    return info[pattern].format(episode_chunk=chunk, episode_index=number, video_key=camera)


def _episodes_v3(root: Path, info: dict, camera: str) -> Iterator[_Episode]:
    import pyarrow.parquet

    files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    if not files:
        raise ValueError(f"no meta/episodes/**/*.parquet in {root}, which a LeRobotDataset v3.0 lists its episodes in")
    columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    places = [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    for file in files:
        names = pyarrow.parquet.read_schema(file).names
        absent = [column for column in columns + places if column not in names]
        if absent:
            raise ValueError(f"{file} has no column {absent[0]!r}: it has {[n for n in names if 'stats/' not in n]}")
        for row in pyarrow.parquet.read_table(file, columns=columns + places).to_pylist():
            chunk, part, start_s, end_s = (row[place] for place in places)
            video = info["video_path"].format(chunk_index=chunk, file_index=part, video_key=camera)
            table = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            yield _Episode(row["episode_index"], video, start_s, end_s, row["tasks"] or [], table, row["length"])


def read_actions(root: Path, episode: dict) -> dict[str, np.ndarray]:
    """{"action": (T, A), "state": (T, S)} float32 of a clip's `episode`; state only where the data set has one.

    Raises ValueError where the clip was listed without keep_actions, or the rows do not match its frames.
    """
    import pyarrow.parquet

    if "table" not in episode:
        raise ValueError("the episode was listed without its actions: set keep_actions=true")
    table = root / episode["table"]
    names = pyarrow.parquet.read_schema(table).names
    if "action" not in names:
        raise ValueError(f"{table} has no column 'action': its columns are {names}")
    wanted = {"action": "action", "observation.state": "state"}
    columns = ["episode_index", *(name for name in wanted if name in names)]
    # v3.0 keeps many episodes in a file, so the rows of one are picked while reading.
    filters = [("episode_index", "=", episode["index"])]
    rows = pyarrow.parquet.read_table(table, columns=columns, filters=filters)
    if len(rows) != episode["num_frames"]:
        raise ValueError(f"{table} has {len(rows)} rows of episode {episode['index']}, of {episode['num_frames']}")
    return {wanted[name]: np.array(rows[name].to_pylist(), np.float32) for name in columns[1:]}
