"""Pictures of a quantizer for the report: what each latent action does, and how well it explains real change.

Discrete latent actions are named by their codes; of continuous ones the gallery walks along the principal axes.
Shapes: B pairs, S latent actions shown, N columns of codes, A action dimensions.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lapa.data import FramePairs, to_float
from lapa.metrics import fit_linear_probe
from lapa.quantizer.base import LatentActionQuantizer
from lapa.quantizer.latent_actions import ACTIVE_VARIANCE, LatentActions, code_name, episodes_of
from lapa.runtime import Compute

MOST_CODES = 64
MOST_BARS = 64  # codes of a token that are drawn as bars of their own
NUM_DONORS, NUM_RECIPIENTS = 6, 4


def write_gallery(
    folder: Path,
    model: LatentActionQuantizer,
    pairs: FramePairs,
    encoded: LatentActions,
    compute: Compute,
    displacements: np.ndarray | None = None,
    other_pairs: FramePairs | None = None,
) -> list[Path]:
    """Write the PNG files of a trained quantizer; returns their paths.

    Args:
        encoded: latent actions of B held-out pairs.
        displacements: (B, A) what was executed between the frames of those pairs, where known.
        other_pairs: of another data set, whose scenes are shown in transfer.png too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "gallery": _code_gallery(model, pairs, encoded, compute),
        "transfer": _transfer(model, pairs, encoded, compute, other_pairs),
        "reconstructions": _reconstructions(model, pairs, encoded, compute),
        "usage": _usage(model, encoded) if model.codebook.is_discrete else _dimensions(encoded),
    }
    if displacements is not None and displacements.shape[1] >= 2:
        draw = _arrows if model.codebook.is_discrete else _directions
        figures["arrows"] = draw(encoded, displacements)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
    return paths


# What latent actions do


def shown_codes(encoded: LatentActions, codebook_size: int) -> np.ndarray:
    """(S, N) latent actions to show: all of them if there are few, else those most in use."""
    num_codes = encoded.codes.shape[1]
    if codebook_size**num_codes <= MOST_CODES:
        return np.stack(np.unravel_index(np.arange(codebook_size**num_codes), [codebook_size] * num_codes), 1)
    unique, counts = np.unique(encoded.codes, axis=0, return_counts=True)
    most_used = np.argsort(-counts, kind="stable")[:MOST_CODES]
    return unique[np.sort(most_used)]


def shown_walks(encoded: LatentActions, num_axes: int = 4, num_steps: int = 8) -> tuple[np.ndarray, list[str]]:
    """(S, N) continuous latent actions to show: steps of half a deviation along the principal axes, and their names."""
    mean = encoded.codes.mean(0)
    variances, axes = np.linalg.eigh(np.cov((encoded.codes - mean).T).reshape(len(mean), -1))
    codes, names = [], []
    for rank, axis in enumerate(np.argsort(-variances)[:num_axes]):
        for step in np.linspace(-2, 2, num_steps):
            codes.append(mean + step * np.sqrt(max(variances[axis], 0)) * axes[:, axis])
            names.append(f"axis {rank}: {step:+.1f} sd")
    return np.array(codes, np.float32), names


def predictions(
    model: LatentActionQuantizer, first_HWC: np.ndarray, codes_SN: np.ndarray, compute: Compute
) -> np.ndarray:
    """(S, H, W, 3) in [0, 1]: one first frame (H, W, 3) uint8 after each of the latent actions (S, N)."""
    first = to_float(first_HWC[None], compute.device).expand(len(codes_SN), -1, -1, -1)
    return images(decode_codes(model, first, codes_SN, compute))


@torch.inference_mode()
def decode_codes(model: LatentActionQuantizer, first_SCHW: Tensor, codes_SN: np.ndarray, compute: Compute) -> Tensor:
    """The forward model's second frames (S, C, H, W) of codes (S, N)."""
    with compute.autocast():
        applied_SLD = model.codebook.lookup(torch.from_numpy(codes_SN).to(compute.device))
        return model.decode(first_SCHW, applied_SLD).float()


def images(frames_SCHW: Tensor) -> np.ndarray:
    """(S, H, W, 3) in [0, 1], as matplotlib shows them."""
    return frames_SCHW.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def short_name(codes_N: np.ndarray) -> str:
    """`code_name` on lines of at most 8 codes."""
    return "\n".join(code_name(codes_N[start : start + 8]) for start in range(0, len(codes_N), 8))


def _code_gallery(model, pairs: FramePairs, encoded: LatentActions, compute: Compute) -> Figure:
    if model.codebook.is_discrete:
        codes = shown_codes(encoded, model.codebook.codebook_size)
        names = [short_name(code) for code in codes]
        columns = min(model.codebook.codebook_size if codes.shape[1] == 2 else 8, len(codes), 16)
        title = "Each latent action, named by its token codes, applied to two held-out frames"
    else:
        codes, names = shown_walks(encoded)
        columns = 8
        title = "Walks along the principal axes of the latent actions, from two held-out frames"
    rows = -(-len(codes) // columns)
    picks = encoded.indices[[len(encoded.indices) // 3, 2 * len(encoded.indices) // 3]]
    figure = Figure(figsize=(16, 8 * (rows + 1) / columns + 0.6), layout="constrained")
    for axis, pick in zip(figure.subplots(1, 2), picks, strict=True):
        first = pairs.frames(np.array([pick]))[0, 0]
        tile = len(first) + 2
        sheet = np.ones(((rows + 1) * tile, columns * tile, 3))
        tiles = [first / 255, *predictions(model, first, codes, compute)]
        # The frame itself has the first row for itself.
        places = [0, *range(columns, columns + len(codes))]
        for place, label, picture in zip(places, ["frame 1", *names], tiles, strict=True):
            y, x = (tile * index for index in divmod(place, columns))
            sheet[y : y + len(first), x : x + len(first)] = picture
            box = {"color": "white", "alpha": 0.6, "pad": 0.5}
            axis.text(x + 1, y + 1, label, va="top", fontsize=7, bbox=box, in_layout=False)
        axis.imshow(sheet, interpolation="nearest")
        axis.set_axis_off()
    figure.suptitle(title)
    return figure


def _transfer(
    model, pairs: FramePairs, encoded: LatentActions, compute: Compute, other_pairs: FramePairs | None
) -> Figure:
    """The same latent actions in several scenes: a column a latent action, two rows a scene."""
    donors = shown_donors(pairs, encoded)
    scenes = recipient_frames(pairs, encoded, other_pairs)
    donor_frames = to_float(pairs.frames(encoded.indices[donors]), compute.device)
    codes = encoded.codes[donors]
    names = [short_name(code) for code in codes] if model.codebook.is_discrete else [""] * len(donors)
    rows: list[tuple[str, list[np.ndarray | None]]] = [
        ("inferred from: frame 1", [None, *images(donor_frames[:, 0])]),
        ("inferred from: frame 2", [None, *images(donor_frames[:, 1])]),
        ("its change", [None, *_signed(donor_frames[:, 1] - donor_frames[:, 0])]),
    ]
    for name, first in scenes:
        first_SCHW = to_float(first[None], compute.device).expand(len(donors), -1, -1, -1)
        predicted = decode_codes(model, first_SCHW, codes, compute)
        rows.append((name, [first / 255, *images(predicted)]))
        rows.append(("its change", [None, *_signed(predicted - first_SCHW)]))
    figure = _sheet(rows, ["scene", *(f"latent action\n{name}".strip() for name in names)], inches=1.5)
    figure.suptitle("One latent action a column: the pair it was inferred from, then what it does to other scenes")
    return figure


def _sheet(rows: list[tuple[str, list[np.ndarray | None]]], titles: list[str], inches: float) -> Figure:
    """Named rows of pictures (H, W, 3) under column titles, on one pair of axes: many axes take seconds to lay out."""
    size = next(len(tile) for _, tiles in rows for tile in tiles if tile is not None)
    step = size + max(2, size // 16)
    sheet = np.ones((len(rows) * step, len(titles) * step, 3))
    for row, (_, tiles) in enumerate(rows):
        for column, tile in enumerate(tiles):
            if tile is not None:
                sheet[row * step : row * step + size, column * step : column * step + size] = tile
    figure = Figure(figsize=(inches * len(titles) + 1.6, inches * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks(np.arange(len(titles)) * step + size / 2, titles, fontsize=9)
    axes.set_yticks(np.arange(len(rows)) * step + size / 2, [name for name, _ in rows], fontsize=9)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def shown_donors(pairs: FramePairs, encoded: LatentActions) -> np.ndarray:
    """Positions among the encoded pairs whose change is plain to see, of latent actions that differ."""
    sample = np.linspace(0, len(encoded.indices) - 1, min(256, len(encoded.indices))).astype(int)
    frames = pairs.frames(encoded.indices[sample]).astype(np.float32)
    change = np.abs(frames[:, 1] - frames[:, 0]).mean((1, 2, 3))
    candidates = sample[np.argsort(-change, kind="stable")][: max(len(sample) // 2, 1)]
    # Farthest first: each next latent action is the one least like those shown.
    chosen = [int(candidates[0])]
    while len(chosen) < min(NUM_DONORS, len(candidates)):
        distance = np.linalg.norm(encoded.latents[candidates][:, None] - encoded.latents[chosen], axis=-1).min(1)
        chosen.append(int(candidates[distance.argmax()]))
    return np.array(chosen)


def recipient_frames(
    pairs: FramePairs, encoded: LatentActions, other_pairs: FramePairs | None
) -> list[tuple[str, np.ndarray]]:
    """First frames (H, W, 3) of different episodes, of different sources where there are some, with their names."""
    episodes = episodes_of(pairs, encoded.indices)
    first_of_episode = np.unique(episodes, return_index=True)[1]
    sources = np.array(pairs.store.sources)[episodes[first_of_episode]]
    # Sources take turns, so that each is shown before any is shown twice.
    turns = [np.sum(sources[:place] == source) for place, source in enumerate(sources)]
    spread = np.random.default_rng(0).permutation(len(sources))
    order = spread[np.argsort(np.array(turns)[spread] if len(set(sources)) > 1 else spread * 0, kind="stable")]
    count = NUM_RECIPIENTS if other_pairs is None else NUM_RECIPIENTS // 2
    scenes = []
    for place in order[:count]:
        frame = pairs.frames(encoded.indices[first_of_episode[place : place + 1]])[0, 0]
        scenes.append((f"{sources[place]}, episode {episodes[first_of_episode[place]]}", frame))
    if other_pairs is not None:
        for index in np.linspace(0, len(other_pairs) - 1, NUM_RECIPIENTS - count + 2).astype(int)[1:-1]:
            episode = int(episodes_of(other_pairs, np.array([index]))[0])
            name = f"data2 {other_pairs.store.sources[episode]}, episode {episode}"
            scenes.append((name, other_pairs.frames(np.array([index]))[0, 0]))
    return scenes


def _signed(change_SCHW: Tensor) -> np.ndarray:
    """Changes as pictures: gray where nothing changes, brighter or darker where it does."""
    return images(0.5 + change_SCHW)


def _reconstructions(model, pairs: FramePairs, encoded: LatentActions, compute: Compute, count: int = 6) -> Figure:
    picks = np.linspace(0, len(encoded.indices) - 1, count).astype(int)
    frames = to_float(pairs.frames(encoded.indices[picks]), compute.device)
    first, second = frames.unbind(1)
    predicted = decode_codes(model, first, encoded.codes[picks], compute)
    error, copy_error = (predicted - second).abs(), (first - second).abs()
    columns = {
        "frame 1": first,
        "frame 2": second,
        "predicted frame 2": predicted,
        "its error (x2)": 2 * error,
        "error of repeating\nframe 1 (x2)": 2 * copy_error,
    }
    shown = [images(pictures) for pictures in columns.values()]
    rows = [(f"pair {pick}", [column[row] for column in shown]) for row, pick in enumerate(picks)]
    return _sheet(rows, list(columns), inches=2.2)


# How they are used


def _usage(model, encoded: LatentActions) -> Figure:
    """A panel a column of codes, and one of whole latent actions."""
    size, num_codes = model.codebook.codebook_size, encoded.codes.shape[1]
    columns = min(num_codes + 1, 6)
    rows = -(-(num_codes + 1) // columns)
    figure = Figure(figsize=(3 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for token, axis in enumerate(axes[:num_codes]):
        share = np.bincount(encoded.codes[:, token], minlength=size) / len(encoded.codes)
        axis.axhline(1 / size, color="gray", linestyle=":")
        if size <= MOST_BARS:
            axis.bar(np.arange(size), share)
            axis.set(title=f"token {token}", xlabel="code")
        else:
            axis.plot(np.arange(1, size + 1), np.sort(share)[::-1])
            axis.set(title=f"token {token}: {(share > 0).sum()} of {size}", xlabel="rank", xscale="log")
        if token % columns == 0:
            axis.set_ylabel("share of held-out pairs")
    counts = np.unique(encoded.codes, axis=0, return_counts=True)[1]
    offered = f"{size**num_codes}" if num_codes * np.log10(size) < 7 else f"{size}^{num_codes}"
    axes[num_codes].plot(np.arange(1, len(counts) + 1), np.sort(counts)[::-1] / counts.sum())
    axes[num_codes].set(title=f"{len(counts)} of {offered} in use", xlabel="rank of latent action", yscale="log")
    for axis in axes[num_codes + 1 :]:
        axis.set_axis_off()
    return figure


def _dimensions(encoded: LatentActions) -> Figure:
    """Variance of each dimension of continuous latent actions, and of their principal axes."""
    variance = np.sort(encoded.codes.var(0))[::-1]
    along = np.sort(np.linalg.eigvalsh(np.cov(encoded.codes.T).reshape(len(variance), -1)))[::-1]
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = {f"{(variance > ACTIVE_VARIANCE).sum()} of {len(variance)} dimensions active": variance}
    panels["variance along principal axes"] = along.clip(1e-12)
    for axis, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axis.bar(np.arange(len(values)), values)
        axis.axhline(ACTIVE_VARIANCE, color="gray", linestyle=":")
        axis.set(title=title, xlabel="rank", yscale="log")
    return figure


# What was executed


def _arrows(encoded: LatentActions, displacements: np.ndarray) -> Figure:
    unique, inverse, counts = np.unique(encoded.codes, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    mean = np.stack([np.bincount(inverse, displacements[:, axis]) / counts for axis in (0, 1)], 1)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2)
    hues = _hues(mean)
    most_used = np.argsort(-counts)[:MOST_CODES]
    tips = mean[most_used]
    in_data_units = {"angles": "xy", "scale_units": "xy", "scale": 1}
    axes[0].quiver(*np.zeros_like(tips).T, *tips.T, color=hues[most_used], width=0.004, **in_data_units)
    if unique.shape[1] <= 8:
        for code in most_used:
            axes[0].text(*mean[code], code_name(unique[code]), fontsize=7, in_layout=False)
    axes[1].scatter(*displacements[:, :2].T, c=hues[inverse], s=8)
    _same_plane(axes, displacements)
    axes[0].set_title(f"Mean true displacement of the {len(most_used)} latent actions most in use")
    axes[1].set_title("True displacements, coloured by the mean of their latent action")
    return figure


def _directions(encoded: LatentActions, displacements: np.ndarray) -> Figure:
    """Displacements beside what a straight line through the same pairs makes of continuous latent actions."""
    predicted = fit_linear_probe(encoded.latents, displacements)(encoded.latents)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2)
    hues = _hues(predicted[:, :2])
    axes[0].scatter(*predicted[:, :2].T, c=hues, s=8)
    axes[1].scatter(*displacements[:, :2].T, c=hues, s=8)
    _same_plane(axes, displacements)
    axes[0].set_title("Displacement told from the latent action by a linear fit")
    axes[1].set_title("True displacements, coloured by the direction of that fit")
    return figure


def _hues(directions_S2: np.ndarray) -> np.ndarray:
    """A colour (S, 4) a direction in the plane."""
    return matplotlib.colormaps["hsv"]((np.arctan2(directions_S2[:, 1], directions_S2[:, 0]) / (2 * np.pi)) % 1)


def _same_plane(axes, displacements: np.ndarray) -> None:
    reach = 1.1 * np.abs(displacements[:, :2]).max() + 1e-9
    for axis in axes:
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")
