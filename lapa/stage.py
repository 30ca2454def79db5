"""Run one stage in its folder: skip it when it is complete, refuse other options, write its provenance."""

import dataclasses
import hashlib
import importlib
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from lapa import distributed
from lapa.checkpoint import read_json, write_json
from lapa.cli import STAGES

RECORD = "stage.json"
PACKAGES = ("torch", "lerobot", "mujoco", "gymnasium", "numpy", "av", "opencv-python-headless", "hydra-core")
# The stages that processes started by `torchrun` share; any other is run by the first process while the rest wait.
DATA_PARALLEL = {"train_quantizer", "train_inverse", "pretrain", "finetune", "finetune_unipi"}
# Where a stage runs, with how many processes and how chattily, does not change what it makes.
NOT_COMPARED = {"device", "num_threads", "num_workers", "runner", "cache_dir", "tensorboard", "log_every_steps"}


def run_stage(verb: str, config) -> dict:
    """Run the stage `verb` and return its headline numbers.

    A stage with an `output_dir` leaves `stage.json` there: options, results, versions, wall time, peak memory.
    Called again with the same options, a finished stage returns at once and an unfinished one goes on.
    Raises ValueError where the folder holds the same stage with other options.
    """
    distributed.start()
    output_dir = getattr(config, "output_dir", None)
    if output_dir is None:
        return importlib.import_module(STAGES[verb].module).run(config)
    output_dir = str(Path(output_dir).expanduser())
    config = dataclasses.replace(config, output_dir=output_dir)
    if not distributed.is_main():
        return follow_main(verb, config)

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
        refuse_other_stage(verb, output_dir, record)
        if not STAGES[verb].repeats:
            selects = STAGES[verb].selects
            refuse_other_options(output_dir, record, config, selects)
            refuse_other_inputs(output_dir, record, options)
            if record["status"] == "complete" and all(record["options"].get(n) == options[n] for n in selects):
                print(f"{verb}: {output_dir} is complete")
                return distributed.share(record["results"])
    fresh = not record_path.is_file()
    record_path.parent.mkdir(parents=True, exist_ok=True)
    record = {"stage": verb, "status": "running", "options": options, "inputs": input_digests(options)}
    record |= provenance()
    write_json(record_path, record)
    distributed.share(None)

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
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    print(f"{verb}: wrote {output_dir}" + "".join(f"\n  {k}: {_short(v)}" for k, v in results.items()))
    return distributed.share(results)


def follow_main(verb: str, config) -> dict:
    """What the other processes do: the first has the folder, tells whether there is work left, and shares its results.

    They never touch the folder's lock, `stage.json` or the stage's files.
    """
    results = distributed.share(None)
    if results is None:
        if verb in DATA_PARALLEL:
            importlib.import_module(STAGES[verb].module).run(config)
        results = distributed.share(None)
    return results


def refuse_other_stage(verb: str, output_dir: Path, record: dict) -> None:
    if record["stage"] != verb:
        raise ValueError(f"{output_dir} holds the output of `lapa {record['stage']}`: choose another output_dir")


def refuse_other_options(output_dir: Path, record: dict, config, selects: tuple[str, ...] = ()) -> None:
    """ValueError where an option that shapes what is made differs; those in `selects` only choose parts of it."""
    before = flatten(record["options"])
    # A folder made before an option existed was made with its default.
    new = new_options_at_default(config, before)
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in flatten(dataclasses.asdict(config)).items()
        if name not in new
        and name not in selects
        and name.rsplit(".", 1)[-1] not in NOT_COMPARED
        and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{output_dir} was begun with other options ({'; '.join(changed)}): "
            "choose another output_dir, or delete the folder to start anew"
        )


def new_options_at_default(config, before: dict, prefix: str = "") -> set[str]:
    """Names of the options that `before` does not have and that are at their defaults."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value) and any(known.startswith(f"{name}.") for known in before):
            names |= new_options_at_default(value, before, f"{name}.")
        elif name not in before and value == default:
            names |= set(flatten({field.name: dataclasses.asdict(config)[field.name]}, prefix))
    return names


def refuse_other_inputs(output_dir: Path, record: dict, options: dict) -> None:
    """A folder made from an input that has since been made anew is stale."""
    digests = input_digests(options)
    changed = [name for name, digest in record.get("inputs", {}).items() if digests.get(name) != digest]
    if changed:
        raise ValueError(
            f"{output_dir} was made from other contents of {', '.join(changed)}: delete it to make it from the new ones"
        )


def input_digests(options: dict) -> dict[str, str]:
    """Which run of a stage made each input folder: a digest of the `stage.json` in it or above it."""
    digests = {}
    named = flatten(options)
    for name, value in list(named.items()):
        if isinstance(value, list):  # the data sets of a mixture
            named |= flatten({f"{name}.{i}": entry for i, entry in enumerate(value) if isinstance(entry, dict)})
    for name, value in named.items():
        if name == "output_dir" or not isinstance(value, str) or not value or not Path(value).is_dir():
            continue
        for folder in (Path(value), Path(value).parent):
            if (folder / RECORD).is_file():
                digests[name] = hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()[:16]
                break
    return digests


def flatten(options: dict, prefix: str = "") -> dict:
    """Nested options as {"training.seed": 0, ...}."""
    flat: dict = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def provenance() -> dict:
    """What ran: versions, commit, machine."""
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": commit(),
        "processor": platform.processor() or platform.machine(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
