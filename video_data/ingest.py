"""Stage `lapa ingest`: a folder of video files becomes one memory-mapped frame store.

    store.json          sizes, frame rate, an instruction and a source an episode, what was skipped and why;
                        also the path (`clips`) and the frame rate (`clip_fps`) of every clip
    index.safetensors   episode_offsets (E + 1) int64
    frames.u8           raw RGB bytes (N, H, W, 3), all clips one after the other

Until store.json is there, `clips.jsonl` records every finished clip after its frames are written; a run that
was killed goes on behind the last one recorded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file
from tqdm import tqdm

from video_data.clips import Clip, list_clips
from video_data.decode import decode_clip
from video_data.workers import call_in_order

FORMAT_VERSION = 1
CRASHED = {"reason": "the decoder crashed"}


def run(cfg) -> dict:
    """Decode every clip of `cfg.path` once, into `cfg.output_dir`. Returns counts and the frame rate.

    cfg: path, output_dir, image_size (pixels), captions, source_column, min_frames, num_workers.
    Raises ValueError for wrong options and where no clip at all can be used.
    """
    for name in ("image_size", "min_frames", "num_workers"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected at least 1")
    folder, output = Path(cfg.path).expanduser(), Path(cfg.output_dir).expanduser()
    clips, skipped = list_clips(folder, cfg.captions, cfg.source_column)
    fingerprint = _fingerprint(folder, clips, cfg.image_size, cfg.min_frames)
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        store_path = output / "store.json"
        if not store_path.is_file():
            records = _decode_all(folder, output, clips, fingerprint, cfg)
            _write_store(output, clips, records, skipped, fingerprint, cfg.image_size)
        store = json.loads(store_path.read_text(encoding="utf-8"))
        (output / "clips.jsonl").unlink(missing_ok=True)
    if store.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{output} holds other clips or options than {folder} now: delete it, or choose another output_dir"
        )
    return _headline(store)


def _fingerprint(folder: Path, clips: list[Clip], image_size: int, min_frames: int) -> str:
    """Changes with the options and with any clip, so that no store is made of two different runs."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {image_size} {min_frames}\n".encode())
    for clip in clips:
        stat = (folder / clip.path).stat()
        digest.update(f"{clip} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _decode_all(folder: Path, output: Path, clips: list[Clip], fingerprint: str, cfg) -> list[dict]:
    """Append the frames of every clip, in order, to frames.u8; one record a clip."""
    for leftover in output.glob(".parts-*"):
        shutil.rmtree(leftover)
    records = _resume(output, fingerprint, cfg.image_size)
    waiting = range(len(records), len(clips))
    with (
        tempfile.TemporaryDirectory(dir=output, prefix=".parts-") as folder_of_parts,
        (output / "frames.u8").open("ab") as frames,
        (output / "clips.jsonl").open("a", encoding="utf-8") as journal,
        tqdm(total=len(clips), initial=len(records), desc="ingest", unit="clip", mininterval=1.0) as progress,
    ):
        parts = {i: Path(folder_of_parts) / f"{i}.u8" for i in waiting}
        calls = ((folder / clips[i].path, parts[i], cfg.image_size, cfg.min_frames) for i in waiting)
        with contextlib.closing(call_in_order(decode_clip, calls, cfg.num_workers)) as results:
            for part, result in zip(parts.values(), results, strict=True):
                record = result or CRASHED
                if "num_frames" in record:
                    with part.open("rb") as decoded:
                        shutil.copyfileobj(decoded, frames, 1 << 22)
                    frames.flush()
                part.unlink(missing_ok=True)
                journal.write(json.dumps(record) + "\n")
                journal.flush()
                records.append(record)
                progress.update()
    return records


def _resume(output: Path, fingerprint: str, image_size: int) -> list[dict]:
    """The records of clips that a killed run finished; frames behind them are cut away."""
    journal, frames = output / "clips.jsonl", output / "frames.u8"
    header = json.dumps({"fingerprint": fingerprint})
    # What follows the last line end was being written when the run was killed.
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1] if journal.is_file() else []
    records, num_bytes = [], 0
    if lines and lines[0] == header and frames.is_file():
        records = [json.loads(line) for line in lines[1:]]
        num_bytes = sum(record.get("num_frames", 0) for record in records) * image_size**2 * 3
        # After a power failure the journal may have reached the disk without the frames it speaks of.
        if frames.stat().st_size < num_bytes:
            records, num_bytes = [], 0
    frames.touch()
    os.truncate(frames, num_bytes)
    _write_text(journal, "".join(f"{line}\n" for line in [header, *map(json.dumps, records)]))
    return records


def _write_store(
    output: Path, clips: list[Clip], records: list[dict], skipped: list[dict], fingerprint: str, image_size: int
) -> None:
    """Write the index, then store.json, which makes the folder a frame store."""
    kept = [(clip, record) for clip, record in zip(clips, records, strict=True) if "num_frames" in record]
    broken = [{"clip": clip.path, **record} for clip, record in zip(clips, records, strict=True) if "reason" in record]
    if not kept:
        raise ValueError(
            f"none of the {len(clips)} clips can be used; the first, {broken[0]['clip']}: {broken[0]['reason']}"
        )
    offsets = np.cumsum([0, *(record["num_frames"] for _, record in kept)], dtype=np.int64)
    save_file({"episode_offsets": offsets}, output / ".index.tmp")
    (output / ".index.tmp").replace(output / "index.safetensors")
    store = {
        "version": FORMAT_VERSION,
        "num_frames": int(offsets[-1]),
        "image_size": image_size,
        # A store has one frame rate: the most common, and among equals that of the earliest clip.
        "fps": Counter(record["fps"] for _, record in kept).most_common(1)[0][0],
        "instructions": [clip.caption for clip, _ in kept],
        "sources": [clip.source for clip, _ in kept],
        "skipped": skipped + broken,
        "clips": [clip.path for clip, _ in kept],
        "clip_fps": [record["fps"] for _, record in kept],
        "fingerprint": fingerprint,
    }
    _write_text(output / "store.json", json.dumps(store, indent=1) + "\n")


def _headline(store: dict) -> dict:
    return {
        "num_clips": len(store["clips"]),
        "num_skipped": len(store["skipped"]),
        "num_frames": store["num_frames"],
        "num_without_caption": store["instructions"].count(""),
        "fps": store["fps"],
        "num_clips_of_other_fps": sum(fps != store["fps"] for fps in store["clip_fps"]),
    }


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
