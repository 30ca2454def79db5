"""RLDS (Open X-Embodiment): TFRecord shards of TensorFlow Datasets, one tf.train.Example an episode.

TensorFlow Datasets flattens the steps of an episode: `steps/observation/image` holds one encoded JPEG or PNG a
step, `steps/language_instruction` one string a step (or `steps/observation/natural_language_instruction`, or its
bytes in `steps/observation/instruction`). The folder holds `features.json` and the shards
`<data set>-<split>.tfrecord-00000-of-00004`; it has no frame rate, which is the option `image_fps`.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from video_data.clips import ClipRequest, Rejected
from video_data.sources import tfrecord

SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-\d+-of-\d+")
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
INSTRUCTIONS = (
    "steps/language_instruction",
    "steps/observation/natural_language_instruction",
    "steps/language_instruction_2",
    "steps/language_instruction_3",
    "language_instruction",
)
NUMBERS = "steps/observation/instruction"
SPLITS = {"val": "validation"}


def looks_like(root: Path) -> bool:
    return root.is_dir() and (any(root.glob("*.tfrecord*")) or any(root.glob("*/features.json")))


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Episodes in the order of shard and record; ids are "<shard>:<number>". options: camera, image_fps.

    `root` is the folder of a version, or one above it. Raises ValueError where there are no shards.
    """
    shards = sorted(file for file in root.rglob("*.tfrecord*") if file.is_file())
    if not shards:
        raise ValueError(f"no *.tfrecord* in {root}: it holds {sorted(entry.name for entry in root.iterdir())[:8]}")
    for shard in shards:
        yield from _list_shard(root, shard, options)


def _list_shard(root: Path, shard: Path, options) -> Iterator[ClipRequest | Rejected]:
    path = shard.relative_to(root).as_posix()
    named = SHARD.fullmatch(shard.name)
    source, split = (named["name"], named["split"]) if named else (shard.name.split(".")[0], "")
    offsets = tfrecord.record_offsets(shard)
    number = 0
    while True:
        clip = f"{path}:{number}"
        try:
            offset = next(offsets, None)
        except (ValueError, OSError) as error:
            # Behind a damaged length there is no telling where the next record begins.
            yield Rejected(clip, path, str(error))
            return
        if offset is None:
            return
        try:
            camera, caption = _describe(shard, offset, options.camera)
        except (ValueError, OSError) as error:
            yield Rejected(clip, f"{path}#{offset}", str(error))
        else:
            yield ClipRequest(
                clip,
                f"{path}#{offset}",
                caption=caption,
                caption_origin="instruction" if caption else "none",
                source=source,
                split=SPLITS.get(split, split),
                fps=options.image_fps,
                episode={"camera": camera},
            )
        number += 1


def _describe(shard: Path, offset: int, wanted: str | None) -> tuple[str, str]:
    """(name of the image feature, instruction) of an episode, without reading its pictures."""
    features = tfrecord.parse_example(tfrecord.map_record(shard, offset))
    cameras = sorted(name for name in features if _is_image(features[name]))
    return _choose(cameras, wanted, sorted(features)), _instruction(features)


def _is_image(feature: memoryview) -> bool:
    # A bytes_list whose first value opens like a picture; only its first bytes are looked at.
    start = bytes(feature[:32])
    return feature[:1] == b"\x0a" and any(mark in start for mark in IMAGE_STARTS)


def _choose(cameras: list[str], wanted: str | None, names: list[str]) -> str:
    if not cameras:
        raise ValueError(f"the episode has no JPEG or PNG images: its features are {names}")
    if wanted is None:
        # Depth is stored as PNG too, and is no picture of what happens.
        return next((camera for camera in cameras if "depth" not in camera), cameras[0])
    for camera in cameras:
        if wanted in (camera, camera.rsplit("/", 1)[-1]):
            return camera
    raise ValueError(f"camera is {wanted!r}, the episode's image features are {cameras}")


def _instruction(features: dict[str, memoryview]) -> str:
    for name in INSTRUCTIONS:
        if name in features:
            for value in tfrecord.bytes_values(features[name]):
                if stated := bytes(value).decode(errors="ignore").strip():
                    return stated
    if NUMBERS in features:
        # One row a step: the bytes of its UTF-8, filled up with zeros; the first row ends at its first zero.
        letters = tfrecord.int_values(features[NUMBERS])
        spelt = letters[: letters.index(0)] if 0 in letters else []
        return bytes(letter & 0xFF for letter in spelt).decode(errors="ignore").strip()
    return ""


def open_images(shard: Path, offset: int, camera: str) -> Iterator[BinaryIO]:
    """The encoded pictures of an episode, in order. Raises ValueError where the record is damaged."""
    features = tfrecord.parse_example(tfrecord.read_record(shard, offset))
    if camera not in features:
        raise ValueError(f"the record at byte {offset} of {shard} has no feature {camera!r}: it has {sorted(features)}")
    for image in tfrecord.bytes_values(features[camera]):
        yield io.BytesIO(image)
