"""What the evaluations of a run say: success of every arm, seed and episode, and the statistics of it.

`lapa evaluate` leaves `episodes.jsonl` in evaluate/<arm>-seed<k>, or evaluate/<split>/<arm>-seed<k> where a run
evaluates several splits.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lapa.checkpoint import read_json
from lapa.statistics import difference, gap_closure, interval, resampled_means, wilson_interval

# In the order of tables and figures; an arm that is not listed keeps its own name and follows.
ARM_NAMES = {
    "scratch": "Scratch",
    "scratch_long": "Scratch, longer",
    "grounded": "grounding alone",
    "unipi": "UniPi",
    "vpt": "VPT",
    "shuffled": "LAPA, shuffled labels",
    "pixel_kmeans": "k-means on pixels",
    "lapa": "LAPA",
    "oracle": "oracle codes",
    "action_vla": "ActionVLA (upper bound)",
    "act": "ACT (LeRobot)",
}
ALL_FAMILIES = "all families"
FLOORS = ("scratch", "grounded")  # from which a gap is closed, to ActionVLA

Arms = dict[str, np.ndarray]  # arm -> (seeds, episodes) bool
Outcomes = dict[tuple[str, str], Arms]  # (split, family)


def read_outcomes(folder: Path) -> tuple[Outcomes, list[str]]:
    """Success of every split, family, arm, seed and episode; and what had to be left out, in words.

    Evaluations lie in <arm>-seed<k>/, or in <split>/<arm>-seed<k>/. A folder between that is no split's name is a
    variant's: what is in mot/lapa-seed0 is the arm "mot-lapa".
    """
    successes: dict = defaultdict(lambda: defaultdict(dict))
    crashed: dict[str, int] = defaultdict(int)
    missing = []
    for path in sorted([*folder.glob("*-seed*/episodes.jsonl"), *folder.glob("*/*-seed*/episodes.jsonl")]):
        arm, seed = path.parent.name.rsplit("-seed", 1)
        record = path.with_name("stage.json")
        if record.is_file() and read_json(record)["status"] != "complete":
            missing.append(f"{path.parent.relative_to(folder)} is not complete and does not count yet.")
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            episode = json.loads(line)
            if episode.get("error"):
                crashed[str(path.parent.relative_to(folder))] += 1
            split = episode.get("split", "train")
            name = arm if path.parent.parent in (folder, folder / split) else f"{path.parent.parent.name}-{arm}"
            by_seed = successes[split, episode["family"]][name]
            by_seed.setdefault(int(seed), {})[episode["seed"]] = bool(episode["success"])
    missing += [f"{count} episodes of {name} crashed and count as failures." for name, count in crashed.items()]
    outcomes: Outcomes = {}
    for group, arms in successes.items():
        every_run = [episodes for seeds in arms.values() for episodes in seeds.values()]
        shared = sorted(set.intersection(*(set(episodes) for episodes in every_run)))
        if any(len(episodes) > len(shared) for episodes in every_run):
            missing.append(f"{' '.join(group)}: only the {len(shared)} episodes that every arm and seed has count.")
        outcomes[group] = {
            arm: np.array([[episodes[s] for s in shared] for _, episodes in sorted(arms[arm].items())])
            for arm in in_order(arms)
        }
    return outcomes, missing


def in_order(arms: Iterable[str]) -> list[str]:
    """Known arms first, as `ARM_NAMES` has them."""
    found = set(arms)
    return [arm for arm in ARM_NAMES if arm in found] + sorted(found - set(ARM_NAMES))


def pool_families(outcomes: Outcomes) -> Outcomes:
    """(split, "all families") -> arm -> (seeds, episodes of all families), of the arms that every family has."""
    pooled: Outcomes = {}
    for split in dict.fromkeys(split for split, _ in outcomes):
        families = [by_arm for (of, _), by_arm in outcomes.items() if of == split]
        arms = set.intersection(*(set(by_arm) for by_arm in families))
        pooled[split, ALL_FAMILIES] = {
            arm: np.concatenate([by_arm[arm] for by_arm in families], axis=1) for arm in in_order(arms)
        }
    return pooled


def with_pooled(outcomes: Outcomes) -> Outcomes:
    """All families together where a split has several, of every split, then each family."""
    several = {split for split, _ in outcomes if sum(of == split for of, _ in outcomes) > 1}
    return {group: arms for group, arms in pool_families(outcomes).items() if group[0] in several} | outcomes


def success_rows(outcomes: Outcomes) -> list[dict]:
    """A row a split, family and arm: success, its Wilson interval, its interval over seeds and episodes."""
    rows = []
    for (split, family), by_arm in with_pooled(outcomes).items():
        bootstrap = resampled_means(by_arm)
        for arm, array in by_arm.items():
            wilson_low, wilson_high = wilson_interval(int(array.sum()), array.size)
            low, high = interval(bootstrap[arm])
            rows.append(
                {
                    "split": split,
                    "family": family,
                    "arm": arm,
                    "success": float(array.mean()),
                    "wilson_low": wilson_low,
                    "wilson_high": wilson_high,
                    "low": low,
                    "high": high,
                    "num_seeds": array.shape[0],
                    "num_episodes": array.shape[1],
                    "by_seed": [float(value) for value in array.mean(axis=1)],
                }
            )
    return rows


def comparison_rows(outcomes: Outcomes, baseline: str = "scratch") -> list[dict]:
    """A row a split, family and pair of arms: differences to a baseline and of LAPA to the others, and gap closures.

    A gap closure without a value is one whose gap, ActionVLA - floor, is inside the noise. Floors are Scratch and,
    where it was run, the grounding alone: what arms bring along, as the paper's bring a vision-language model.
    """
    rows = []
    for group, by_arm in with_pooled(outcomes).items():
        pairs = [(arm, baseline) for arm in by_arm if arm != baseline and baseline in by_arm]
        pairs += [("lapa", arm) for arm in by_arm if arm not in ("lapa", baseline) and "lapa" in by_arm]
        means = resampled_means(by_arm)
        for arm, other in pairs:
            rows.append(comparison(group, "difference", arm, other, difference(by_arm, arm, other, means)))
        for floor in FLOORS:
            if {floor, "action_vla"} <= set(by_arm):
                for arm in by_arm:
                    if arm not in ("scratch", floor, "action_vla"):
                        numbers = gap_closure(by_arm, arm, floor)
                        rows.append(comparison(group, "gap_closure", arm, "action_vla", numbers, floor))
    return rows


def comparison(
    group: tuple[str, str], kind: str, arm: str, other: str, numbers: dict | None, floor: str | None = None
) -> dict:
    values = numbers or {"value": None, "low": None, "high": None}
    return {"split": group[0], "family": group[1], "kind": kind, "arm": arm, "other": other, "floor": floor} | values


def headline(outcomes: Outcomes) -> dict:
    """Success of each arm over all families of the first split, and LAPA's gap closure."""
    if not outcomes:
        return {}
    pooled = next(iter(pool_families(outcomes).values()))
    numbers: dict = {f"success_{arm}": round(float(array.mean()), 4) for arm, array in pooled.items()}
    closure = gap_closure(pooled)
    if closure:
        numbers["gap_closure"] = round(closure["value"], 3)
    return numbers
