"""`lapa compare_quantizers`: many runs become one table and one picture, averaged over seeds.

Runs whose options differ in nothing but `training.seed` are one row, named by the options in which rows differ.
Intervals hold both kinds of noise: the seeds' (Student's t over their means) and the held-out episodes', which all
seeds share and which therefore does not shrink with more of them.

    table.md, table.csv   a row a configuration: seeds, gate, and each metric with its 95% interval
    scatter.png           delta-PSNR against probe R2, a colour a codebook and a marker a target
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lapa.checkpoint import CONFIG_FILE, read_json
from lapa.schema import GROUPS, CompareQuantizersConfig
from lapa.stage import NOT_COMPARED, RECORD, flatten

STAGES = ("train_quantizer", "evaluate_quantizer")
SEED = "training.seed"
PLACES = {"output_dir", "quantizer"}  # where a run lies
# 97.5% quantile of Student's t for 1, 2, ... degrees of freedom; the normal's from 30 on is close enough.
STUDENT_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.96
FEW_SEEDS = 5
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Run:
    """A folder with a run: its flat options, and its metrics, or why there are none."""

    folder: Path
    options: dict
    metrics: dict | None
    problem: str = ""


@dataclass(frozen=True)
class Estimate:
    """A metric over seeds: mean, 95% interval, and the least and greatest of the seeds."""

    mean: float
    low: float
    high: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone; `estimates` has the metrics that every finished one of them has."""

    name: str
    runs: list[Run]
    estimates: dict[str, Estimate]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.metrics is not None]

    @property
    def verdict(self) -> str:
        """How many passed their gate, and how many never came so far."""
        passed = sum(run.metrics["gate"]["passed"] for run in self.finished if run.metrics)
        unfinished = len(self.runs) - len(self.finished)
        text = f"passed {passed} of {len(self.finished)}" if self.finished else "no result"
        return text + (f", {unfinished} unfinished" if unfinished else "")


def run(cfg: CompareQuantizersConfig) -> dict:
    """Compare every run under `cfg.path`; returns how many there are and which row tells the motion best."""
    runs = find_runs(Path(cfg.path).expanduser())
    known = {name for run in runs for name in run.metrics or {}}
    unknown = [name for name in cfg.columns if name not in known]
    if len(unknown) == len(cfg.columns):
        raise ValueError(f"no run under {cfg.path} has any of the columns {cfg.columns}: they have {sorted(known)}")
    rows = group_runs(runs, cfg.columns)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = [name for name in cfg.columns if name in known]
    write_text(output_dir / "table.md", markdown(rows, columns, unknown))
    write_table(output_dir / "table.csv", rows, columns)
    draw_scatter(output_dir / "scatter.png", rows)
    result: dict = {
        "num_runs": len(runs),
        "num_rows": len(rows),
        "num_unfinished": sum(run.metrics is None for run in runs),
    }
    probed = [row for row in rows if columns and columns[0] in row.estimates]
    if probed:
        result[f"best_{columns[0]}"] = max(probed, key=lambda row: row.estimates[columns[0]].mean).name
    return result


def find_runs(path: Path) -> list[Run]:
    """Every folder under `path` in which a quantizer was trained or evaluated; ValueError where there is none."""
    if not path.is_dir():
        raise ValueError(f"no folder {path}: expected one that holds runs of `lapa train_quantizer`")
    runs = []
    for record_path in sorted(path.rglob(RECORD)):
        record = read_json(record_path)
        if record["stage"] in STAGES:
            runs.append(read_run(record_path.parent, record))
    if not runs:
        raise ValueError(
            f"no run of {' or '.join(f'`lapa {stage}`' for stage in STAGES)} in {path}: no {RECORD} there is theirs"
        )
    return runs


def read_run(folder: Path, record: dict) -> Run:
    """A run from its `stage.json`; an evaluation has the options of the quantizer that it evaluates."""
    options = flatten(record["options"])
    if record["stage"] == "evaluate_quantizer":
        quantizer = Path(options["quantizer"])
        evaluation = {f"evaluation.{name}": value for name, value in options.items() if name not in PLACES}
        if (quantizer / RECORD).is_file() and "training" in read_json(quantizer / RECORD)["options"]:
            options = flatten(read_json(quantizer / RECORD)["options"]) | evaluation
        elif (quantizer / CONFIG_FILE).is_file():
            config = read_json(quantizer / CONFIG_FILE)
            options = flatten({group: config[group] for group in ("model", "codebook")}) | evaluation
        else:
            return Run(folder, evaluation, None, f"its quantizer {quantizer} is gone")
    metrics_path = folder / "metrics.json"
    if record["status"] != "complete" or not metrics_path.is_file():
        return Run(folder, options, None, "not finished")
    return Run(folder, options, read_json(metrics_path))


def group_runs(runs: list[Run], columns: list[str]) -> list[Row]:
    """One row for the runs that differ in their seed alone, in the order of their folders."""
    grouped: dict[tuple, list[Run]] = defaultdict(list)
    for one in runs:
        grouped[tuple(sorted((name, repr(value)) for name, value in compared(one.options).items()))].append(one)
    groups = list(grouped.values())
    names = row_names([compared(group[0].options) for group in groups])
    data = [group[0].options.get("evaluation.data") for group in groups]
    if len(set(data)) > 1:
        names = [name + (f", evaluated on {path}" if path else "") for name, path in zip(names, data, strict=True)]
    wanted = {*columns, "linear_probe_r2", "delta_psnr_db"}
    return [Row(name, group, estimates(group, wanted)) for name, group in zip(names, groups, strict=True)]


def compared(options: dict) -> dict:
    """The options that make two runs different quantizers."""
    return {
        name: value
        for name, value in options.items()
        if name != SEED and name not in PLACES and name.rsplit(".", 1)[-1] not in NOT_COMPARED
    }


def row_names(options: list[dict]) -> list[str]:
    """Each row by the options in which it differs from another that has them too: codebook=fsq, target=pixels.

    What a choice of a group has by default is not said: its name says that.
    """
    differing = []
    for name in dict.fromkeys(name for one in options for name in one):
        if len({repr(one[name]) for one in options if name in one}) > 1:
            differing.append(name)
    names = [
        [f"{name.removesuffix('.name')}={one[name]}" for name in differing if name in one and not is_default(name, one)]
        for one in options
    ]
    return [", ".join(parts) or "all alike" for parts in names]


def is_default(name: str, options: dict) -> bool:
    """Whether `group.field` has the value that this choice of the group starts with."""
    group, _, field = name.partition(".")
    choice = GROUPS.get(group, {}).get(str(options.get(f"{group}.name")))
    return choice is not None and field != "name" and getattr(choice(), field, None) == options[name]


def estimates(runs: list[Run], names: set[str]) -> dict[str, Estimate]:
    """The metrics in `names` that every finished run has, over these runs."""
    finished = [run.metrics for run in runs if run.metrics is not None]
    result = {}
    for name in names:
        if finished and all(isinstance(metrics.get(name), int | float) for metrics in finished):
            values = np.array([metrics[name] for metrics in finished])
            # The width of each seed's interval; none with a single held-out episode.
            spans = np.array(
                [metrics.get(f"{name}_high", 0.0) - metrics.get(f"{name}_low", 0.0) for metrics in finished]
            )
            half = half_interval(values, spans)
            mean = float(values.mean())
            result[name] = Estimate(mean, mean - half, mean + half, float(values.min()), float(values.max()))
    return result


def half_interval(values_S: np.ndarray, spans_S: np.ndarray) -> float:
    """Half the 95% interval of the mean over S seeds, from the widths of the seeds' own intervals over episodes."""
    episodes = float(np.square(spans_S / 2).mean())
    if len(values_S) == 1:
        return math.sqrt(episodes)
    freedom = len(values_S) - 1
    factor = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else NORMAL
    return math.sqrt(factor**2 * values_S.var(ddof=1) / len(values_S) + episodes)


# What is written


def markdown(rows: list[Row], columns: list[str], unknown: list[str]) -> str:
    """The table for a reader, with what to know before comparing its rows."""
    lines = [
        "| " + " | ".join(["quantizer", "seeds", "gate", *columns]) + " |",
        "|" + "---|" * (3 + len(columns)),
    ]
    for row in rows:
        cells = [row.name, str(len(row.finished)), row.verdict]
        cells += [cell(row.estimates.get(name), len(row.finished)) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "mean [95% interval over seeds and held-out episodes] (least to greatest of the seeds)"]
    if any(1 < len(row.finished) < FEW_SEEDS for row in rows):
        lines += ["", f"With fewer than {FEW_SEEDS} seeds an interval rests on few draws: see least and greatest too."]
    if any(len(row.finished) == 1 for row in rows):
        lines += ["", "With one seed the interval is over episodes alone: it says nothing of another training."]
    if unknown:
        lines += ["", f"No run has {', '.join(unknown)}."]
    reasons = {}
    for one in (one for row in rows for one in row.runs):
        if one.metrics is None:
            reasons[one.folder] = one.problem
        elif not one.metrics["gate"]["passed"]:
            reasons[one.folder] = "; ".join(one.metrics["gate"]["reasons"])
    if reasons:
        lines += ["", "Refused by the gate, or without a result:", ""]
        lines += [f"- {folder}: {reason}" for folder, reason in reasons.items()]
    return "\n".join(lines) + "\n"


def cell(estimate: Estimate | None, num_seeds: int) -> str:
    if estimate is None:
        return "-"
    text = f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
    return text + (f" ({estimate.least:.3g} to {estimate.greatest:.3g})" if num_seeds > 1 else "")


def write_table(path: Path, rows: list[Row], columns: list[str]) -> None:
    """The same numbers for a program."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        parts = ("", "_low", "_high", "_least", "_greatest")
        header = ["quantizer", "num_seeds", "num_unfinished", "num_passed"]
        writer.writerow([*header, *(f"{name}{part}" for name in columns for part in parts)])
        for row in rows:
            passed = sum(run.metrics["gate"]["passed"] for run in row.finished if run.metrics)
            cells: list = [row.name, len(row.finished), len(row.runs) - len(row.finished), passed]
            for name in columns:
                value = row.estimates.get(name)
                numbers = (value.mean, value.low, value.high, value.least, value.greatest) if value else [""] * 5
                cells += numbers
            writer.writerow(cells)
    temporary.replace(path)


def shown_span(estimate: Estimate, row: Row) -> tuple[float, float]:
    """What the bars of the picture span: the interval, but least to greatest of few seeds, whose interval is vast."""
    few = 1 < len(row.finished) < FEW_SEEDS
    return (estimate.least, estimate.greatest) if few else (estimate.low, estimate.high)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_scatter(path: Path, rows: list[Row]) -> None:
    """delta-PSNR against probe R2, a point a row; hollow where a seed was refused by its gate."""
    shown = [row for row in rows if {"linear_probe_r2", "delta_psnr_db"} <= row.estimates.keys()]
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="delta-PSNR, dB: how much the latent action decides", ylabel="linear probe R2 of the displacement")
    codebooks = list(dict.fromkeys(str(row.runs[0].options.get("codebook.name", "?")) for row in shown))
    targets = list(dict.fromkeys(str(row.runs[0].options.get("target.name", "pixels")) for row in shown))
    for row in shown:
        options = row.runs[0].options
        colour = f"C{codebooks.index(str(options.get('codebook.name', '?'))) % 10}"
        marker = MARKERS[targets.index(str(options.get("target.name", "pixels"))) % len(MARKERS)]
        x, y = row.estimates["delta_psnr_db"], row.estimates["linear_probe_r2"]
        passed = all(run.metrics["gate"]["passed"] for run in row.finished if run.metrics)
        (x_low, x_high), (y_low, y_high) = shown_span(x, row), shown_span(y, row)
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=[[x.mean - x_low], [x_high - x.mean]],
            yerr=[[y.mean - y_low], [y_high - y.mean]],
            fmt=marker,
            color=colour,
            markerfacecolor=colour if passed else "white",
            markersize=8,
            elinewidth=0.8,
            capsize=2,
        )
    handles = [Line2D([], [], marker="o", ls="", color=f"C{i % 10}", label=name) for i, name in enumerate(codebooks)]
    handles += [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], ls="", color="#555", label=name)
        for i, name in enumerate(targets)
    ]
    handles.append(
        Line2D([], [], marker="o", ls="", color="#555", markerfacecolor="white", label="refused by the gate")
    )
    if shown:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no run has both numbers", ha="center", transform=axes.transAxes)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
