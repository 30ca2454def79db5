"""What a captioner made of noisy titles, against the true captions: slots, names, swaps, with intervals.

Every metric is a ratio of two sums over clips. Intervals are central 95% of a bootstrap over clips (they are paired:
a resample draws the same clips for all arms), of the mean over training seeds.
"""

from collections.abc import Sequence

import numpy as np

from video_data.captions.titles import KINDS, SLOTS, Title, parse, split_words

NUM_RESAMPLES = 2000
HEADLINE = ("slot_f1", "brand_recall", "swaps_fixed", "right_broken", "exact")
# (metric, arm, the arm that it is hoped to be above)
COMPARISONS = (
    ("slot_f1", "realigned", "raw"),
    ("slot_f1", "realigned", "scratch"),
    ("slot_f1", "realigned", "copying"),
    ("brand_recall", "realigned", "scratch"),
    ("swaps_fixed", "realigned", "copying"),
)
DESCRIPTIONS = {
    "slot_f1": "slot F1",
    **{f"slot_f1_{kind}": f"slot F1, {kind}" for kind in KINDS},
    **{f"f1_{slot}": f"F1 of the {slot}" for slot in SLOTS},
    "brand_recall": "unseen brands kept",
    "swaps_fixed": "swapped entities fixed",
    "right_broken": "right slots of the title broken",
    "exact": "exact match",
}


def measure(written: dict[str, list[list[str]]], titles: Sequence[Title], objects: Sequence[str]) -> dict:
    """{"metrics": {metric: {arm: {"mean", "low", "high", "seeds"} or None}}, "differences": [...]}.

    written: texts (S, E) of every arm, of one or more seeds. objects: the nouns that count as objects.
    """
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(titles), np.full(len(titles), 1 / len(titles)), size=NUM_RESAMPLES)
    true = [parse(title.truth, objects).slots for title in titles]
    given = [parse(title.text, objects).slots for title in titles]
    means: dict[str, dict[str, np.ndarray]] = {name: {} for name in DESCRIPTIONS}
    metrics: dict[str, dict] = {name: {} for name in DESCRIPTIONS}
    for arm, texts_of_seeds in written.items():
        of_seeds = [_sums(texts, titles, true, given, objects) for texts in texts_of_seeds]
        for name in DESCRIPTIONS:
            ratios = [sums[name] for sums in of_seeds]
            if not any(below.any() for _, below in ratios):
                metrics[name][arm] = None  # of a slot or a kind of title that no clip has
                continue
            seeds = [_ratio(above.sum(), below.sum()) for above, below in ratios]
            resampled = np.mean([_ratio(draws @ above, draws @ below) for above, below in ratios], axis=0)
            means[name][arm] = resampled
            low, high = np.nanpercentile(resampled, [2.5, 97.5])
            numbers = {"mean": np.mean(seeds), "low": low, "high": high}
            metrics[name][arm] = {key: float(value) for key, value in numbers.items()}
            metrics[name][arm]["seeds"] = [float(value) for value in seeds]
    differences = []
    for name, arm, other in COMPARISONS:
        if metrics[name][arm] is None or metrics[name][other] is None:
            continue
        low, high = np.nanpercentile(means[name][arm] - means[name][other], [2.5, 97.5])
        mean = metrics[name][arm]["mean"] - metrics[name][other]["mean"]
        row = {"metric": name, "arm": arm, "over": other, "mean": mean, "low": float(low), "high": float(high)}
        differences.append(row | {"holds": bool(low > 0)})
    return {"num_clips": len(titles), "metrics": metrics, "differences": differences}


def _sums(
    texts: Sequence[str], titles: Sequence[Title], true: list[dict], given: list[dict], objects: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every metric, what is above and below the line, (E,) each."""
    counts: dict[str, list[tuple[float, float]]] = {name: [] for name in DESCRIPTIONS}
    for text, title, truth, before in zip(texts, titles, true, given, strict=True):
        after = parse(text, objects).slots
        agreeing = {slot for slot, value in after.items() if truth.get(slot) == value}
        f1 = (2 * len(agreeing), len(after) + len(truth))
        counts["slot_f1"].append(f1)
        for kind in KINDS:
            counts[f"slot_f1_{kind}"].append(f1 if title.kind == kind else (0, 0))
        for slot in SLOTS:
            counts[f"f1_{slot}"].append((2 * (slot in agreeing), (slot in after) + (slot in truth)))
        # The brand itself must be there, wherever in the text.
        words = {word.lower() for word in split_words(text)}
        counts["brand_recall"].append((truth["brand"] in words, 1) if "brand" in truth else (0, 0))
        counts["swaps_fixed"].append((title.swapped in agreeing, 1) if title.swapped else (0, 0))
        right = {slot for slot, value in before.items() if truth.get(slot) == value}
        counts["right_broken"].append((len(right - agreeing), len(right)))
        same = [word.lower() for word in split_words(text)] == [word.lower() for word in split_words(title.truth)]
        counts["exact"].append((same, 1))
    columns = {name: np.array(pairs, float) for name, pairs in counts.items()}
    return {name: (pairs_E2[:, 0], pairs_E2[:, 1]) for name, pairs_E2 in columns.items()}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio; not a number where nothing is below the line."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)


def table(results: dict) -> str:
    """Markdown: a row a metric, a column an arm, percent with interval and seeds; then the paired differences."""
    arms = list(results["metrics"]["slot_f1"])
    lines = [
        f"{results['num_clips']} held-out clips; percent [95% interval over clips] (seeds)",
        "",
        "| | " + " | ".join(arm.replace("_", " ") for arm in arms) + " |",
        "|---" * (len(arms) + 1) + "|",
    ]
    for name, described in DESCRIPTIONS.items():
        cells = [_cell(results["metrics"][name][arm]) for arm in arms]
        lines.append(f"| {described} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | percentage points [95% interval] | |", "|---|---|---|"]
    for row in results["differences"]:
        interval = f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        verdict = "holds" if row["holds"] else "does not hold"
        lines.append(f"| {DESCRIPTIONS[row['metric']]}: {row['arm']} over {row['over']} | {interval} | {verdict} |")
    return "\n".join(lines) + "\n"


def _cell(numbers: dict | None) -> str:
    if numbers is None:
        return "none"
    text = f"{100 * numbers['mean']:.1f} [{100 * numbers['low']:.1f}, {100 * numbers['high']:.1f}]"
    if len(numbers["seeds"]) > 1:
        text += f" ({', '.join(f'{100 * seed:.1f}' for seed in numbers['seeds'])})"
    return text
