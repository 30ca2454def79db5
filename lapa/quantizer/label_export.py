"""Labels as features of the data set: `lapa label export=lerobot` writes a LeRobotDataset v3.0 that has them.

    latent_action            codes (int64), or numbers of a continuous codebook (float32), shape (num_codes,)
    latent_action_is_valid   False at the end of an episode, where the partner frame is missing; codes are zero there

Everything else is copied, the source is only read. Statistics of the new features are computed from valid labels,
which LeRobot's `add_features` leaves out.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from lapa.data import FrameStore

FEATURE, IS_VALID = "latent_action", "latent_action_is_valid"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def export_labels(
    source: Path, folder: Path, store: FrameStore, latent_action: np.ndarray, is_valid: np.ndarray
) -> None:
    """Write the data set at `folder`, which appears when it is complete; nothing to do where it is.

    latent_action (N, num_codes) and is_valid (N,) belong to the frames of `store`, decoded from the data set `source`.
    Raises ValueError where the source is a frame store, or has labels already.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not (source / "meta" / "info.json").is_file():
        raise ValueError(
            f"{source} is no LeRobotDataset: label its export (`lapa ingest export=lerobot`), or set export=none"
        )
    if folder.is_dir():
        return
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.io_utils import write_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(source.resolve().name, root=source, video_backend="pyav")
    if FEATURE in dataset.meta.features:
        raise ValueError(f"{source} has a feature {FEATURE!r} already: label the data set that it was made from")
    rows = rows_of_store(dataset, store)
    codes = np.zeros((len(dataset), latent_action.shape[1]), latent_action.dtype)
    valid = np.zeros(len(dataset), bool)
    codes[rows], valid[rows] = latent_action, is_valid

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = [f"code_{number}" for number in range(codes.shape[1])]
    features = {
        FEATURE: (codes, {"dtype": str(codes.dtype), "shape": (codes.shape[1],), "names": names}),
        IS_VALID: (valid, {"dtype": "bool", "shape": (1,), "names": None}),
    }
    made = add_features(dataset, features, output_dir=partial, repo_id=folder.name)
    stats = dict(made.meta.stats or {})
    stats |= {FEATURE: statistics(codes[valid]), IS_VALID: statistics(valid[:, None])}
    write_stats(stats, partial)
    partial.replace(folder)


def rows_of_store(dataset, store: FrameStore) -> np.ndarray:
    """(N,): the data set's row of every frame of the store, which lacks the episodes that could not be decoded."""
    skipped = {int(row["clip"].removeprefix("episode ")) for row in store.skipped}
    episodes = [episode for episode in range(dataset.meta.total_episodes) if episode not in skipped]
    firsts = [int(dataset.meta.episodes[episode]["dataset_from_index"]) for episode in episodes]
    lengths = np.diff(store.episode_offsets)
    if [int(dataset.meta.episodes[episode]["length"]) for episode in episodes] != lengths.tolist():
        raise ValueError(f"the episodes of {dataset.root} are not those that were labelled: run `lapa label` anew")
    return np.concatenate([first + np.arange(length) for first, length in zip(firsts, lengths, strict=True)])


def statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics over the first axis of (N, D)."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    numbers = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return numbers | {"count": np.array([len(values)]), **dict(zip(QUANTILES, quantiles, strict=True))}
