"""How fast and how large an ingest is, measured beside the plain decoding of the same files.

    python -m video_data.benchmark rate path/to/videos      decode and ingest in turns
    python -m video_data.benchmark memory path/to/videos    peak memory with export, once and ten times over

Both start the same number of worker processes and count their start-up. "decode" only decodes; "decode to RGB" also
makes an array of every frame, as any reader of a video must. "ingest" is all of `lapa ingest` behind the imports:
listing, one pass with scores, hashes and filters, the frame store, the data set, the report.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import av

from video_data.clips import VIDEO_SUFFIXES
from video_data.workers import call_in_order

# In a process of its own, so that its memory is measured alone; `video_data` itself imports nothing of `lapa`.
INGEST = """
import resource, sys, time
from lapa.schema import IngestConfig
from video_data.ingest import run
path, output_dir, export, duplicates, num_workers = sys.argv[1:]
def cpu_s():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
started, cpu_before_s = time.perf_counter(), cpu_s()
run(IngestConfig(path=path, output_dir=output_dir, export=export, duplicates=duplicates, num_workers=int(num_workers)))
print(time.perf_counter() - started, cpu_s() - cpu_before_s)
"""
NUM_COPIES = 10
SAMPLE_EVERY_S = 0.1


def decode_file(video: str, to_rgb: bool) -> int:
    """Decode a whole file; the number of its frames."""
    num_frames = 0
    with av.open(video, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if to_rgb:
                frame.to_ndarray(format="rgb24")
            num_frames += 1
    return num_frames


class Measured(NamedTuple):
    """wall_s and cpu_s of all processes together; the CPU time tells more where the machine is busy with others."""

    wall_s: float
    cpu_s: float
    num_frames: int = 0
    peak_mb: float = 0.0


def time_decode(videos: list[str], to_rgb: bool, num_workers: int) -> Measured:
    """Decoding all of them."""
    started, cpu_before_s = time.perf_counter(), cpu_s()
    counts = call_in_order(decode_file, ((video, to_rgb) for video in videos), num_workers)
    num_frames = sum(count or 0 for count in counts)
    return Measured(time.perf_counter() - started, cpu_s() - cpu_before_s, num_frames)


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_ingest(folder: Path, output: Path, export: str, duplicates: str, num_workers: int) -> Measured:
    """One ingest, and the peak memory of all its processes."""
    command = [sys.executable, "-c", INGEST, str(folder), str(output), export, duplicates, str(num_workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak_kb = 0
    while process.poll() is None:
        peak_kb = max(peak_kb, sum(map(memory_kb, processes_below(process.pid))))
        time.sleep(SAMPLE_EVERY_S)
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        raise ValueError(f"the ingest of {folder} failed: run `lapa ingest path={folder}` to see why")
    wall_s, used_s = map(float, printed.split()[-2:])
    return Measured(wall_s, used_s, peak_mb=peak_kb / 1024)


def processes_below(pid: int) -> list[int]:
    """`pid` and all its descendants (Linux)."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it has just ended
                continue
    return found


def memory_kb(pid: int) -> int:
    """Proportional set size: pages shared by several processes are counted once in all."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:  # it has just ended
        pass
    return 0


def measure_rate(folder: Path, num_rounds: int, num_workers: int) -> None:
    videos = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    runs: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="ingest-benchmark-") as scratch:
        for number in range(num_rounds):
            for name, to_rgb in (("decode", False), ("decode to RGB", True)):
                runs.setdefault(name, []).append(time_decode(videos, to_rgb, num_workers))
            for name, export in (("ingest", "none"), ("ingest and export", "lerobot")):
                output = Path(scratch) / f"{number}-{export}"
                runs.setdefault(name, []).append(run_ingest(folder, output, export, "mark", num_workers))
                shutil.rmtree(output)
    num_frames = runs["decode"][0].num_frames
    print(f"{len(videos)} videos, {num_frames} frames, {num_workers} workers, median of {num_rounds} rounds\n")
    print("| what | s | frames/s | CPU s | rate of decode | of decode to RGB | the same by CPU time | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in runs.items():
        wall_s, used_s = median(run.wall_s for run in own), median(run.cpu_s for run in own)
        shares = [
            median(getattr(base, clock) / getattr(run, clock) for base, run in zip(runs[baseline], own, strict=True))
            for clock in ("wall_s", "cpu_s")
            for baseline in ("decode", "decode to RGB")
        ]
        by_wall = f"{shares[0]:.0%} | {shares[1]:.0%}"
        peak = f"{max(run.peak_mb for run in own):.0f}" if own[0].peak_mb else ""
        print(
            f"| {name} | {wall_s:.1f} | {num_frames / wall_s:.0f} | {used_s:.1f} | {by_wall} | "
            f"{shares[2]:.0%}, {shares[3]:.0%} | {peak} |"
        )


def measure_memory(folder: Path, num_copies: int, num_workers: int) -> None:
    """Of an ingest with export, of the videos in `folder` `num_copies` times over and ten times that."""
    print("| clips | frames | peak memory of all processes, MB | more a clip, KB |\n|---|---|---|---|")
    before: tuple[int, float] | None = None
    with tempfile.TemporaryDirectory(prefix="ingest-benchmark-") as scratch:
        for number in (num_copies, NUM_COPIES * num_copies):
            copies = Path(scratch) / f"{number}"
            for copy in range(number):
                _link_videos(folder, copies / f"{copy}")
            output = Path(scratch) / "store"
            peak_mb = run_ingest(copies, output, "lerobot", "off", num_workers).peak_mb
            store = json.loads((output / "store.json").read_text(encoding="utf-8"))
            num_clips = len(store["clips"])
            growth = f"{1024 * (peak_mb - before[1]) / (num_clips - before[0]):.1f}" if before else ""
            print(f"| {num_clips} | {store['num_frames']} | {peak_mb:.0f} | {growth} |", flush=True)
            before = num_clips, peak_mb
            shutil.rmtree(output)


def _link_videos(folder: Path, copies: Path) -> None:
    for file in folder.rglob("*"):
        if file.suffix.lower() in VIDEO_SUFFIXES:
            link = copies / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure `lapa ingest` on a folder of videos.")
    parser.add_argument("what", choices=("rate", "memory"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="of a small folder, for `memory`")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "rate":
        measure_rate(arguments.folder, arguments.rounds, arguments.workers)
    else:
        measure_memory(arguments.folder, arguments.copies, arguments.workers)


if __name__ == "__main__":
    main()
