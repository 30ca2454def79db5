"""`lapa report`: a run directory's tables and figures, and one self-contained HTML page for a person to look at.

Reads only what the stages wrote: `stage.json`, `log.jsonl`, `metrics.json`, `images/*.png`,
`episodes.jsonl` and `videos/*.mp4`. What a run does not have is left out.

run_dir/
    report.html
    tables/success.*       success with intervals, a split, family and arm (csv, json, md, png)
    tables/comparisons.*   differences between arms and gap closures, with intervals (csv, json, md)
    tables/curve.*         success by what a sweep varied, of runs in points/<number> (csv, json, md, png)
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np

from lapa import tables
from lapa.checkpoint import read_json
from lapa.outcomes import ALL_FAMILIES, ARM_NAMES, Outcomes, headline, in_order, read_outcomes, with_pooled
from lapa.schema import ReportConfig
from lapa.statistics import wilson_interval
from lapa.tables import percent
from lapa.trainer import read_log

ARM_COLOURS = {
    "scratch": "#8a8f98",
    "scratch_long": "#5b6472",
    "grounded": "#6b8e23",
    "unipi": "#b5651d",
    "vpt": "#d99a1c",
    "shuffled": "#c9b8d8",
    "pixel_kmeans": "#9a6fb8",
    "lapa": "#2f6fde",
    "oracle": "#4fb3bf",
    "action_vla": "#1f9d6b",
    "act": "#b8860b",
}
QUANTIZER_IMAGES = {
    "reconstructions": "Held-out pairs: present frame, future frame, reconstruction from the latent action, errors.",
    "gallery": "Every latent action (or a sample of them) applied to the same frames.",
    "transfer": "The same latent actions in several scenes: each column should make the same change everywhere.",
    "arrows": "True displacement of each latent action, where actions are known; no label was made from them.",
    "usage": "How often each latent action is used on held-out pairs.",
}
MAX_VIDEOS_PER_ARM = 4


def run(config: ReportConfig) -> dict:
    """Write tables, figures and the page; returns its path and the headline numbers."""
    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"no run directory {run_dir}: expected the run_dir of `lapa run`")
    options = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    video_dir = Path(options.get("video_dir", run_dir))
    outcomes, missing = read_outcomes(run_dir / "evaluate")
    points = {float(folder.name): read_outcomes(folder / "evaluate")[0] for folder in find_points(run_dir)}
    sections = [
        success_section(outcomes, missing, run_dir / "tables", config.baseline),
        curve_section(points, config.curve, run_dir / "tables"),
        rollout_section(run_dir / "evaluate"),
        quantizer_section(video_dir / "quantizer"),
        grounding_section(video_dir / "grounding"),
        keypoints_section(run_dir, video_dir),
        curves_section(run_dir, video_dir),
        provenance_section(run_dir),
    ]
    title = config.title or f"LAPA run: {run_dir.resolve().name}"
    output = Path(config.output) if config.output else run_dir / "report.html"
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(page(title, [s for s in sections if s]), encoding="utf-8")
    temporary.replace(output)
    print(f"report: wrote {output.resolve()}")
    return {"report": str(output.resolve()), **headline(outcomes)}


def find_points(run_dir: Path) -> list[Path]:
    """The folders points/<number> of a sweep, by number."""
    folders = [path for path in run_dir.glob("points/*") if path.name.replace(".", "", 1).isdigit()]
    return sorted(folders, key=lambda path: float(path.name))


# Sections


def success_section(outcomes: Outcomes, missing: list[str], folder: Path, baseline: str) -> str:
    """Write success and comparisons into `folder`, and show them."""
    if not outcomes:
        return ""
    success, comparisons = tables.success_table(outcomes), tables.comparison_table(outcomes, baseline)
    picture = success_bars(with_pooled(outcomes))
    success.write(folder, "success", picture)
    comparisons.write(folder, "comparisons")
    compared = ""
    if comparisons.rows:
        compared = f"<h3>Differences and gap closures</h3>{table_by_family(comparisons)}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    return (
        "<h2>Success in MuJoCo</h2><p>All arms share the architecture, the demonstrations, the finetuning, the "
        "decoding and the initial states; they differ in what they were pretrained on.</p>"
        + image(picture, "success with 95% Wilson intervals")
        + table_by_family(success)
        + compared
        + f"<ul>{notes}</ul>"
    )


def table_by_family(of: tables.Table) -> str:
    """The rows over all families to see at once, those of each family to unfold; all rows where no family is pooled."""
    lines = list(zip(of.rows, of.text, strict=True))
    pooled = [text for row, text in lines if row["family"] == ALL_FAMILIES]
    single = [text for row, text in lines if row["family"] != ALL_FAMILIES]
    if not pooled:
        return table(of.header, single)
    return table(of.header, pooled) + f"<details><summary>By family</summary>{table(of.header, single)}</details>"


def curve_section(points: dict[float, Outcomes], axis: str, folder: Path) -> str:
    """Write the curve of a sweep into `folder`, and show it; `axis` says what the points are numbers of."""
    points = {x: outcomes for x, outcomes in points.items() if outcomes}
    if not points:
        return ""
    curve = tables.curve_table(points, axis)
    picture = success_curves(curve.rows, axis)
    curve.write(folder, "curve", picture)
    return (
        f"<h2>Success by {escape(axis)}</h2>"
        + image(picture, "success with 95% intervals over seeds and episodes")
        + table(curve.header, curve.text)
    )


def rollout_section(folder: Path) -> str:
    cells = []
    for arm_folder in sorted([*folder.glob("*-seed*"), *folder.glob("*/*-seed*")]):
        for video in sorted((arm_folder / "videos").glob("*.mp4"))[:MAX_VIDEOS_PER_ARM]:
            source = f"data:video/mp4;base64,{encode(video.read_bytes())}"
            caption = escape(f"{arm_folder.relative_to(folder)}: {video.stem}")
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


def grounding_section(folder: Path) -> str:
    if not (folder / "metrics.json").is_file():
        return ""
    metrics, parts = read_json(folder / "metrics.json"), []
    names = {
        "cross_entropy": "cross-entropy a cell, nats",
        "with_other_instructions": "with another frame's instruction",
        "least": "least possible",
    }
    for prefix, picture, where in (
        ("held_out", "changes", "held-out episodes"),
        ("test", "test_changes", "ground.test_data"),
    ):
        path = folder / "images" / f"{picture}.png"
        if f"{prefix}_least" not in metrics or not path.is_file():
            continue
        rows = [[text, number(metrics[f"{prefix}_{name}"])] for name, text in names.items()]
        parts.append(
            f"<h2>Grounding, on {where}</h2><p>What is expected to leave its place by the end of the clip, and next, "
            "learned without actions; the first without the second is the object that the instruction names.</p>"
            + table(["metric", "value"], rows)
            + image(path.read_bytes(), "frames, what is expected to leave its place, what does")
        )
    return "".join(parts)


def keypoints_section(run_dir: Path, video_dir: Path) -> str:
    """Of the first seed of every arm."""
    found = {path for folder in (video_dir, run_dir) for path in folder.glob("pretrain/*/images/keypoints.png")}
    pictures: dict[str, tuple[str, Path]] = {}
    for name, path in sorted((path.parent.parent.name, path) for path in found):
        pictures.setdefault(name.rpartition("-seed")[0], (name, path))
    if not pictures:
        return ""
    shown = (f"<h3>{escape(name)}</h3>" + image(path.read_bytes(), name) for name, path in pictures.values())
    return (
        "<h2>Keypoints after pretraining</h2><p>Where they look in held-out frames. With a grounding, circles began "
        "where it looks, 0 to 3 for all that moves, 4 to 7 for the object; crosses began anywhere.</p>" + "".join(shown)
    )


def interval_text(metrics: dict, name: str) -> str:
    """The interval that `lapa train_quantizer` wrote beside a metric, if it did."""
    if f"{name}_low" not in metrics:
        return ""
    return f"{number(metrics[f'{name}_low'])} to {number(metrics[f'{name}_high'])}"


def curves_section(run_dir: Path, video_dir: Path) -> str:
    pretrained = sorted({*video_dir.glob("pretrain/*/log.jsonl"), *run_dir.glob("pretrain/*/log.jsonl")})
    groups = {
        "quantizer": {"quantizer": video_dir / "quantizer"},
        "grounding": {"grounding": video_dir / "grounding"},
        "pretraining": {p.parent.name: p.parent for p in pretrained},
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
    """Bars of every arm, families side by side, splits below each other."""
    from matplotlib.figure import Figure

    arms = in_order({arm for by_arm in groups.values() for arm in by_arm})
    splits = list(dict.fromkeys(split for split, _ in groups))
    families = list(dict.fromkeys(family for _, family in groups))
    panel_width = max(1.3, 0.26 * len(arms))
    figure = Figure(figsize=(panel_width * len(families) + 2.6, 2.8 * len(splits) + 0.3), layout="constrained")
    width = 0.8 / len(arms)
    for axes, split in zip(np.atleast_1d(figure.subplots(len(splits), 1, sharex=True)), splits, strict=True):
        labelled = set()
        for position, arm in enumerate(arms):
            for group, family in enumerate(families):
                outcomes = groups.get((split, family), {}).get(arm)
                if outcomes is None:
                    continue
                rate = outcomes.mean()
                low, high = wilson_interval(int(outcomes.sum()), outcomes.size)
                x = group + (position - (len(arms) - 1) / 2) * width
                axes.bar(
                    x,
                    rate,
                    width * 0.92,
                    color=ARM_COLOURS.get(arm, "#b8860b"),
                    label=None if arm in labelled else ARM_NAMES.get(arm, arm),
                    yerr=[[max(0.0, rate - low)], [max(0.0, high - rate)]],
                    error_kw={"capsize": 3, "lw": 1},
                )
                labelled.add(arm)
                axes.text(x, min(1.0, high + 0.02), percent(rate), ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(families)), [family.replace("_", " ") for family in families])
        axes.set_ylim(0, 1.12)
        axes.set_ylabel("success rate" if len(splits) == 1 else f"success rate, {split}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def success_curves(rows: list[dict], axis: str) -> bytes:
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(row["split"] for row in rows))
    figure = Figure(figsize=(4.2 * len(splits) + 1.6, 3.4), layout="constrained")
    for axes, split in zip(np.atleast_1d(figure.subplots(1, len(splits), sharey=True)), splits, strict=True):
        for arm in in_order({row["arm"] for row in rows}):
            own = [row for row in rows if row["split"] == split and row["arm"] == arm]
            x, y = [row["point"] for row in own], [row["success"] for row in own]
            colour = ARM_COLOURS.get(arm, "#b8860b")
            axes.plot(x, y, "o-", lw=1.5, ms=4, color=colour, label=ARM_NAMES.get(arm, arm))
            axes.fill_between(x, [row["low"] for row in own], [row["high"] for row in own], color=colour, alpha=0.15)
        points = sorted({row["point"] for row in rows})
        if points[0] > 0:
            axes.set_xscale("log")
        axes.set_xticks(points, [f"{point:g}" for point in points])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
        if len(splits) > 1:
            axes.set_title(split, fontsize=10)
    axes.set_ylabel("success rate") if len(splits) == 1 else figure.supylabel("success rate", fontsize=10)
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


def number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
