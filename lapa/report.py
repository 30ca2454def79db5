"""`lapa report`: one self-contained HTML page of a run directory, for a person to look at.

Reads only what the stages wrote: `stage.json`, `log.jsonl`, `metrics.json`, `images/*.png`,
`episodes.jsonl` and `videos/*.mp4`. What a run does not have is left out.
"""

import base64
import html
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from lapa.checkpoint import read_json
from lapa.schema import ReportConfig
from lapa.statistics import gap_closure, interval, resampled_means, wilson_interval
from lapa.trainer import read_log

ARM_NAMES = {"scratch": "Scratch", "lapa": "LAPA", "action_vla": "ActionVLA (upper bound)"}
ARM_COLOURS = {"scratch": "#8a8f98", "lapa": "#2f6fde", "action_vla": "#1f9d6b"}
QUANTIZER_IMAGES = {
    "reconstructions": "Held-out pairs: present frame, future frame, reconstruction from the latent action, errors.",
    "gallery": "Every latent action (or a sample of them) applied to the same frames.",
    "transfer": "The same latent actions in several scenes: each column should make the same change everywhere.",
    "arrows": "True displacement of each latent action, where actions are known; no label was made from them.",
    "usage": "How often each latent action is used on held-out pairs.",
}
MAX_VIDEOS_PER_ARM = 4

Outcomes = dict[str, dict[str, np.ndarray]]  # family -> arm -> (seeds, episodes)


def run(config: ReportConfig) -> dict:
    """Write the page; returns its path and the headline numbers."""
    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"no run directory {run_dir}: expected the run_dir of `lapa run`")
    outcomes, missing = read_outcomes(run_dir / "evaluate")
    sections = [
        success_section(outcomes, missing),
        rollout_section(run_dir / "evaluate"),
        quantizer_section(run_dir / "quantizer"),
        curves_section(run_dir),
        provenance_section(run_dir),
    ]
    title = config.title or f"LAPA run: {run_dir.resolve().name}"
    output = Path(config.output) if config.output else run_dir / "report.html"
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(page(title, [s for s in sections if s]), encoding="utf-8")
    temporary.replace(output)
    print(f"report: wrote {output.resolve()}")
    return {"report": str(output.resolve()), **headline(outcomes)}


def read_outcomes(folder: Path) -> tuple[Outcomes, list[str]]:
    """Success of every family, arm, seed and episode; and what had to be left out, in words."""
    successes: dict = defaultdict(lambda: defaultdict(dict))
    crashed: dict[str, int] = defaultdict(int)
    for path in sorted(folder.glob("*-seed*/episodes.jsonl")):
        arm, seed = path.parent.name.rsplit("-seed", 1)
        for line in path.read_text(encoding="utf-8").splitlines():
            episode = json.loads(line)
            if episode.get("error"):
                crashed[path.parent.name] += 1
            successes[episode["family"]][arm].setdefault(int(seed), {})[episode["seed"]] = bool(episode["success"])
    missing = [f"{count} episodes of {name} crashed and count as failures." for name, count in crashed.items()]
    outcomes: Outcomes = {}
    for family, arms in successes.items():
        every_run = [episodes for seeds in arms.values() for episodes in seeds.values()]
        shared = sorted(set.intersection(*(set(episodes) for episodes in every_run)))
        if any(len(episodes) > len(shared) for episodes in every_run):
            missing.append(f"{family}: only the {len(shared)} episodes that every arm and seed has are compared.")
        outcomes[family] = {
            arm: np.array([[episodes[s] for s in shared] for _, episodes in sorted(seeds.items())])
            for arm, seeds in arms.items()
        }
    return outcomes, missing


def headline(outcomes: Outcomes) -> dict:
    """Success of each arm over all families, and the gap closure."""
    pooled = pool_families(outcomes)
    numbers: dict = {f"success_{arm}": round(float(array.mean()), 4) for arm, array in pooled.items()}
    closure = gap_closure(pooled)
    if closure:
        numbers["gap_closure"] = round(closure["value"], 3)
    return numbers


def pool_families(outcomes: Outcomes) -> dict[str, np.ndarray]:
    """arm -> (seeds, episodes of all families)."""
    if not outcomes:
        return {}
    arms = set.intersection(*(set(by_arm) for by_arm in outcomes.values()))
    return {
        arm: np.concatenate([by_arm[arm] for by_arm in outcomes.values()], axis=1)
        for arm in [a for a in ARM_NAMES if a in arms] + sorted(arms - set(ARM_NAMES))
    }


# Sections


def success_section(outcomes: Outcomes, missing: list[str]) -> str:
    if not outcomes:
        return ""
    groups = {family: outcomes[family] for family in outcomes}
    if len(outcomes) > 1:
        groups["all families"] = pool_families(outcomes)
    rows = []
    for family, by_arm in groups.items():
        ordered = [a for a in ARM_NAMES if a in by_arm] + sorted(set(by_arm) - set(ARM_NAMES))
        bootstrap = resampled_means(by_arm)
        for arm in ordered:
            array = by_arm[arm]
            low, high = wilson_interval(int(array.sum()), array.size)
            hierarchical = interval(bootstrap[arm])
            rows.append(
                [
                    family,
                    ARM_NAMES.get(arm, arm),
                    percent(array.mean()),
                    f"{percent(low)} to {percent(high)}",
                    f"{percent(hierarchical[0])} to {percent(hierarchical[1])}",
                    ", ".join(percent(value) for value in array.mean(axis=1)),
                    f"{array.shape[0]} x {array.shape[1]}",
                ]
            )
    closures = []
    for family, by_arm in groups.items():
        if "action_vla" not in by_arm or "scratch" not in by_arm or "lapa" not in by_arm:
            continue
        closure = gap_closure(by_arm)
        closures.append(
            f"<li>{escape(family)}: gap closure (LAPA − Scratch) / (ActionVLA − Scratch) = "
            + (
                f"<b>{closure['value']:.2f}</b> [{closure['low']:.2f}, {closure['high']:.2f}]</li>"
                if closure
                else "left out, ActionVLA − Scratch is inside the noise.</li>"
            )
        )
    header = [
        "family",
        "arm",
        "success",
        "95% Wilson",
        "95% over seeds and episodes",
        "by seed",
        "seeds x episodes",
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    return (
        "<h2>Success in MuJoCo</h2><p>All arms share the architecture, the demonstrations, the finetuning, the "
        "decoding and the initial states; they differ in what they were pretrained on.</p>"
        + image(success_bars(groups), "success with 95% Wilson intervals")
        + table(header, rows)
        + f"<ul>{''.join(closures)}{notes}</ul>"
    )


def rollout_section(folder: Path) -> str:
    cells = []
    for arm_folder in sorted(folder.glob("*-seed*")):
        for video in sorted((arm_folder / "videos").glob("*.mp4"))[:MAX_VIDEOS_PER_ARM]:
            source = f"data:video/mp4;base64,{encode(video.read_bytes())}"
            caption = escape(f"{arm_folder.name}: {video.stem}")
            cells.append(
                f'<figure><video src="{source}" autoplay loop muted playsinline></video>'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    return f'<h2>Rollouts</h2><div class="grid">{"".join(cells)}</div>' if cells else ""


def quantizer_section(folder: Path) -> str:
    metrics_path = folder / "metrics.json"
    if not metrics_path.is_file():
        return ""
    metrics = read_json(metrics_path)
    gate = metrics.pop("gate", None)
    rows = [
        [name, number(value), interval_text(metrics, name)]
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.endswith(("_low", "_high"))
    ]
    verdict = ""
    if gate:
        reasons = "; ".join(gate.get("reasons", []))
        outcome = "passed" if gate["passed"] else "refused"
        verdict = f"<p>Gate before pretraining: <b>{outcome}</b> {escape(reasons)}</p>"
    pictures = "".join(
        f"<h3>{name}</h3><p>{text}</p>" + image((folder / "images" / f"{name}.png").read_bytes(), name)
        for name, text in QUANTIZER_IMAGES.items()
        if (folder / "images" / f"{name}.png").is_file()
    )
    return (
        f"<h2>Latent-action quantizer, on held-out clips</h2>{verdict}"
        + table(["metric", "value", "95% interval over episodes"], rows)
        + pictures
    )


def interval_text(metrics: dict, name: str) -> str:
    """The interval that `lapa train_quantizer` wrote beside a metric, if it did."""
    if f"{name}_low" not in metrics:
        return ""
    return f"{number(metrics[f'{name}_low'])} to {number(metrics[f'{name}_high'])}"


def curves_section(run_dir: Path) -> str:
    groups = {
        "quantizer": {"quantizer": run_dir / "quantizer"},
        "pretraining": {p.parent.name: p.parent for p in sorted(run_dir.glob("pretrain/*/log.jsonl"))},
        "finetuning": {p.parent.name: p.parent for p in sorted(run_dir.glob("finetune/*/log.jsonl"))},
    }
    curves = {
        title: {
            name: [(row["step"], row["loss"]) for row in read_log(folder / "log.jsonl")]
            for name, folder in runs.items()
        }
        for title, runs in groups.items()
    }
    curves = {title: {n: c for n, c in runs.items() if c} for title, runs in curves.items()}
    curves = {title: runs for title, runs in curves.items() if runs}
    return f"<h2>Training loss</h2>{image(loss_curves(curves), 'loss curves')}" if curves else ""


def provenance_section(run_dir: Path) -> str:
    records = [(path.parent, read_json(path)) for path in sorted(run_dir.rglob("stage.json"))]
    if not records:
        return ""
    rows, details = [], []
    for folder, record in records:
        name = str(folder.relative_to(run_dir))
        seed = record["options"].get("seed", record["options"].get("training", {}).get("seed", ""))
        rows.append(
            [
                name,
                record["stage"],
                record["status"],
                seed,
                record.get("wall_time_s", ""),
                record.get("peak_memory_mb", ""),
                record.get("commit") or "",
                record.get("finished_at", ""),
            ]
        )
        details.append(f"<h4>{escape(name)}</h4><pre>{escape(json.dumps(record['options'], indent=1))}</pre>")
    versions: dict = next((record["versions"] for _, record in records if "versions" in record), {})
    total = sum(record.get("wall_time_s", 0) for _, record in records)
    peak = max(record.get("peak_memory_mb", 0) for _, record in records)
    return (
        f"<h2>Provenance</h2><p>{total / 60:.1f} minutes in all, peak memory {peak} MB. "
        + ", ".join(f"{escape(k)} {escape(str(v))}" for k, v in versions.items())
        + "</p>"
        + table(
            ["folder", "stage", "status", "seed", "wall time, s", "peak memory, MB", "commit", "finished"],
            rows,
        )
        + f"<details><summary>Every option of every stage</summary>{''.join(details)}</details>"
    )


# Plots


def success_bars(groups: Outcomes) -> bytes:
    arms = list(dict.fromkeys(a for a in ARM_NAMES for by_arm in groups.values() if a in by_arm))
    arms += sorted({a for by_arm in groups.values() for a in by_arm} - set(arms))
    figure, axes = new_figure(1.9 * len(groups) + 2.6, 3.4)
    width = 0.8 / len(arms)
    for position, arm in enumerate(arms):
        for group, by_arm in enumerate(groups.values()):
            if arm not in by_arm:
                continue
            rate = by_arm[arm].mean()
            low, high = wilson_interval(int(by_arm[arm].sum()), by_arm[arm].size)
            x = group + (position - (len(arms) - 1) / 2) * width
            axes.bar(
                x,
                rate,
                width * 0.92,
                color=ARM_COLOURS.get(arm, "#b8860b"),
                label=ARM_NAMES.get(arm, arm) if group == 0 else None,
                yerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]],
                error_kw={"capsize": 3, "lw": 1},
            )
            axes.text(x, min(1.0, high + 0.02), percent(rate), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(groups)), [name.replace("_", " ") for name in groups])
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("success rate")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def loss_curves(curves: dict[str, dict[str, list[tuple[int, float]]]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for axes, (title, runs) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        for name, curve in runs.items():
            arm = name.rsplit("-seed", 1)[0]
            steps, losses = zip(*curve, strict=True)
            first = not any(line.get_label() == ARM_NAMES.get(arm, arm) for line in axes.get_lines())
            axes.plot(
                steps,
                losses,
                lw=1,
                color=ARM_COLOURS.get(arm, "#444"),
                label=ARM_NAMES.get(arm, arm) if first else None,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def new_figure(width: float, height: float):
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# HTML


def page(title: str, sections: list[str]) -> str:
    body = "".join(f"<section>{section}</section>" for section in sections) or "<p>Nothing has been run here yet.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2330; }}
body {{ max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #dde1e8; padding-bottom: .3rem; }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e8ebf0; }}
td {{ font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; }} pre {{ font-size: 12px; background: #f5f6f8; padding: .7rem; overflow-x: auto; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: .8rem; }}
figure {{ margin: 0; }} figcaption {{ font-size: 12px; color: #5b6472; }}
video {{ width: 100%; image-rendering: pixelated; }}
</style></head><body><h1>{escape(title)}</h1>{body}</body></html>
"""


def table(header: list[str], rows: list[list]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def image(data: bytes, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{encode(data)}"></p>'


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def escape(text: str) -> str:
    return html.escape(text)


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
