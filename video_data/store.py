"""The frame store on disk: frames appended in order, a journal to go on from, then index, manifest and store.json.

    store.json          sizes, frame rate, an instruction and a source an episode, what was skipped and why;
                        also the id (`clips`) and the frame rate (`clip_fps`) of every episode
    index.safetensors   episode_offsets (E + 1) int64; action (N, A) and state (N, S) float32 where recorded
    frames.u8           raw RGB bytes (N, H, W, 3), all episodes one after the other
    manifest.parquet, manifest.jsonl   one row a requested clip, kept or rejected
    strips.json         small pictures of some rejected clips, for the report

Until store.json is there, `clips.jsonl` holds the rows of every finished video, one line each, written after its
frames. A run that was killed cuts away what lies behind the last whole line and goes on.
"""

import base64
import errno
import itertools
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from video_data import duplicates, json_lines
from video_data.clips import Rejected
from video_data.frame_file import FrameFile
from video_data.parts import release_part
from video_data.pictures import strip_jpeg

FORMAT_VERSION = 1
STRIPS_A_FILTER = 12  # pictures of rejected clips that are kept for the report

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "video", "status", "filter", "reason", "duplicate_of")),
        *((name, pa.float64()) for name in ("duplicate_bits", "start_s", "end_s")),
        *((name, pa.string()) for name in ("caption", "caption_origin", "language")),
        *((name, pa.string()) for name in ("source", "licence", "split", "url", "codec", "sha256", "hash")),
        *((name, pa.int64()) for name in ("width", "height", "num_frames", "num_shots", "store_episode")),
        *((name, pa.float64()) for name in ("fps", "stated_fps", "duration_s", "motion", "sharpness", "brightness")),
        *((name, pa.float64()) for name in ("dark_share", "still_share", "text_share")),
        ("episode", pa.string()),
    ]
)


class StoreWriter:
    """Appends the rows and frames of one video after another; a context manager.

    num_videos: how many were done before, by a run that was killed.
    """

    def __init__(self, folder: Path, fingerprint: str, image_size: int, duplicates_choice: str):
        self.folder, self.image_size = folder, image_size
        self._choice = duplicates_choice
        self._hashes = None if duplicates_choice == "off" else duplicates.HashIndex()
        # Of the episodes in the store: what a later clip can be a duplicate of.
        self._ids: list[str] = []
        self._offsets = array("q", [0])
        self._strips: Counter = Counter()
        self.num_videos = 0
        self._resume(fingerprint)
        self._frames = FrameFile(folder / "frames.u8", self._offsets[-1] * self.frame_bytes)
        self._journal = (folder / "clips.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_) -> None:
        self._frames.close()
        self._journal.close()

    @property
    def frame_bytes(self) -> int:
        return self.image_size**2 * 3

    @property
    def num_episodes(self) -> int:
        return len(self._ids)

    def add(self, rows: list[dict], parts: Path) -> None:
        """Append the clips of one video: `rows` and part files as `curate` leaves them; the parts are removed."""
        for row in rows:
            part, first = row.pop("part", None), row.pop("first_frame", 0)
            if row["status"] == "kept":
                self._add_clip(row, parts / part, first)
            if "strip" in row and not self._keeps_strip(row):
                del row["strip"]
        # Before the journal: frames without a row are cut away, a row without frames could not be mended.
        self._frames.flush()
        self._journal.write(json.dumps(rows) + "\n")
        self._journal.flush()
        self.num_videos += 1
        for part in parts.glob(f"{self.num_videos - 1}-*.u8"):
            release_part(part)

    def _add_clip(self, row: dict, part: Path, first: int) -> None:
        with part.open("rb", buffering=0) as file:
            if self._hashes is not None:
                self._mark_duplicate(row, file, first)
                if row["duplicate_of"] is not None and self._choice == "reject":
                    reason = f"shows {row['duplicate_of']} again"
                    row |= {"status": "rejected", "filter": "duplicates", "reason": reason}
                    jpeg = strip_jpeg(self._pictures(file, first, row["num_frames"])[1::2])
                    row["strip"] = base64.b64encode(jpeg).decode()
                    return
            file.seek(first * self.frame_bytes)
            if missing := self._frames.append(file, row["num_frames"] * self.frame_bytes):
                raise OSError(errno.EIO, f"ends {missing} bytes before its clip {row['id']} does", str(part))
        self._count(row)

    def _keeps_strip(self, row: dict) -> bool:
        """Pictures are kept of the first clips that each filter rejects."""
        self._strips[row["filter"]] += 1
        return self._strips[row["filter"]] <= STRIPS_A_FILTER

    def _count(self, row: dict) -> None:
        """Take note of a kept clip whose frames are in the store."""
        row["store_episode"] = len(self._ids)
        self._ids.append(row["id"])
        self._offsets.append(self._offsets[-1] + row["num_frames"])
        if self._hashes is not None:
            self._hashes.add(bytes.fromhex(row["hash"]))

    def _mark_duplicate(self, row: dict, part, first: int) -> None:
        assert self._hashes is not None
        candidates = self._hashes.near(bytes.fromhex(row["hash"]))
        if not candidates:
            return
        shown = self._pictures(part, first, row["num_frames"])
        # Frames of the clips before may still be in this process's buffer.
        self._frames.flush()
        with (self.folder / "frames.u8").open("rb") as frames:
            for episode, bits in candidates:
                first, behind = self._offsets[episode], self._offsets[episode + 1]
                if duplicates.same_pictures(self._pictures(frames, first, behind - first), shown):
                    row |= {"duplicate_of": self._ids[episode], "duplicate_bits": bits}
                    return

    def _pictures(self, file, first: int, num_frames: int) -> np.ndarray:
        """(8, S, S, 3): the frames that stand for a clip, read without mapping the rest."""
        frames = np.empty((duplicates.NUM_FRAMES, self.image_size, self.image_size, 3), np.uint8)
        for index, position in enumerate(duplicates.frame_positions(num_frames)):
            file.seek((first + int(position)) * self.frame_bytes)
            file.readinto(frames[index].data)
        return frames

    def _resume(self, fingerprint: str) -> None:
        journal, frames = self.folder / "clips.jsonl", self.folder / "frames.u8"
        header = json.dumps({"fingerprint": fingerprint}) + "\n"
        frames.touch()
        size = frames.stat().st_size
        kept_lines_end = 0
        if journal.is_file():
            with journal.open("rb") as file:
                for number, line in enumerate(file):
                    # What follows the last line end was being written when the run was killed.
                    if not line.endswith(b"\n"):
                        break
                    if number == 0 and line.decode() != header:
                        # Where no frame was kept there is nothing to lose.
                        if size:
                            raise ValueError(
                                f"{self.folder} holds a half-finished run with other clips or options: "
                                "delete it, or choose another output_dir"
                            )
                        break
                    if number:
                        rows = json.loads(line)
                        kept = [row for row in rows if row["status"] == "kept"]
                        num_frames = sum(row["num_frames"] for row in kept)
                        # After a power failure the journal may have reached the disk without its frames.
                        if (self._offsets[-1] + num_frames) * self.frame_bytes > size:
                            break
                        for row in kept:
                            self._count(row)
                        self._strips.update(row["filter"] for row in rows if "strip" in row)
                        self.num_videos += 1
                    kept_lines_end += len(line)
        if not kept_lines_end:
            # Captions are told apart by their position, so those of other clips would be taken for these.
            (self.folder / "captions.jsonl").unlink(missing_ok=True)
            journal.write_text(header, encoding="utf-8")
        else:
            os.truncate(journal, kept_lines_end)

    def kept_rows(self) -> list[dict]:
        """The rows of the clips in the store, in the order of their frames, which are on disk then."""
        self._frames.flush()
        return [row for row in read_journal(self.folder) if row["status"] == "kept"]

    def finish(
        self,
        listed: list[Rejected],
        fingerprint: str,
        captions: list[dict] | None = None,
        arrays: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Write manifest and index, then store.json, which makes the folder a frame store.

        listed: what the source could not even ask for. captions: caption and caption_origin of the kept clips, where
        they were written anew. arrays: action (N, A) and state (N, S) float32 of the frames, where recorded. Raises
        ValueError where no clip is kept.
        """
        self._frames.close()
        if not self._ids:
            first = next(iter(read_journal(self.folder)), None)
            raise ValueError(
                f"none of the {sum(1 for _ in read_journal(self.folder)) + len(listed)} clips can be used"
                + (f"; the first, {first['id']}: {first['reason']}" if first else "")
            )
        strips = {row["id"]: row["strip"] for row in read_journal(self.folder) if "strip" in row}
        write_text(self.folder / "strips.json", json.dumps(strips))
        write_manifest(self.folder, [_listed_row(rejected) for rejected in listed], captions)
        index = {"episode_offsets": np.array(self._offsets, np.int64), **(arrays or {})}
        save_file(index, self.folder / ".index.tmp")
        (self.folder / ".index.tmp").replace(self.folder / "index.safetensors")
        kept = {"instructions": "caption", "sources": "source", "clips": "id", "clip_fps": "fps"}
        columns: dict[str, list] = {name: [] for name in kept}
        known: dict = {}
        skipped = []
        for row in read_manifest(self.folder):
            if row["status"] == "kept":
                for name, key in kept.items():
                    # One object for each value that returns, as sources, rates and many captions do.
                    columns[name].append(row[key] if key == "id" else known.setdefault(row[key], row[key]))
            else:
                skipped.append({"clip": row["id"], "reason": row["reason"]})
        store = {
            "version": FORMAT_VERSION,
            "num_frames": self._offsets[-1],
            "image_size": self.image_size,
            # The rate to speak of: the most common, and among equals that of the earliest clip.
            "fps": Counter(columns["clip_fps"]).most_common(1)[0][0],
            **columns,
            "skipped": skipped,
            "fingerprint": fingerprint,
        }
        # Piece by piece: as one text it would take more memory than what it tells.
        temporary = self.folder / ".store.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(store, file, indent=1)
            file.write("\n")
        temporary.replace(self.folder / "store.json")


def _listed_row(rejected: Rejected) -> dict:
    row = {"id": rejected.id, "video": rejected.video, "status": "rejected", "filter": "listing"}
    return row | {"reason": rejected.reason}


def read_journal(folder: Path) -> Iterator[dict]:
    with (folder / "clips.jsonl").open(encoding="utf-8") as file:
        next(file)
        for line in file:
            yield from json.loads(line)


def write_manifest(folder: Path, further: list[dict], captions: list[dict] | None) -> None:
    """manifest.jsonl and manifest.parquet from the journal, then `further` rows; a few thousand rows at a time.

    captions: what replaces the captions of the kept clips, in order.
    """
    text, table = folder / ".manifest.jsonl.tmp", folder / ".manifest.parquet.tmp"
    with text.open("w", encoding="utf-8") as lines:
        for row in itertools.chain(read_journal(folder), further):
            if captions is not None and row["status"] == "kept":
                row |= captions[row["store_episode"]]
            lines.write(json.dumps({name: row.get(name) for name in SCHEMA.names}) + "\n")
    json_lines.to_parquet(text, table, SCHEMA)
    text.replace(folder / "manifest.jsonl")
    table.replace(folder / "manifest.parquet")


def read_manifest(folder: Path, offset: int = 0) -> Iterator[dict]:
    """The rows of the manifest in `folder`, in order; from the line on that begins at byte `offset`."""
    with (folder / "manifest.jsonl").open("rb") as file:
        file.seek(offset)
        for line in file:
            yield json.loads(line)


def clear_parts(folder: Path) -> None:
    """Remove the part files that a killed run left."""
    for leftover in folder.glob(".parts-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
