"""What is added to the kept clips once their frames are in the store: written captions, recorded actions."""

import json
from itertools import batched
from pathlib import Path

import numpy as np
from tqdm import tqdm

from video_data.captions import Captioner
from video_data.captions.frames import shown_frames
from video_data.clips import ClipRequest
from video_data.sources.lerobot import read_actions
from video_data.store import write_text


def write_captions(folder: Path, root: Path, kept: list[dict], writer: Captioner, options) -> list[dict]:
    """{"caption", "caption_origin"} of every kept clip, from `writer`, which was made of `options`.

    kept: rows of the manifest, whose media lie in `root`. options: lapa.schema.Captioner. What is written goes to
    captions.jsonl in `folder` at once, so a run that was killed goes on behind it; one with other options begins
    anew, as the first line tells.
    """
    done = folder / "captions.jsonl"
    header = json.dumps({"captioner": repr(options)})
    lines = done.read_text(encoding="utf-8").split("\n")[:-1] if done.is_file() else []
    captions = [json.loads(line) for line in lines[1:]] if lines[:1] == [header] else []
    # What follows the last line end was being written when the run was killed.
    write_text(done, "".join(line + "\n" for line in (header, *map(json.dumps, captions))))
    with (
        done.open("a", encoding="utf-8") as file,
        tqdm(total=len(kept), initial=len(captions), desc="caption", unit="clip", mininterval=1.0) as progress,
    ):
        for rows in batched(kept[len(captions) :], options.batch_size):
            requests = [_request(row) for row in rows]
            frames = [_shown(request, root, row, options) for request, row in zip(requests, rows, strict=True)]
            for caption, origin in writer.caption_batch(frames, requests):
                captions.append({"caption": caption, "caption_origin": origin})
                file.write(json.dumps(captions[-1]) + "\n")
            file.flush()
            progress.update(len(rows))
    return captions


def recorded_actions(root: Path, kept: list[dict]) -> dict[str, np.ndarray]:
    """{"action": (N, A), "state": (N, S)} float32 for the frames of the kept clips, of a data set of a robot.

    Raises ValueError where a clip has other frames than its actions.
    """
    arrays: dict[str, list[np.ndarray]] = {}
    for row in kept:
        episode = json.loads(row["episode"]) if row["episode"] else None
        if episode is None:
            raise ValueError(f"{row['id']} is no episode of a robot: keep_actions is for data sets with actions")
        recorded = read_actions(root, episode)
        if len(recorded["action"]) != row["num_frames"]:
            raise ValueError(
                f"{row['id']} has {row['num_frames']} frames and {len(recorded['action'])} actions: "
                "actions cannot be kept for clips split into shots or with lost frames"
            )
        for name, values in recorded.items():
            arrays.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in arrays.items() if len(values) == len(kept)}


def _shown(request: ClipRequest, root: Path, row: dict, options) -> np.ndarray:
    """What the writer sees of a clip; nothing of one whose caption it leaves alone."""
    if options.only_missing and request.caption:
        return np.empty((0, 0, 0, 3), np.uint8)
    return shown_frames(request, root, row["num_frames"], row["fps"], options.num_frames)


def _request(row: dict) -> ClipRequest:
    names = ("id", "video", "start_s", "end_s", "caption", "caption_origin", "source", "licence", "split", "url")
    episode = json.loads(row["episode"]) if row["episode"] else None
    return ClipRequest(**{name: row[name] for name in names}, fps=row["stated_fps"], episode=episode)
