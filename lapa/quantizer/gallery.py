"""Pictures of a quantizer for the report: what each latent action does, and how well it explains real change."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from lapa.data import FramePairs, to_float
from lapa.quantizer.base import LatentActionQuantizer
from lapa.quantizer.evaluation import LatentActions
from lapa.runtime import Compute

MOST_CODES = 64


def write_gallery(
    folder: Path,
    model: LatentActionQuantizer,
    pairs: FramePairs,
    encoded: LatentActions,
    compute: Compute,
    displacements: np.ndarray | None = None,
) -> list[Path]:
    """Write the PNG files of a trained quantizer; returns their paths.

    Args:
        encoded: latent actions of B held-out pairs.
        displacements: (B, A) what was executed between the frames of those pairs, where known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "gallery.png", folder / "reconstructions.png", folder / "usage.png"]
    _save(_code_gallery(model, pairs, encoded, compute), paths[0])
    _save(_reconstructions(model, pairs, encoded, compute), paths[1])
    _save(_usage(model, encoded), paths[2])
    if displacements is not None and displacements.shape[1] >= 2:
        paths.append(folder / "arrows.png")
        _save(_arrows(encoded, displacements), paths[3])
    return paths


def shown_codes(encoded: LatentActions, codebook_size: int) -> np.ndarray:
    """(S, L) latent actions to show: all of them if there are few, else those most in use."""
    length = encoded.codes.shape[1]
    if codebook_size**length <= MOST_CODES:
        return np.stack(np.unravel_index(np.arange(codebook_size**length), [codebook_size] * length), 1)
    unique, counts = np.unique(encoded.codes, axis=0, return_counts=True)
    most_used = np.argsort(-counts, kind="stable")[:MOST_CODES]
    return unique[np.sort(most_used)]


@torch.inference_mode()
def predictions(
    model: LatentActionQuantizer, first_HWC: np.ndarray, codes_SL: np.ndarray, compute: Compute
) -> np.ndarray:
    """(S, H, W, 3) in [0, 1]: one first frame (H, W, 3) uint8 after each of the latent actions (S, L)."""
    first = to_float(first_HWC[None], compute.device).expand(len(codes_SL), -1, -1, -1)
    with compute.autocast():
        predicted = model.decode(first, torch.from_numpy(codes_SL).to(compute.device)).float()
    return predicted.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _code_gallery(model, pairs: FramePairs, encoded: LatentActions, compute: Compute) -> Figure:
    codes = shown_codes(encoded, model.codebook_config.codebook_size)
    columns = min(model.codebook_config.codebook_size if codes.shape[1] == 2 else 8, len(codes), 16)
    rows = -(-len(codes) // columns)
    picks = encoded.indices[[len(encoded.indices) // 3, 2 * len(encoded.indices) // 3]]
    figure = Figure(figsize=(16, 8 * (rows + 1) / columns + 0.6), layout="constrained")
    for axis, pick in zip(figure.subplots(1, 2), picks, strict=True):
        first = pairs.frames(np.array([pick]))[0, 0]
        tile = len(first) + 2
        sheet = np.ones(((rows + 1) * tile, columns * tile, 3))
        labels = ["frame 1", *("-".join(map(str, code)) for code in codes)]
        images = [first / 255, *predictions(model, first, codes, compute)]
        # The frame itself has the first row for itself.
        places = [0, *range(columns, columns + len(codes))]
        for place, label, image in zip(places, labels, images, strict=True):
            y, x = (tile * index for index in divmod(place, columns))
            sheet[y : y + len(first), x : x + len(first)] = image
            axis.text(x + 1, y + 1, label, va="top", fontsize=7, bbox={"color": "white", "alpha": 0.6, "pad": 0.5})
        axis.imshow(sheet, interpolation="nearest")
        axis.set_axis_off()
    figure.suptitle("Each latent action, named by its token codes, applied to two held-out frames")
    return figure


@torch.inference_mode()
def _reconstructions(model, pairs: FramePairs, encoded: LatentActions, compute: Compute, count: int = 6) -> Figure:
    picks = np.linspace(0, len(encoded.indices) - 1, count).astype(int)
    frames = to_float(pairs.frames(encoded.indices[picks]), compute.device)
    with compute.autocast():
        codes = torch.from_numpy(encoded.codes[picks]).to(compute.device)
        predicted = model.decode(frames[:, 0], codes).float()
    first, second = frames.unbind(1)
    error, copy_error = (predicted - second).abs(), (first - second).abs()
    columns = {
        "frame 1": first,
        "frame 2": second,
        "predicted frame 2": predicted,
        "its error (x2)": 2 * error,
        "error of repeating frame 1 (x2)": 2 * copy_error,
    }
    figure = Figure(figsize=(12, 2.45 * count), layout="constrained")
    axes = figure.subplots(count, len(columns))
    for column, (title, images) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        for row, image in enumerate(images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_axis_off()
    return figure


def _usage(model, encoded: LatentActions) -> Figure:
    size, length = model.codebook_config.codebook_size, encoded.codes.shape[1]
    figure = Figure(figsize=(3 * (length + 1), 3), layout="constrained")
    axes = figure.subplots(1, length + 1)
    for token, axis in enumerate(axes[:-1]):
        share = np.bincount(encoded.codes[:, token], minlength=size) / len(encoded.codes)
        axis.bar(np.arange(size), share)
        axis.axhline(1 / size, color="gray", linestyle=":")
        axis.set(title=f"token {token}", xlabel="code", ylabel="share of held-out pairs" if token == 0 else "")
    counts = np.unique(encoded.codes, axis=0, return_counts=True)[1]
    axes[-1].plot(np.sort(counts)[::-1] / counts.sum())
    axes[-1].set(title=f"{len(counts)} of {size**length} latent actions in use", xlabel="rank", yscale="log")
    return figure


def _arrows(encoded: LatentActions, displacements: np.ndarray) -> Figure:
    unique, inverse, counts = np.unique(encoded.codes, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    mean = np.stack([np.bincount(inverse, displacements[:, axis]) / counts for axis in (0, 1)], 1)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2)
    hues = matplotlib.colormaps["hsv"]((np.arctan2(mean[:, 1], mean[:, 0]) / (2 * np.pi)) % 1)
    most_used = np.argsort(-counts)[:MOST_CODES]
    for code in most_used:
        axes[0].annotate("", mean[code], (0, 0), arrowprops={"arrowstyle": "->", "color": hues[code], "lw": 1.5})
        axes[0].text(*mean[code], "-".join(map(str, unique[code])), fontsize=7)
    axes[1].scatter(*displacements[:, :2].T, c=hues[inverse], s=8)
    reach = 1.1 * np.abs(displacements[:, :2]).max() + 1e-9
    titles = (
        f"Mean true displacement of the {len(most_used)} latent actions most in use",
        "True displacements, coloured by the mean of their latent action",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
