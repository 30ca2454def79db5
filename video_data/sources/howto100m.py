"""HowTo100M: speech of instructional videos, with the span in which it was said.

`caption.json` (or `raw_caption.json`, with the stop words left in) is {video id: {"start": [s], "end": [s],
"text": [...]}}, and `HowTo100M_v1.csv` has video_id, category_1, category_2, rank, task_id. The release has no
videos: they are looked for as `videos/<video id>.*`, and downloaded from YouTube where download_dir is set. The
source of a clip is its video's category_1.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from video_data.clips import ClipRequest, Rejected
from video_data.sources import rows
from video_data.sources.documents import iterate_object
from video_data.sources.located import fetch_missing, find_video

TABLE = "HowTo100M_v1.csv"
CAPTIONS = ("caption.json", "raw_caption.json")
URL = "https://www.youtube.com/watch?v="


def looks_like(root: Path) -> bool:
    return (root / TABLE).is_file()


def list_clips(root: Path, options) -> Iterator[ClipRequest | Rejected]:
    """Clips in the order of the captions. options: download_dir, attempts, num_workers.

    Raises ValueError where there are no captions.
    """
    captions = next((root / name for name in CAPTIONS if (root / name).is_file()), None)
    if captions is None:
        raise ValueError(f"no {CAPTIONS[0]} or {CAPTIONS[1]} in {root}")
    categories = {}
    if (root / TABLE).is_file():
        rows.require_columns(root / TABLE, ("video_id",))
        categories = {row["video_id"]: rows.text(row, "category_1") for _, row in rows.read_rows(root / TABLE)}
    yield from fetch_missing(partial(_list_spans, root, captions, categories), root, options)


def _list_spans(root: Path, captions: Path, categories: dict[str, str]) -> Iterator[ClipRequest | Rejected]:
    for name, spoken in iterate_object(captions):
        found = find_video(root / "videos", name)
        video = found.relative_to(root).as_posix() if found else f"videos/{name}.mp4"
        try:
            spans = list(zip(spoken["start"], spoken["end"], spoken["text"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            yield Rejected(name, video, f"start, end and text of the captions do not fit together: {error}")
            continue
        for start, end, text in spans:
            clip = f"{name}:{start}-{end}"
            try:
                start_s, end_s = rows.span(start, end)
            except ValueError as error:
                yield Rejected(clip, video, str(error))
                continue
            caption = str(text).strip()
            yield ClipRequest(
                clip,
                video,
                start_s,
                end_s,
                caption,
                caption_origin="asr" if caption else "none",
                source=categories.get(name) or "howto100m",
                url=URL + name,
            )
