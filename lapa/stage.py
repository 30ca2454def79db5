"""Run one stage in its folder: skip it when it is complete, refuse other options, write its provenance."""

import dataclasses
import importlib
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from lapa.checkpoint import read_json, write_json
from lapa.cli import STAGES

RECORD = "stage.json"
PACKAGES = ("torch", "lerobot", "mujoco", "gymnasium", "numpy", "av", "opencv-python-headless", "hydra-core")
# Where and with how many processes a stage runs does not change what it makes.
NOT_COMPARED = ("runtime", "num_workers", "cache_dir")


def run_stage(verb: str, config) -> dict:
    """Run the stage `verb` and return its headline numbers.

    A stage with an `output_dir` leaves `stage.json` there: options, results, versions, wall time, peak memory.
    Called again with the same options, a finished stage returns at once and an unfinished one goes on.
    Raises ValueError where the folder holds the same stage with other options.
    """
    output_dir = getattr(config, "output_dir", None)
    if output_dir is None:
        return importlib.import_module(STAGES[verb].module).run(config)

    lock = FileLock(Path(output_dir).with_name(f".{Path(output_dir).name}.lock"))
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process is at work in {output_dir}: wait for it, or choose another output_dir"
        ) from None
    try:
        return run_locked(verb, config, Path(output_dir))
    finally:
        lock.release()


def run_locked(verb: str, config, output_dir: Path) -> dict:
    """`run_stage`, once this process has the folder to itself."""
    record_path = output_dir / RECORD
    options = dataclasses.asdict(config)
    if record_path.is_file():
        record = read_json(record_path)
        refuse_other_options(verb, output_dir, record, options)
        if record["status"] == "complete":
            print(f"{verb}: {output_dir} is complete")
            return record["results"]
    fresh = not record_path.is_file()
    record_path.parent.mkdir(parents=True, exist_ok=True)
    record = {"stage": verb, "status": "running", "options": options}
    write_json(record_path, record)

    started = time.perf_counter()
    try:
        results = importlib.import_module(STAGES[verb].module).run(config)
    except Exception:
        # A stage that failed before it made anything must not pin its options: the next call will correct them.
        if fresh and [path.name for path in record_path.parent.iterdir()] == [RECORD]:
            record_path.unlink()
        raise
    write_json(
        record_path,
        record
        | {
            "status": "complete",
            "results": results,
            "wall_time_s": round(time.perf_counter() - started, 1),
            "peak_memory_mb": peak_memory_mb(),
        }
        | provenance(),
    )
    print(f"{verb}: wrote {output_dir}" + "".join(f"\n  {k}: {_short(v)}" for k, v in results.items()))
    return results


def refuse_other_options(verb: str, output_dir: Path, record: dict, options: dict) -> None:
    if record["stage"] != verb:
        raise ValueError(f"{output_dir} holds the output of `lapa {record['stage']}`: choose another output_dir")
    changed = [
        f"{key} was {record['options'].get(key)!r}, is {value!r}"
        for key, value in options.items()
        if key not in NOT_COMPARED and record["options"].get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{output_dir} was begun with other options ({'; '.join(changed)}): "
            "choose another output_dir, or delete the folder to start anew"
        )


def provenance() -> dict:
    """What ran: versions, commit, machine."""
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": commit(),
        "processor": platform.processor() or platform.machine(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The commit of this source tree, marked where it has changes; None for an installed wheel."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_mb() -> int:
    """The largest resident size so far of this process or of any child, in MB."""
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(largest / 1024)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
