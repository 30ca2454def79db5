"""`lapa label`: the trained quantizer writes a latent action for every frame of a data set.

Controls write labels of other origins in the same form (`LabelConfig.source`): the quantizer's own given to other
frames, or k-means clusters of picture differences or of true displacements, one code of as many as the quantizer has
latent actions.

The labels at frame t come from the pair (t, t + gap); frames whose partner lies beyond the end of their
episode are marked invalid. A label folder holds

    labels.json          source, the quantizer's config.json, sizes, store fingerprint, gate result, histogram
    labels.safetensors   latent_action (N, num_codes), int64 codes or float32 numbers of a continuous codebook (zero
                         where invalid), is_valid (N,) bool; of clusters also centres (K, C) float32
    lerobot/             with export=lerobot, the data set with the labels as features
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lapa.checkpoint import load_config, read_json, write_json, write_tensors
from lapa.clusters import kmeans
from lapa.data import FramePairs, FrameStore, open_frames, to_float
from lapa.metrics import code_usage
from lapa.quantizer.base import load_quantizer, quantizer_pairs
from lapa.quantizer.evaluate_quantizer import with_probe_data
from lapa.quantizer.evaluation import quantizer_digest
from lapa.quantizer.label_export import export_labels
from lapa.quantizer.latent_actions import ACTIVE_VARIANCE
from lapa.runtime import Compute, setup
from lapa.schema import LabelConfig

LABELS_FILE = "labels.safetensors"
NUM_CLUSTERED_PAIRS = 16_384  # that k-means finds its clusters on
DIFFERENCE_PIXELS = 32


@dataclass(frozen=True)
class Labels:
    """latent_action (N, num_codes) and is_valid (N,) bool for the N frames of a store.

    Latent actions are int64 codes below codebook_size or, where not is_discrete, float32 numbers.
    """

    latent_action: np.ndarray
    is_valid: np.ndarray
    is_discrete: bool
    num_codes: int
    code_length: int
    codebook_size: int
    frame_gap_frames: int
    frame_gap_s: float
    gate: dict  # {"passed": bool, "reasons": [str]}
    quantizer: dict  # the quantizer's config.json


def run(cfg: LabelConfig) -> dict:
    """Label every frame; returns how many, and how evenly the codes are used."""
    if cfg.source not in SOURCES:
        raise ValueError(f"source is {cfg.source!r}, expected one of {sorted(SOURCES)}")
    if cfg.export not in ("none", "lerobot"):
        raise ValueError(f"export is {cfg.export!r}, expected none or lerobot")
    compute = setup(cfg.runtime)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(cfg.quantizer, "train_quantizer")
    store = open_frames(cfg.data, config["image_size"], cfg.cache_dir)
    pairs = quantizer_pairs(store, config, np.arange(store.num_episodes))
    # Clusters come from no quantizer that could have failed.
    uses_codes = cfg.source in ("quantizer", "shuffled")
    gate = read_gate(cfg.quantizer, cfg.evaluation) if uses_codes else {"passed": True, "reasons": []}
    codes, size, centres_KC = SOURCES[cfg.source](cfg, pairs, compute)

    is_discrete, num_codes = codes.dtype == np.int64, codes.shape[1]
    latent_action = np.zeros((store.num_frames, num_codes), codes.dtype)
    latent_action[pairs.first_frames] = codes
    is_valid = np.zeros(store.num_frames, bool)
    is_valid[pairs.first_frames] = True
    tensors = {"latent_action": torch.from_numpy(latent_action), "is_valid": torch.from_numpy(is_valid)}
    write_tensors(output_dir / LABELS_FILE, tensors | ({} if centres_KC is None else {"centres": centres_KC}))
    histogram = [np.bincount(code, minlength=size).tolist() for code in codes.T] if is_discrete else None
    write_json(
        output_dir / "labels.json",
        {
            "source": cfg.source,
            "quantizer": config,
            "gate": gate,
            "is_discrete": is_discrete,
            "num_codes": num_codes,
            "code_length": config["codebook"]["code_length"] if uses_codes else num_codes,
            "codebook_size": size,
            "frame_gap_frames": pairs.gap,
            "frame_gap_s": pairs.gap / store.fps,
            "store_fingerprint": store.fingerprint,
            "num_frames": store.num_frames,
            "num_valid": int(is_valid.sum()),
            "histogram": histogram,
        },
    )
    if cfg.export == "lerobot":
        export_labels(Path(cfg.data).expanduser(), output_dir / "lerobot", store, latent_action, is_valid)
    result = {"num_labels": int(is_valid.sum()), "share_valid": float(is_valid.mean())}
    if not is_discrete:
        return result | {"active_dimensions": int((codes.var(0) > ACTIVE_VARIANCE).sum())}
    usage = code_usage(codes, size)
    return result | {name: usage[name] for name in ("perplexity", "perplexity_ratio", "vocabulary_utilisation")}


# Where labels come from: each gives codes (P, N) of the pairs, int64 or the float32 numbers of a continuous codebook,
# how many codes there are a column, and of clusters their centres (K, C).
Codes = tuple[np.ndarray, int, Tensor | None]


def quantizer_codes(cfg: LabelConfig, pairs: FramePairs, compute: Compute) -> Codes:
    """What the quantizer says of each pair."""
    model = load_quantizer(cfg.quantizer).to(compute.device)
    frames_N, parts = pairs.store.frames, []
    with torch.inference_mode(), tqdm(total=len(pairs), desc="label", unit="pair", mininterval=1.0) as progress:
        for start in range(0, len(pairs), cfg.batch_size):
            indices = np.arange(start, min(start + cfg.batch_size, len(pairs)))
            # Consecutive pairs share frames: each is read and, by models that can, looked at once.
            rows, places = np.unique(pairs.frame_numbers(indices), return_inverse=True)
            frames, pairs_B2 = to_float(frames_N[rows], compute.device), torch.from_numpy(places.reshape(-1, 2))
            with compute.autocast():
                codes_BN, _ = model.encode_clip(frames, pairs_B2.to(compute.device))
            parts.append(codes_BN.cpu().numpy().astype(np.int64 if model.codebook.is_discrete else np.float32))
            progress.update(len(indices))
    return np.concatenate(parts), model.codebook.codebook_size, None


def shuffled_codes(cfg: LabelConfig, pairs: FramePairs, compute: Compute) -> Codes:
    """The quantizer's codes, as often as it gave them, at pairs drawn at random: they say nothing of the picture."""
    if cfg.labels is None:
        codes, size, _ = quantizer_codes(cfg, pairs, compute)
    else:
        own = load_labels(cfg.labels, pairs.store)
        if own.quantizer != load_config(cfg.quantizer, "train_quantizer"):
            raise ValueError(f"the labels in {cfg.labels} are not of the quantizer in {cfg.quantizer}: name its own")
        codes, size = own.latent_action[pairs.first_frames], own.codebook_size
    return codes[np.random.default_rng(cfg.seed).permutation(len(codes))], size, None


def pixel_difference_codes(cfg: LabelConfig, pairs: FramePairs, compute: Compute) -> Codes:
    """The cluster of the difference between the frames, each averaged to 32 pixels."""

    def differences(indices: np.ndarray) -> Tensor:
        frames_B2CHW = to_float(pairs.frames(indices))
        change_BCHW = frames_B2CHW[:, 1] - frames_B2CHW[:, 0]
        return F.adaptive_avg_pool2d(change_BCHW, min(DIFFERENCE_PIXELS, change_BCHW.shape[-1])).flatten(1)

    return clusters(cfg, pairs, differences)


def action_codes(cfg: LabelConfig, pairs: FramePairs, compute: Compute) -> Codes:
    """The cluster of the displacement that was truly executed between the frames."""
    if cfg.action_data is None:
        raise ValueError("source=actions needs action_data=<the same episodes with actions>")
    store = with_probe_data(pairs.store, cfg.action_data, cfg.cache_dir)
    known = FramePairs(store, pairs.gap, np.arange(store.num_episodes))
    return clusters(cfg, pairs, lambda indices: torch.from_numpy(known.displacements(indices)).float())


def clusters(cfg: LabelConfig, pairs: FramePairs, describe: Callable[[np.ndarray], Tensor]) -> Codes:
    """The nearest of as many k-means centres as the quantizer has latent actions, in one column (P, 1).

    The centres are those of `cfg.labels`, where that is given. describe: pair indices (B,) to points (B, C).
    """
    centres_KC = find_centres(cfg, pairs, describe) if cfg.labels is None else load_centres(cfg)
    starts = tqdm(range(0, len(pairs), cfg.batch_size), desc="label", unit="batch", mininterval=1.0)
    parts = [
        torch.cdist(describe(np.arange(start, min(start + cfg.batch_size, len(pairs)))), centres_KC).argmin(1)
        for start in starts
    ]
    return torch.cat(parts)[:, None].numpy(), len(centres_KC), centres_KC


def find_centres(cfg: LabelConfig, pairs: FramePairs, describe: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Centres (K, C) of k-means on some of the pairs."""
    codebook = load_config(cfg.quantizer, "train_quantizer")["codebook"]
    num_levels = codebook.get("num_levels", 1)
    size = codebook["codebook_size"] ** (codebook["code_length"] * num_levels)
    if not size:
        raise ValueError(f"source={cfg.source} takes as many codes as the quantizer has: {cfg.quantizer} has numbers")
    size = min(size, len(pairs))
    generator = np.random.default_rng(cfg.seed)
    sample = np.sort(generator.permutation(len(pairs))[: max(NUM_CLUSTERED_PAIRS, size)])
    return kmeans(describe(sample), size, torch.Generator().manual_seed(cfg.seed))


def load_centres(cfg: LabelConfig) -> Tensor:
    """Centres (K, C) of another data set's labels; ValueError where they are of another source."""
    assert cfg.labels is not None
    source = read_meta(cfg.labels)["source"]
    tensors = load_file(Path(cfg.labels) / LABELS_FILE)
    if source != cfg.source or "centres" not in tensors:
        raise ValueError(
            f"labels={cfg.labels} are of source={source} and {'have' if 'centres' in tensors else 'lack'} centres, "
            f"expected those of source={cfg.source} of another data set: run `lapa label source={cfg.source}` on that"
        )
    return tensors["centres"]


SOURCES = {
    "quantizer": quantizer_codes,
    "shuffled": shuffled_codes,
    "pixel_differences": pixel_difference_codes,
    "actions": action_codes,
}


def join_labels(labels: list[Labels]) -> Labels:
    """Labels of several data sets as of one; ValueError where they are of different quantizers."""
    first = labels[0]
    if any(other.quantizer != first.quantizer for other in labels):
        raise ValueError("the labels of the mixture were written by different quantizers: label all data with one")
    return replace(
        first,
        latent_action=np.concatenate([other.latent_action for other in labels]),
        is_valid=np.concatenate([other.is_valid for other in labels]),
    )


def read_gate(quantizer: str, evaluation: str | None) -> dict:
    """What the gate said of a quantizer, in its own folder or in a folder of `lapa evaluate_quantizer`.

    Raises ValueError where neither says anything, or it was said of other weights.
    """
    path = Path(evaluation or quantizer) / "metrics.json"
    if not path.is_file():
        raise ValueError(
            f"no metrics.json in {path.parent}: run `lapa evaluate_quantizer quantizer={quantizer} data=... "
            "output_dir=...` and name its folder as evaluation=..."
        )
    metrics = read_json(path)
    if "gate" not in metrics:
        raise ValueError(f"{path} has no gate: expected a folder of `lapa evaluate_quantizer`")
    if not metrics.get("is_held_out", True):
        raise ValueError(
            f"the evaluation in {evaluation} is on episodes that the quantizer was trained on: "
            "run `lapa evaluate_quantizer` with episodes=held_out"
        )
    if evaluation is not None and metrics.get("quantizer_digest") != quantizer_digest(quantizer):
        raise ValueError(
            f"the evaluation in {evaluation} is of other weights than {quantizer} holds: "
            "run `lapa evaluate_quantizer` on that quantizer"
        )
    return metrics["gate"]


def read_meta(folder: str | Path) -> dict:
    """labels.json of a folder; ValueError where there is none."""
    path = Path(folder) / "labels.json"
    if not path.is_file():
        raise ValueError(f"no labels.json in {folder}: expected a folder written by `lapa label`")
    return read_json(path)


def load_labels(folder: str | Path, store: FrameStore) -> Labels:
    """The labels in `folder`; ValueError where there are none, or they were made from other frames."""
    meta = read_meta(folder)
    if meta["store_fingerprint"] != store.fingerprint:
        raise ValueError(
            f"the labels in {folder} belong to a data set of {meta['num_frames']} frames (fingerprint "
            f"{meta['store_fingerprint']}), the data in {store.folder} have {store.num_frames} (fingerprint "
            f"{store.fingerprint}): run `lapa label` on these data"
        )
    tensors = load_file(Path(folder) / LABELS_FILE)
    return Labels(
        latent_action=tensors["latent_action"].numpy(),
        is_valid=tensors["is_valid"].numpy(),
        is_discrete=meta["is_discrete"],
        num_codes=meta["num_codes"],
        code_length=meta["code_length"],
        codebook_size=meta["codebook_size"],
        frame_gap_frames=meta["frame_gap_frames"],
        frame_gap_s=meta["frame_gap_s"],
        gate=meta["gate"],
        quantizer=meta["quantizer"],
    )
