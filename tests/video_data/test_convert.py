"""`lapa convert`: what LeRobot reads from the converted data set is what the v2.1 files hold."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lapa.schema import ConvertConfig
from tests.video_data.encode import FPS, SIZE, frames, images, write_clip
from video_data import convert

LENGTHS = (12, 7, 9, 5)
TASKS = ("never done", "lift the cup", "push the pen")
TASK_OF_EPISODE = (2, 1, 2, 1)
CAMERAS = ("observation.images.front", "observation.images.wrist")
CODECS = ("mpeg4", "libx264")
STATE_NAMES = ["x", "y", "grip"]


def video_of(root: Path, camera: str, episode: int) -> Path:
    return root / "videos" / "chunk-000" / camera / f"episode_{episode:06d}.mp4"


def table_of(root: Path, episode: int) -> Path:
    return root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"


def feature(dtype: str, *shape: int, names=None) -> dict:
    return {"dtype": dtype, "shape": list(shape), "names": names}


def episode_columns(episode: int) -> dict:
    length = LENGTHS[episode]
    rng = np.random.default_rng(episode)
    first = sum(LENGTHS[:episode])
    return {
        "observation.state": pa.array(rng.normal(size=(length, 3)).astype(np.float32).tolist(), pa.list_(pa.float32())),
        "action": pa.array(rng.normal(size=(length, 2)).astype(np.float32).tolist(), pa.list_(pa.float32())),
        "next.done": pa.array([step == length - 1 for step in range(length)]),
        "timestamp": pa.array((np.arange(length) / FPS).astype(np.float32)),
        "frame_index": pa.array(np.arange(length)),
        "episode_index": pa.array([episode] * length),
        "index": pa.array(np.arange(first, first + length)),
        "task_index": pa.array([TASK_OF_EPISODE[episode]] * length),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Four episodes with B-frames in one camera; their statistics are missing, as in v2.0."""
    root = tmp_path_factory.mktemp("robot") / "robot_v21"
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "arm",
        "total_episodes": 4,
        "total_frames": sum(LENGTHS),
        "total_tasks": 3,
        "total_videos": 8,
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": "0:4"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": feature("float32", 3, names=[STATE_NAMES]),
            "action": feature("float32", 2, names={"motors": ["dx", "dy"]}),
            "next.done": feature("bool", 1),
            **{camera: feature("video", *SIZE, 3, names=["height", "width", "channel"]) for camera in CAMERAS},
            "timestamp": feature("float32", 1),
            **{name: feature("int64", 1) for name in ("frame_index", "episode_index", "index", "task_index")},
        },
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]
    (root / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    listed = [{"episode_index": e, "tasks": [TASKS[TASK_OF_EPISODE[e]]], "length": LENGTHS[e]} for e in range(4)]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    for episode, length in enumerate(LENGTHS):
        pq.write_table(pa.table(episode_columns(episode)), table_of(root, episode))
        for camera, codec in zip(CAMERAS, CODECS, strict=True):
            write_clip(video_of(root, camera, episode), num_frames=length, codec=codec, seed=episode)
    return root


@pytest.fixture
def source(pristine, tmp_path, monkeypatch) -> Path:
    """A copy to be damaged; its episodes are checked in this process, because starting another one takes seconds."""
    monkeypatch.setattr(convert, "call_in_order", lambda function, calls, workers: (function(*call) for call in calls))
    return shutil.copytree(pristine, tmp_path / "robot_v21")


def run(source: Path, **options) -> dict:
    return convert.run(ConvertConfig(data=str(source), output_dir=str(source.parent / "out"), num_workers=1, **options))


def opened(source: Path) -> LeRobotDataset:
    return LeRobotDataset("converted", root=source.parent / "out" / "lerobot", video_backend="pyav")


def decoded(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_same(dataset: LeRobotDataset, source: Path, episodes: list[int]) -> None:
    """Every row and every frame of the data set is that of these episodes of the source."""
    assert dataset.meta.total_episodes == len(episodes)
    assert len(dataset) == sum(LENGTHS[episode] for episode in episodes)
    row = 0
    for number, episode in enumerate(episodes):
        columns = pq.read_table(table_of(source, episode)).to_pydict()
        pictures = {camera: decoded(video_of(source, camera, episode)) for camera in CAMERAS}
        for step in range(LENGTHS[episode]):
            item = dataset[row]
            assert item["task"] == TASKS[TASK_OF_EPISODE[episode]]
            assert (int(item["episode_index"]), int(item["frame_index"]), int(item["index"])) == (number, step, row)
            for name in ("observation.state", "action", "timestamp", "next.done"):
                np.testing.assert_array_equal(
                    item[name].numpy(), np.array(columns[name][step], item[name].numpy().dtype)
                )
            for camera in CAMERAS:
                pixels = (item[camera] * 255).round().byte().permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(pixels, pictures[camera][step])
            row += 1


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_lerobot_reads_the_same_rows_frames_and_statistics(source):
    before = files_of(source)
    assert run(source) == {"num_episodes": 4, "num_left_out": 0, "num_frames": sum(LENGTHS)}
    assert files_of(source) == before, "the source was written to"
    dataset = opened(source)
    assert_same(dataset, source, [0, 1, 2, 3])
    assert dataset.meta.features["observation.state"]["names"] == STATE_NAMES
    assert dataset.meta.features["action"]["names"] == ["dx", "dy"]
    assert dataset.meta.info.splits == {"train": "0:4"}
    for camera in CAMERAS:
        assert len(list((dataset.root / "videos" / camera).rglob("*.mp4"))) == 1
    actions = np.concatenate([pq.read_table(table_of(source, e))["action"].to_pylist() for e in range(4)])
    stored = dataset.meta.stats["action"]
    for name, expected in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "min": actions.min(0),
        "max": actions.max(0),
        "q01": np.quantile(actions, 0.01, axis=0),
        "q99": np.quantile(actions, 0.99, axis=0),
    }.items():
        np.testing.assert_allclose(stored[name], expected, atol=1e-6)
    pixels = np.concatenate([decoded(video_of(source, CAMERAS[1], e)) for e in range(4)]) / 255
    np.testing.assert_allclose(
        stored_mean := dataset.meta.stats[CAMERAS[1]]["mean"].ravel(), pixels.mean((0, 1, 2)), atol=0.02
    )
    assert stored_mean.shape == (3,)


def test_files_are_cut_at_the_size_asked_for(source, monkeypatch):
    monkeypatch.setattr(convert, "MEGABYTE", 2_000)
    run(source, data_file_size_mb=1, video_file_size_mb=1)
    dataset = opened(source)
    assert len(list((dataset.root / "videos" / CAMERAS[1]).rglob("*.mp4"))) > 1
    assert_same(dataset, source, [0, 1, 2, 3])


def cut_video(source: Path) -> None:
    path = video_of(source, CAMERAS[0], 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shorten_video(source: Path) -> None:
    write_clip(video_of(source, CAMERAS[0], 1), num_frames=LENGTHS[1] - 2)


def change_column(name: str, value):
    def change(source: Path) -> None:
        columns = episode_columns(1)
        values = columns[name].to_pylist()
        values[3] = value
        columns[name] = pa.array(values, columns[name].type)
        pq.write_table(pa.table(columns), table_of(source, 1))

    return change


def drop_rows(source: Path) -> None:
    pq.write_table(pa.table(episode_columns(1)).slice(0, 3), table_of(source, 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_video, "episode_000001.mp4"),
        (shorten_video, "7 frames"),
        (lambda source: video_of(source, CAMERAS[1], 1).unlink(), "no file"),
        (lambda source: table_of(source, 1).unlink(), "no file"),
        (lambda source: table_of(source, 1).write_bytes(b"nonsense"), "Parquet"),
        (drop_rows, "3 rows, episodes.jsonl says 7"),
        (change_column("timestamp", 0.2), "timestamps"),
        (change_column("action", [0.0, float("nan")]), "not finite"),
        (change_column("action", [0.0]), "differ in length"),
        (change_column("frame_index", 9), "frame_index"),
        (change_column("task_index", 17), "no task 17"),
    ],
)
def test_broken_episode_is_left_out_and_told(source, damage, reason):
    damage(source)
    assert run(source) == {"num_episodes": 3, "num_left_out": 1, "num_frames": sum(LENGTHS) - LENGTHS[1]}
    lines = (source.parent / "out" / "left_out.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [row["episode"] for row in told] == [1]
    assert reason in told[0]["reason"]
    dataset = opened(source)
    assert_same(dataset, source, [0, 2, 3])
    assert dataset.meta.info.splits == {"train": "0:3"}


def test_only_the_episodes_asked_for_are_converted(source):
    assert run(source, episodes=[3, 1])["num_episodes"] == 2
    assert_same(opened(source), source, [1, 3])
    with pytest.raises(ValueError, match=r"\[9\] are not in the source"):
        run(source, episodes=[1, 9])


def test_stored_images_are_converted_too(source):
    path = source / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"] = {n: f for n, f in info["features"].items() if f["dtype"] != "video"}
    info["features"]["observation.images.top"] = feature("image", *SIZE, 3)
    path.write_text(json.dumps(info | {"video_path": None}))
    for episode, length in enumerate(LENGTHS):
        stored = [{"bytes": encoded, "path": None} for encoded in images(length, "PNG")]
        pq.write_table(
            pa.table(episode_columns(episode) | {"observation.images.top": stored}), table_of(source, episode)
        )
    assert run(source)["num_left_out"] == 0
    item = opened(source)[LENGTHS[0] + 2]
    pixels = (item["observation.images.top"] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, frames(LENGTHS[1])[2])


def test_killed_conversion_goes_on(source, monkeypatch):
    calls: list[str] = []
    add = convert.VideoFiles.add

    def killed(self, video, num_frames):
        calls.append(video.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return add(self, video, num_frames)

    monkeypatch.setattr(convert.VideoFiles, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source)
    assert not (source.parent / "out" / "lerobot").exists()
    monkeypatch.setattr(convert, "call_in_order", lambda function, calls, workers: nothing(calls))
    run(source)
    assert_same(opened(source), source, [0, 1, 2, 3])


def nothing(calls: list):
    assert not calls, "an episode was checked again"
    yield from ()


def set_info(source: Path, **values) -> None:
    path = source / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: set_info(source, codebase_version="v3.0"), "v3.0 already"),
        (lambda source: set_info(source, codebase_version="v2.2"), "expected v2.1"),
        (lambda source: set_info(source, fps=29.97), "29.97 frames/s"),
        (lambda source: shutil.rmtree(source / "meta"), "no meta/info.json"),
        (lambda source: (source / "meta").rename(source / "meta_data"), "v1.x"),
        (lambda source: (source / "meta" / "tasks.jsonl").unlink(), "tasks.jsonl"),
        (lambda source: (source / "meta" / "episodes.jsonl").write_text("{"), "episodes.jsonl is damaged"),
        (lambda source: shutil.rmtree(source / "data"), "all 4 episodes"),
    ],
)
def test_a_source_that_cannot_be_converted_is_refused(source, spoil, message):
    spoil(source)
    with pytest.raises(ValueError, match=message):
        run(source)
    assert not (source.parent / "out" / "lerobot").exists()


def test_v20_has_no_statistics_and_needs_none(source):
    set_info(source, codebase_version="v2.0")
    assert run(source)["num_episodes"] == 4
    assert opened(source).meta.stats["action"]["mean"].shape == (2,)


def test_output_inside_the_source_is_refused(source):
    with pytest.raises(ValueError, match="only read"):
        convert.run(ConvertConfig(data=str(source), output_dir=str(source / "v3"), num_workers=1))


def test_real_robot_data(shared_data, tmp_path):
    root = shared_data / "robot" / "g1_bottle_v21"
    out = tmp_path / "out"
    results = convert.run(ConvertConfig(data=str(root), output_dir=str(out), episodes=[0, 1], num_workers=1))
    assert results == {"num_episodes": 2, "num_left_out": 0, "num_frames": 221 + 277}
    dataset = LeRobotDataset("g1", root=tmp_path / "out" / "lerobot", video_backend="pyav")
    rows = pq.read_table(root / "data" / "chunk-000" / "episode_000001.parquet")
    pictures = decoded(root / "videos" / "chunk-000" / "observation.images.cam_high" / "episode_000001.mp4")
    for step in (0, 138, 276):
        item = dataset[221 + step]
        np.testing.assert_array_equal(item["action"].numpy(), np.array(rows["action"][step].as_py(), np.float32))
        pixels = (item["observation.images.cam_high"] * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, pictures[step])
