"""A tiny data set in every layout, with what a listing of it must say."""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.video_data.encode import FPS, NUM_FRAMES, clip_bytes, images, write_clip
from video_data.sources.tfrecord import masked_crc

# What a layout's builder answers: {clip id: (caption, caption_origin, source, split, number of frames)}.
Expected = dict[str, tuple[str, str, str, str, int]]


def folder(root: Path) -> Expected:
    write_clip(root / "kitchen" / "two.avi", num_frames=9)
    (root / "kitchen" / "two.txt").write_text("pour the\n tea\n")
    write_clip(root / "one.MP4")
    (root / "one.json").write_text('{"caption": "close the lid", "licence": "CC0"}')
    return {
        "kitchen/two.avi": ("pour the tea", "sidecar", "kitchen", "", 9),
        "one.MP4": ("close the lid", "sidecar", root.name, "", NUM_FRAMES),
    }


def table(root: Path) -> Expected:
    write_clip(root.parent / "videos" / "a.mp4")
    root.write_text(
        "path,caption,start,end,id,source,licence,split\n"
        "videos/a.mp4,open the door,,,whole,north,CC0,train\n"
        "videos/a.mp4,turn the knob,00:00:00.3,0.8,,,,validation\n"
    )
    return {
        "whole": ("open the door", "csv", "north", "train", NUM_FRAMES),
        "videos/a.mp4:0.3-0.8": ("turn the knob", "csv", "clips", "validation", 5),
    }


def parquet_table(root: Path) -> Expected:
    write_clip(root.parent / "a.mp4")
    rows = {"path": ["a.mp4", "a.mp4"], "start": [None, 0.5], "end": [None, 1.0], "caption": ["lift it", None]}
    pq.write_table(pa.table(rows), root)
    return {
        "a.mp4": ("lift it", "parquet", "clips", "", NUM_FRAMES),
        "a.mp4:0.5-1": ("", "none", "clips", "", 5),
    }


def something_something_v2(root: Path) -> Expected:
    for name in ("7", "8", "9"):
        write_clip(root / "20bn-something-something-v2" / f"{name}.webm", codec="libvpx")
    item = {"id": "7", "label": "pushing a cup", "template": "Pushing [something]", "placeholders": ["a cup"]}
    (root / "labels").mkdir()
    (root / "labels" / "train.json").write_text(json.dumps([item]))
    (root / "labels" / "validation.json").write_text(json.dumps([item | {"id": "8", "label": "lifting a pen"}]))
    (root / "labels" / "test.json").write_text(json.dumps([{"id": "9"}]))
    return {
        "7": ("pushing a cup", "label", "something_something_v2", "train", NUM_FRAMES),
        "8": ("lifting a pen", "label", "something_something_v2", "validation", NUM_FRAMES),
        "9": ("", "none", "something_something_v2", "test", NUM_FRAMES),
    }


def ego4d(root: Path) -> Expected:
    write_clip(root / "v2" / "full_scale" / "uid-1.mp4", num_frames=80)
    spoken = [(0.5, "#C C picks a cup"), (4.0, "#O a man X talks"), (6.0, "#C C #unsure lifts")]
    first = [{"timestamp_sec": t, "timestamp_frame": int(t * FPS), "narration_text": text} for t, text in spoken]
    second = [{"timestamp_sec": 4.0, "timestamp_frame": 40, "narration_text": "#c c puts  the cup down"}]
    narrations = {"narration_pass_1": {"narrations": first}, "narration_pass_2": {"narrations": second}}
    (root / "v2" / "annotations").mkdir()
    (root / "v2" / "annotations" / "narration.json").write_text(json.dumps({"uid-1": narrations}))
    return {
        "uid-1:0.000-2.500": ("picks a cup", "narration", "ego4d", "", 25),
        "uid-1:2.000-6.000": ("a man X talks", "narration", "ego4d", "", 40),
        "uid-1:2.000-6.000:2": ("puts the cup down", "narration", "ego4d", "", 40),
    }


def epic_kitchens_100(root: Path) -> Expected:
    write_clip(root / "EPIC-KITCHENS" / "P01" / "videos" / "P01_01.MP4", num_frames=40)
    header = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,narration,verb\n"
    annotations = root / "epic-kitchens-100-annotations"
    annotations.mkdir()
    (annotations / "EPIC_100_train.csv").write_text(
        header + "P01_01_0,P01,P01_01,00:00:00.560,00:00:00.20,00:00:01.50,open door,open\n"
    )
    (annotations / "EPIC_100_validation.csv").write_text(
        header + "P01_01_1,P01,P01_01,00:00:02.010,00:00:02.00,00:00:03.00,turn on light,turn-on\n"
    )
    return {
        "P01_01_0": ("open door", "narration", "P01", "train", 13),
        "P01_01_1": ("turn on light", "narration", "P01", "validation", 10),
    }


def howto100m(root: Path) -> Expected:
    write_clip(root / "videos" / "abc.webm", num_frames=40, codec="libvpx")
    spoken = {"start": [0.5, 2.0], "end": [1.5, 3.0], "text": ["cut the onion", "fry it"]}
    (root / "caption.json").write_text(json.dumps({"abc": spoken}))
    (root / "HowTo100M_v1.csv").write_text("video_id,category_1,category_2,rank,task_id\nabc,Food,Recipes,1,9\n")
    return {
        "abc:0.5-1.5": ("cut the onion", "asr", "Food", "", 10),
        "abc:2.0-3.0": ("fry it", "asr", "Food", "", 10),
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def webdataset(root: Path) -> Expected:
    root.mkdir(exist_ok=True)
    video = clip_bytes(root.parent)
    described = json.dumps({"caption": "wipe the table", "license": "CC0"}).encode()
    write_tar(
        root / "00000.tar",
        {"a.mp4": video, "a.txt": b"stack the cups", "b.json": described, "b.mp4": video, "c/d.e.mp4": video},
    )
    return {
        "00000.tar/a": ("stack the cups", "sidecar", "00000", "", NUM_FRAMES),
        "00000.tar/b": ("wipe the table", "sidecar", "00000", "", NUM_FRAMES),
        "00000.tar/c/d": ("", "none", "00000", "", NUM_FRAMES),
    }


def egocentric10k(root: Path) -> Expected:
    root.mkdir(exist_ok=True)
    video = clip_bytes(root.parent)
    tar = "factory_001/workers/worker_002/factory001_worker002_part00.tar"
    write_tar(root / tar, {"factory001_worker002_00000.mp4": video, "factory001_worker002_00000.json": b'{"fps": 10}'})
    return {f"{tar}/factory001_worker002_00000": ("", "none", "factory_001", "", NUM_FRAMES)}


def webvid(root: Path) -> Expected:
    write_clip(root / "videos" / "001_050" / "21.mp4")
    write_clip(root / "videos" / "001_050" / "22.mp4")
    header = "videoid,contentUrl,duration,page_dir,name\n"
    (root / "results_2M_train.csv").write_text(header + "21,https://x.invalid/21.mp4,PT00H00M01S,001_050,A red bus\n")
    (root / "results_2M_val.csv").write_text(header + "22,https://x.invalid/22.mp4,PT00H00M01S,001_050,Waves\n")
    return {
        "21": ("A red bus", "alt text", "webvid", "train", NUM_FRAMES),
        "22": ("Waves", "alt text", "webvid", "validation", NUM_FRAMES),
    }


def panda70m(root: Path) -> Expected:
    write_clip(root / "videos" / "xyz.mp4", num_frames=40)
    times, captions = "[['0:00:00.000', '0:00:01.000'], ['0:00:02.500', '0:00:03.500']]", '[""It\'s a cat"", \'a dog\']'
    (root / "panda70m_training_2m.csv").write_text(
        "videoID,url,timestamp,caption,matching_score\n"
        f'xyz,https://www.youtube.com/watch?v=xyz,"{times}","{captions}","[0.5, 0.4]"\n'
    )
    return {
        "xyz:0-1": ("It's a cat", "model", "panda70m", "train", 10),
        "xyz:2.5-3.5": ("a dog", "model", "panda70m", "train", 10),
    }


def laq_jpeg(root: Path) -> Expected:
    for clip, num_frames in (("clip_a", 11), ("clip_b", 3)):
        (root / clip).mkdir(parents=True)
        for number, image in enumerate(images(num_frames), start=1):
            (root / clip / f"img_{number:05d}.jpg").write_bytes(image)
    (root / "clip_b.txt").write_text("push the box")
    return {
        "clip_a": ("", "none", root.name, "", 11),
        "clip_b": ("push the box", "sidecar", root.name, "", 3),
    }


FEATURES = {
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "observation.state": {"dtype": "float32", "shape": [3], "names": None},
    "observation.images.top": {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channels"]},
    "observation.images.wrist": {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channels"]},
}
LENGTHS = (12, 7)
CAMERAS = ("observation.images.top", "observation.images.wrist")


def lerobot_rows(episodes: list[int]) -> pa.Table:
    """Rows of these episodes: the action of frame t of episode e is (e, t)."""
    steps = [(e, t) for e in episodes for t in range(LENGTHS[e])]
    return pa.table(
        {
            "episode_index": [e for e, _ in steps],
            "frame_index": [t for _, t in steps],
            "action": pa.array([[e, t] for e, t in steps], pa.list_(pa.float32())),
            "observation.state": pa.array([[e, t, 0] for e, t in steps], pa.list_(pa.float32())),
        }
    )


def lerobot_v2(root: Path) -> Expected:
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": "0:1", "val": "1:2"},
        "features": FEATURES,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    lines = [{"episode_index": e, "tasks": [f"task {e}"], "length": LENGTHS[e]} for e in range(2)]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for e in range(2):
        pq.write_table(lerobot_rows([e]), root / "data" / "chunk-000" / f"episode_{e:06d}.parquet")
        for camera in CAMERAS:
            write_clip(root / "videos" / "chunk-000" / camera / f"episode_{e:06d}.mp4", num_frames=LENGTHS[e])
    return {
        "episode_000000": ("task 0", "instruction", root.name, "train", 12),
        "episode_000001": ("task 1", "instruction", root.name, "validation", 7),
    }


def lerobot_v3(root: Path) -> Expected:
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "splits": {"train": "0:2"},
        "features": FEATURES,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    starts = [0.0, LENGTHS[0] / FPS]
    episodes = {
        "episode_index": [0, 1],
        "tasks": [["task 0"], ["task 1"]],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
    }
    for camera in CAMERAS:
        episodes |= {f"videos/{camera}/{name}": [0, 0] for name in ("chunk_index", "file_index")}
        episodes[f"videos/{camera}/from_timestamp"] = starts
        episodes[f"videos/{camera}/to_timestamp"] = [s + n / FPS for s, n in zip(starts, LENGTHS, strict=True)]
        write_clip(root / "videos" / camera / "chunk-000" / "file-000.mp4", num_frames=sum(LENGTHS))
    pq.write_table(pa.table(episodes), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(lerobot_rows([0, 1]), root / "data" / "chunk-000" / "file-000.parquet")
    return {
        "episode_000000": ("task 0", "instruction", root.name, "train", 12),
        "episode_000001": ("task 1", "instruction", root.name, "train", 7),
    }


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: dict[str, list]) -> bytes:
    """A tf.train.Example of bytes, int or float lists."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif isinstance(values[0], int):
            feature = field(3, field(1, b"".join(map(varint, values))))
        else:
            feature = field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def record(data: bytes) -> bytes:
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc(header)) + data + struct.pack("<I", masked_crc(data))


def rlds(root: Path) -> Expected:
    root.mkdir(exist_ok=True)
    (root / "features.json").write_text("{}")
    episodes = []
    for number, (format, num_frames) in enumerate((("JPEG", 6), ("PNG", 4))):
        step = {
            "steps/action": [0.5] * 7 * num_frames,
            "steps/is_first": [1] + [0] * (num_frames - 1),
            "steps/observation/depth": images(num_frames, "PNG"),
            "steps/observation/image": images(num_frames, format),
            "steps/observation/wrist_image": images(num_frames, format),
            "steps/language_instruction": [f"move block {number}".encode()] * num_frames,
        }
        episodes.append(record(example(step)))
    words = [*"push it à la".encode(), *[0] * 5]
    spelt = {"steps/observation/rgb": images(2), "steps/observation/instruction": words * 2}
    (root / "bridge-train.tfrecord-00000-of-00002").write_bytes(b"".join(episodes))
    (root / "bridge-val.tfrecord-00001-of-00002").write_bytes(record(example(spelt)))
    return {
        "bridge-train.tfrecord-00000-of-00002:0": ("move block 0", "instruction", "bridge", "train", 6),
        "bridge-train.tfrecord-00000-of-00002:1": ("move block 1", "instruction", "bridge", "train", 4),
        "bridge-val.tfrecord-00001-of-00002:0": ("push it à la", "instruction", "bridge", "validation", 2),
    }


# (layout, what `path` names below the test's folder, builder)
BUILDERS: list[tuple[str, str, Callable[[Path], Expected]]] = [
    ("folder", "videos", folder),
    ("table", "clips.csv", table),
    ("table", "clips.parquet", parquet_table),
    ("something_something_v2", "ssv2", something_something_v2),
    ("ego4d", "ego4d", ego4d),
    ("epic_kitchens_100", "epic", epic_kitchens_100),
    ("howto100m", "howto", howto100m),
    ("webdataset", "tars", webdataset),
    ("egocentric10k", "egocentric", egocentric10k),
    ("webvid", "webvid", webvid),
    ("panda70m", "panda", panda70m),
    ("laq_jpeg", "laq", laq_jpeg),
    ("lerobot", "robot_v2", lerobot_v2),
    ("lerobot", "robot_v3", lerobot_v3),
    ("rlds", "rlds", rlds),
]
