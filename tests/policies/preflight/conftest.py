"""Robot data whose pictures tell where the robot is: a bright square that goes to a corner, and an arm behind it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapa.schema import ConvertConfig
from video_data import convert

FPS, SIZE, CAMERA = 10, 32, "observation.images.front"
NUM_EPISODES, LENGTH = 6, 24


@dataclass
class Episodes:
    """What is recorded; tests spoil it before it is written."""

    states: list[np.ndarray]
    actions: list[np.ndarray]
    frames: list[np.ndarray]
    names: list[str] = field(default_factory=lambda: ["x", "y", "gripper"])


def good_episodes(num_episodes: int = NUM_EPISODES) -> Episodes:
    """From a random place to the upper left corner, 8 cm a step at most; the gripper shuts on the way.

    The action is where the robot shall be; it gets there two frames later.
    """
    states, actions, frames = [], [], []
    for episode in range(num_episodes):
        rng = np.random.default_rng(episode)
        place, places = rng.uniform(0.4, 0.9, 2), []
        for _ in range(LENGTH + 2):
            places.append(place.copy())
            place = place - np.clip(place - 0.1, -0.03, 0.03)
        path = np.concatenate([np.array(places), np.linspace(0, 1, LENGTH + 2)[:, None]], axis=1)
        states.append(path[:LENGTH])
        actions.append(path[2:])
        frames.append(np.stack([picture(state) for state in states[-1]]))
    return Episodes(states, actions, frames)


def picture(state: np.ndarray) -> np.ndarray:
    pixels = np.full((SIZE, SIZE, 3), 60, np.uint8)
    row, column = (state[:2] * (SIZE - 6)).astype(int)
    pixels[row : row + 6, column : column + 6] = (255, round(255 * float(state[2])), 40)
    return pixels


def write_robot_data(folder: Path, episodes: Episodes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LeRobotDataset v3.0 of them, through v2.1 and `lapa convert`."""
    source = folder / "v21"
    size = len(episodes.names)
    vector = {"dtype": "float32", "shape": [size], "names": episodes.names}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "square",
        "total_episodes": len(episodes.states),
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": vector,
            "action": vector,
            CAMERA: {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **{
                name: {"dtype": "int64", "shape": [1], "names": None}
                for name in ("frame_index", "episode_index", "index", "task_index")
            },
        },
    }
    (source / "meta").mkdir(parents=True)
    (source / "data" / "chunk-000").mkdir(parents=True)
    videos = source / "videos" / "chunk-000" / CAMERA
    videos.mkdir(parents=True)
    (source / "meta" / "info.json").write_text(json.dumps(info))
    (source / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "go to the corner"}) + "\n")
    lines = [
        {"episode_index": e, "length": len(s), "tasks": ["go to the corner"]} for e, s in enumerate(episodes.states)
    ]
    (source / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, (states, actions, frames) in enumerate(
        zip(episodes.states, episodes.actions, episodes.frames, strict=True)
    ):
        columns = {
            "observation.state": pa.array(np.float32(states).tolist(), pa.list_(pa.float32())),
            "action": pa.array(np.float32(actions).tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array((np.arange(len(states)) / FPS).astype(np.float32)),
            "frame_index": pa.array(np.arange(len(states))),
            "episode_index": pa.array([number] * len(states)),
            "index": pa.array(np.arange(len(states))),
            "task_index": pa.array([0] * len(states)),
        }
        pq.write_table(pa.table(columns), source / "data" / "chunk-000" / f"episode_{number:06d}.parquet")
        with av.open(str(videos / f"episode_{number:06d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
            for step, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = step
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    monkeypatch.setattr(convert, "call_in_order", lambda function, calls, workers: (function(*call) for call in calls))
    results = convert.run(ConvertConfig(data=str(source), output_dir=str(folder)))
    assert results["num_left_out"] == 0
    return folder / "lerobot"
