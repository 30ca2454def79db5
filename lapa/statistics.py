"""Intervals for success rates, their differences, and the gap closure between Scratch and the upper bound.

Outcomes of an arm are an array (S, E) of 0 and 1: training seeds by paired episodes.
"""

import numpy as np

NUM_RESAMPLES = 4000


def wilson_interval(num_successes: int, num_trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson 1927); (0, 1) for no trials."""
    if num_trials == 0:
        return 0.0, 1.0
    rate, square = num_successes / num_trials, z * z / num_trials
    centre = (rate + square / 2) / (1 + square)
    half = z * np.sqrt(rate * (1 - rate) / num_trials + square / (4 * num_trials)) / (1 + square)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def resampled_means(outcomes: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Hierarchical bootstrap: (R,) mean success of every arm, resampling seeds, then episodes.

    Episodes are paired, so a resample draws the same episodes for all arms; seeds are drawn for each arm.
    """
    generator = np.random.default_rng(seed)
    num_episodes = {array.shape[1] for array in outcomes.values()}
    if len(num_episodes) != 1:
        raise ValueError(f"arms have {sorted(num_episodes)} episodes: paired statistics need the same episodes")
    (count,) = num_episodes
    # How often each resample holds an episode, and an arm's seed: the mean is a sum over both.
    episode_times = np.empty((NUM_RESAMPLES, count))
    seed_times = {arm: np.empty((NUM_RESAMPLES, len(array))) for arm, array in outcomes.items()}
    for index in range(NUM_RESAMPLES):
        episode_times[index] = np.bincount(generator.integers(count, size=count), minlength=count)
        for times in seed_times.values():
            num_seeds = times.shape[1]
            times[index] = np.bincount(generator.integers(num_seeds, size=num_seeds), minlength=num_seeds)
    return {arm: (seed_times[arm] @ array * episode_times).sum(1) / array.size for arm, array in outcomes.items()}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Central 95% of bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def difference(
    outcomes: dict[str, np.ndarray], arm: str, other: str, means: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Success of `arm` minus that of `other`, with its 95% interval over seeds and paired episodes.

    means: of `resampled_means`, where several differences of the same outcomes are wanted.
    """
    means = means or resampled_means({name: outcomes[name] for name in (arm, other)})
    low, high = interval(means[arm] - means[other])
    return {"value": float(outcomes[arm].mean() - outcomes[other].mean()), "low": low, "high": high}


def gap_closure(
    outcomes: dict[str, np.ndarray], arm: str = "lapa", floor: str = "scratch", ceiling: str = "action_vla"
) -> dict | None:
    """(arm - floor) / (ceiling - floor) with its interval.

    None where one of the arms is missing, or where the 95% interval of ceiling - floor holds zero: a ratio
    to a gap inside the noise means nothing.
    """
    if not {arm, floor, ceiling} <= set(outcomes):
        return None
    means = resampled_means({name: outcomes[name] for name in (arm, floor, ceiling)})
    gap = means[ceiling] - means[floor]
    if interval(gap)[0] <= 0:
        return None
    low, high = interval((means[arm] - means[floor]) / np.maximum(gap, 1e-9))
    rate = {name: outcomes[name].mean() for name in (arm, floor, ceiling)}
    return {
        "value": float((rate[arm] - rate[floor]) / (rate[ceiling] - rate[floor])),
        "low": low,
        "high": high,
    }
