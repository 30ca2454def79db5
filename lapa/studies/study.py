"""Stage `study`: one experiment of the model zoo, every arm with every seed, and its table with intervals.

A study is a module with

    arms(study) -> list[Arm]                the things that are compared, controls among them
    COLUMNS: list[str]                      the numbers of the table, most important first
    NOTES: str                              what to expect and how to read the table, printed under it
    draw(results, path)                     optional: a picture of all results

output_dir/
    runs/<arm>-seed<k>.json   the numbers of one run; one that is there is not run again
    results.json              mean and 95% interval over seeds, an arm and a number
    table.md                  the same to read
    study.png                 where the study draws one

An interval over few seeds is Student's, of the mean over seeds. `difference` compares each arm with the first one, seed
by seed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from lapa.checkpoint import read_json, write_json
from lapa.runtime import Compute, setup
from lapa.schema import StudyConfig
from lapa.trainer import read_log

# The name in the configuration and the module that holds the study.
STUDIES: dict[str, str] = {
    "causal_experts": "lapa.studies.causal_experts",
    "facts": "lapa.studies.facts",
    "noisy_text": "lapa.studies.noisy_text",
    "modalities": "lapa.studies.modalities",
    "transfusion": "lapa.studies.transfusion",
}

# Student's 97.5% points by degrees of freedom; for more seeds that of 9 is used, a little too wide.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    run: of the seed, the folder for its checkpoints and logs, and where to compute; flat numbers.
    """

    name: str
    run: Callable[[int, Path, Compute], dict[str, float]]


def run(cfg: StudyConfig) -> dict:
    """Run what is missing, then write results, table and picture; returns the first column's mean of each arm."""
    name = cfg.study.name
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}: known are {sorted(STUDIES)}")
    module = import_module(STUDIES[name])
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir).expanduser()
    arms = module.arms(cfg.study)
    unknown = sorted(set(cfg.arms) - {arm.name for arm in arms})
    if unknown:
        raise ValueError(f"unknown arms {unknown}: known are {[arm.name for arm in arms]}")
    arms = [arm for arm in arms if not cfg.arms or arm.name in cfg.arms]
    # Seed by seed, so that a study that is stopped early still compares all arms.
    pending = [(seed, arm) for seed in cfg.seeds for arm in arms]
    numbers: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for index, (seed, arm) in enumerate(pending):
        path = output_dir / "runs" / f"{arm.name}-seed{seed}.json"
        if not path.is_file():
            print(f"\n== {index + 1} of {len(pending)}: {arm.name}, seed {seed}", flush=True)
            torch.manual_seed(seed)
            started = time.perf_counter()
            found = arm.run(seed, output_dir / "runs" / f"{arm.name}-seed{seed}", compute)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**found, "wall_time_s": time.perf_counter() - started})
        numbers[arm.name].append(read_json(path))
    results = {arm: summary(runs, numbers[arms[0].name]) for arm, runs in numbers.items()}
    write_json(output_dir / "results.json", results)
    text = table(results, module.COLUMNS)
    (output_dir / "table.md").write_text(f"{text}\n{module.NOTES.strip()}\n", encoding="utf-8")
    if hasattr(module, "draw"):
        module.draw(results, output_dir / "study.png")
    print(f"\n{text}")
    return {f"{arm}_{module.COLUMNS[0]}": values[module.COLUMNS[0]]["mean"] for arm, values in results.items()}


def summary(runs: list[dict[str, float]], first_arm: list[dict[str, float]]) -> dict[str, dict]:
    """Of every number: mean, low and high over seeds, the values, and the paired difference to the first arm."""
    found = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs], dtype=float)
        low, high = student_interval(values)
        found[name] = {"mean": float(values.mean()), "low": low, "high": high, "values": values.tolist()}
        if all(name in run for run in first_arm):
            difference = values - np.array([run[name] for run in first_arm], dtype=float)
            low, high = student_interval(difference)
            found[name]["difference"] = {"mean": float(difference.mean()), "low": low, "high": high}
    return found


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of a few independent values (Student 1908); the value itself if there is one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean
    half = STUDENT.get(len(values) - 1, STUDENT[9]) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return mean - half, mean + half


def table(results: dict[str, dict], columns: list[str]) -> str:
    """Markdown, a row an arm: mean [low, high] over seeds; a dash where an arm has no such number."""
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, values in results.items():
        cells = []
        for column in columns:
            entry = values.get(column)
            if entry is None:
                cells.append("-")
            elif entry["low"] == entry["high"]:
                cells.append(shown(entry["mean"]))
            else:
                cells.append(f"{shown(entry['mean'])} [{shown(entry['low'])}, {shown(entry['high'])}]")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """Three significant figures; large numbers in full."""
    if value != value:
        return "nan"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def steps_to_reach(folder: Path, name: str, level: float) -> float:
    """The first logged step of a run at which the number is at most the level; NaN if it never was."""
    return next(
        (float(row["step"]) for row in read_log(folder / "log.jsonl") if row.get(name, np.inf) <= level), np.nan
    )
