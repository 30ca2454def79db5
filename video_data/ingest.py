"""Stage `lapa ingest`: video from any source becomes curated clips in one memory-mapped frame store.

List (`sources/`), decode every video once and score its clips (`curate.py`, on processes or on Ray), drop what the
filters reject, append the rest in order (`store.py`), export where asked (`export.py`), draw `report.html`.
The output depends on the clips and the options alone: not on the runner, its workers, or how often it was killed.
"""

import contextlib
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock
from tqdm import tqdm

from video_data.annotate import recorded_actions, write_captions
from video_data.captions import Captioner, captioner
from video_data.clips import ClipRequest, Rejected
from video_data.curate import Video, crashed, curate
from video_data.decode import PassOptions
from video_data.export import export_lerobot
from video_data.filters import shots, text
from video_data.report import write_report
from video_data.runner import RUNNERS, run_in_order
from video_data.sources import list_requests
from video_data.sources.located import status
from video_data.store import FORMAT_VERSION, StoreWriter, clear_parts, read_manifest

CHOICES = {
    "motion": ("codec", "flow", "off"),
    "duplicates": ("mark", "reject", "off"),
    "export": ("none", "lerobot"),
    "runner": RUNNERS,
}


def run(cfg) -> dict:
    """Ingest what `cfg.path` holds into `cfg.output_dir`. Returns counts and the frame rate.

    cfg: lapa.schema.IngestConfig. Raises ValueError for wrong options and where no clip at all can be used.
    """
    _check(cfg)
    # Absolute, because FFmpeg takes what precedes a colon of a relative name for a protocol, and because workers on
    # other machines have another working directory.
    root, output = Path(cfg.path).expanduser().absolute(), Path(cfg.output_dir).expanduser().absolute()
    # Before anything is downloaded or decoded: a model that is not there is found out in seconds.
    is_written = cfg.captioner.name != "given" and not (output / "store.json").is_file()
    writer = captioner(cfg.captioner) if is_written else None
    videos, rejected = _list_videos(list_requests(cfg.layout, root, cfg), cfg.num_shards, cfg.shard)
    options = PassOptions(
        cfg.image_size, cfg.motion, cfg.samples_per_s, text.NUM_PICTURES if text.is_wanted(cfg.filters) else 0
    )
    decoded = _fingerprint(root, videos, options, cfg)
    fingerprint = hashlib.sha256(f"{decoded} {cfg.captioner}".encode()).hexdigest()[:16]
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        if not (output / "store.json").is_file():
            _ingest(root, output, videos, rejected, options, (decoded, fingerprint), writer, cfg)
        # What follows reads the manifest, so no more than that is held of each clip.
        del videos, rejected
        store = json.loads((output / "store.json").read_text(encoding="utf-8"))
        num_frames, fps = store["num_frames"], store["fps"]
        if store.get("fingerprint") != fingerprint:
            raise ValueError(
                f"{output} holds other clips or options than {root} now: delete it, or choose another output_dir"
            )
        del store
        for name in ("clips.jsonl", "captions.jsonl"):
            (output / name).unlink(missing_ok=True)
        if cfg.export == "lerobot":
            export_lerobot(root, output, cfg.export_keyframe_interval, cfg.runner, cfg.num_workers)
        write_report(output)
    return _headline(output, num_frames, fps)


def _check(cfg) -> None:
    for name in ("image_size", "num_workers", "num_shards", "samples_per_s"):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"{name} is {getattr(cfg, name)}, expected more than 0")
    if cfg.filters.min_frames < 1:
        raise ValueError(f"filters.min_frames is {cfg.filters.min_frames}, expected at least 1")
    if not 0 <= cfg.shard < cfg.num_shards:
        raise ValueError(f"shard is {cfg.shard}, expected 0 to {cfg.num_shards - 1} for num_shards={cfg.num_shards}")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise ValueError(f"{name} is {getattr(cfg, name)!r}, expected one of {choices}")
    if cfg.filters.shots not in ("off", "reject", "split"):
        raise ValueError(f"filters.shots is {cfg.filters.shots!r}, expected off, reject or split")
    if cfg.keep_actions and cfg.filters.shots == "split":
        raise ValueError("keep_actions needs whole episodes: set filters.shots to off or reject, or leave it off")
    for name in ("min_motion", "max_motion"):
        if cfg.motion == "off" and getattr(cfg.filters, name):
            raise ValueError(f"filters.{name} is {getattr(cfg.filters, name)} and motion is off: set motion=codec")
    if cfg.filters.shot_detector not in shots.DETECTORS:
        raise ValueError(f"filters.shot_detector is {cfg.filters.shot_detector!r}, expected one of {shots.DETECTORS}")


def _list_videos(
    entries: Iterable[ClipRequest | Rejected], num_shards: int, shard: int
) -> tuple[list[Video], list[Rejected]]:
    """The requests of this shard, by video in the order of its first request, and what cannot be requested.

    All clips of a video are in one shard, told by a checksum of its name, so shards need no list of each other.
    """
    requests: dict[str, list[ClipRequest]] = {}
    rejected = []
    for entry in entries:
        if zlib.crc32(entry.video.encode(errors="surrogateescape")) % num_shards != shard:
            continue
        if isinstance(entry, Rejected):
            rejected.append(entry)
        else:
            requests.setdefault(entry.video, []).append(entry)
    return [Video(number, tuple(clips)) for number, clips in enumerate(requests.values())], rejected


def _fingerprint(root: Path, videos: list[Video], options: PassOptions, cfg) -> str:
    """Changes with any clip and with the options of its decoding, so that no store is made of two different runs."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {options} {cfg.filters} {cfg.duplicates} {cfg.keep_actions}\n".encode())
    for video in videos:
        # Members of an archive change with the archive.
        location = root / video.requests[0].video
        archive = root / video.requests[0].video.rpartition("#")[0]
        stat = status(location) or status(archive)
        changed = stat and (stat.st_size, stat.st_mtime_ns)
        digest.update(f"{video.requests} {changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _ingest(
    root: Path,
    output: Path,
    videos: list[Video],
    rejected: list[Rejected],
    options: PassOptions,
    fingerprints: tuple[str, str],
    writer: Captioner | None,
    cfg,
) -> None:
    """Curate every video and append its clips, in order; then write the index.

    fingerprints: of what is decoded, and of that with its captions. writer: None for captions as they came.
    """
    clear_parts(output)
    num_clips = sum(len(video.requests) for video in videos)
    with (
        tempfile.TemporaryDirectory(dir=output, prefix=".parts-") as parts,
        StoreWriter(output, fingerprints[0], cfg.image_size, cfg.duplicates) as store,
    ):
        waiting = videos[store.num_videos :]
        # Plain, because the configuration's own class would make every worker load what it is made with.
        filters = SimpleNamespace(**vars(cfg.filters))
        calls = [(video, str(root), parts, options, filters) for video in waiting]
        done = num_clips - sum(len(video.requests) for video in waiting)
        results = run_in_order(cfg.runner, curate, calls, cfg.num_workers)
        with (
            tqdm(total=num_clips, initial=done, desc="ingest", unit="clip", mininterval=1.0) as progress,
            contextlib.closing(results),
        ):
            for video, rows in zip(waiting, results, strict=True):
                store.add(rows or crashed(video), Path(parts))
                progress.update(len(video.requests))
                progress.set_postfix(kept=store.num_episodes, refresh=False)
        kept = store.kept_rows() if writer or cfg.keep_actions else []
        captions = write_captions(output, root, kept, writer, cfg.captioner) if writer else None
        actions = recorded_actions(root, kept) if cfg.keep_actions else None
        store.finish(rejected, fingerprints[1], captions, actions)


def _headline(output: Path, num_frames: int, fps: float) -> dict:
    results = {
        "num_clips": 0,
        "num_skipped": 0,
        "num_duplicates": 0,
        "num_frames": num_frames,
        "num_without_caption": 0,
        "fps": fps,
        "num_clips_of_other_fps": 0,
    }
    for row in read_manifest(output):
        is_kept = row["status"] == "kept"
        results["num_clips"] += is_kept
        results["num_skipped"] += not is_kept
        results["num_duplicates"] += row["duplicate_of"] is not None
        results["num_without_caption"] += is_kept and not row["caption"]
        results["num_clips_of_other_fps"] += is_kept and row["fps"] != fps
    return results
