"""Numbers that say whether latent actions are any good: reconstruction, code usage, probes, and their intervals.

B pairs, C colours, H and W pixels, N columns of codes, K codes a column, F features, A action dimensions, E episodes,
R resamples. Resampled statistics have R + 1 values: the first is that of the sample itself.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lapa.statistics import interval

NUM_RESAMPLES = 1000
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
WINDOW_RADIUS, WINDOW_DEVIATION = 3, 0.8  # pixels, of the window of structural similarity
# Share of each scale, finest first (Wang, Simoncelli and Bovik 2003).
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

Predictor = Callable[[np.ndarray], np.ndarray]


class EpisodeBootstrap:
    """Resamples whole episodes with repetition: pairs of one episode are no independent draws.

    Statistics are functions of sums over pairs, and a resample's sums are those of its episodes, so a thousand
    resamples cost one matrix product.
    """

    def __init__(self, episode_B: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES):
        episodes, self.group_B = np.unique(episode_B, return_inverse=True)
        self.num_episodes = len(episodes)
        uniform = np.full(self.num_episodes, 1 / self.num_episodes)
        draws = np.random.default_rng(seed).multinomial(self.num_episodes, uniform, size=num_resamples)
        self.times_RE = np.concatenate([np.ones((1, self.num_episodes)), draws])

    def sums(self, values_BF: np.ndarray) -> np.ndarray:
        """Sums over pairs (R + 1, F) of values (B, F)."""
        columns = [np.bincount(self.group_B, column, minlength=self.num_episodes) for column in values_BF.T]
        return self.times_RE @ np.stack(columns, 1)

    def means(self, values_BF: np.ndarray) -> np.ndarray:
        """Means over pairs (R + 1, F) of values (B, F)."""
        return self.sums(values_BF) / self.sums(np.ones((len(values_BF), 1)))

    def histograms(self, codes_B: np.ndarray, size: int) -> np.ndarray:
        """Counts (R + 1, size) of codes (B,) in [0, size)."""
        flat = np.bincount(self.group_B * size + codes_B, minlength=self.num_episodes * size)
        counts_EK = flat.reshape(self.num_episodes, size)
        return self.times_RE.astype(np.float32) @ counts_EK.astype(np.float32)

    def estimate(self, name: str, samples_R: np.ndarray) -> dict[str, float]:
        """`name` with `<name>_low` and `<name>_high`, the central 95% of the resamples.

        One episode has no interval: both are left out.
        """
        if self.num_episodes == 1:
            return {name: float(samples_R[0])}
        low, high = interval(samples_R[1:])
        return {name: float(samples_R[0]), f"{name}_low": low, f"{name}_high": high}

    def estimate_count(self, name: str, samples_R: np.ndarray, most: float = math.inf) -> dict[str, float]:
        """Like `estimate`, for what grows with the number of distinct values: 1.96 standard deviations either side.

        A resample repeats episodes, so it holds fewer distinct codes than the sample: its percentiles would lie
        below the estimate.
        """
        value = float(samples_R[0])
        if self.num_episodes == 1:
            return {name: value}
        half = 1.96 * float(samples_R[1:].std())
        return {name: value, f"{name}_low": max(0.0, value - half), f"{name}_high": min(most, value + half)}


# Pixels


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of values in [0, 1], from a mean over all pixels of all images.

    The mean comes first because a ratio per image is infinite wherever nothing moved.
    """
    return float(-10 * np.log10(max(mean_squared_error, 1e-10)))


def multi_scale_ssim(one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Multi-scale structural similarity (B,) of luminance, 1 for equal images (Wang, Simoncelli and Bovik 2003).

    A Gaussian window 7 pixels wide, and as many scales as leave 16 pixels, at most 5: 3 scales for 64 pixels. The
    values are those of torchmetrics, whose import and convolutions cost more than all else in an evaluation.
    """
    num_scales = min(len(SCALE_WEIGHTS), max(1, int(math.log2(one_BCHW.shape[-1] / 16)) + 1))
    one, other = luminance(one_BCHW).clamp(0, 1), luminance(other_BCHW).clamp(0, 1)
    product_B = torch.ones(len(one), device=one.device)
    for scale, weight in enumerate(SCALE_WEIGHTS[:num_scales]):
        similarity_B, contrast_B = _structural_similarity(one, other)
        factor_B = similarity_B if scale == num_scales - 1 else contrast_B
        product_B *= factor_B.relu() ** (weight / sum(SCALE_WEIGHTS[:num_scales]))
        one, other = nn.functional.avg_pool2d(one, 2), nn.functional.avg_pool2d(other, 2)
    return product_B


def _structural_similarity(one_B1HW: Tensor, other_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity (B,), and its contrast part (B,) away from the reflected border."""
    rows, columns = (_gaussian_window(size, one_B1HW.device) for size in one_B1HW.shape[-2:])
    stack = torch.stack([one_B1HW, other_B1HW, one_B1HW**2, other_B1HW**2, one_B1HW * other_B1HW])
    one_mean, other_mean, one_square, other_square, product = rows @ stack @ columns.T
    variance = (one_square - one_mean**2).clamp(min=0) + (other_square - other_mean**2).clamp(min=0)
    covariance = product - one_mean * other_mean
    stabiliser_mean, stabiliser_variance = 0.01**2, 0.03**2
    contrast = (2 * covariance + stabiliser_variance) / (variance + stabiliser_variance)
    brightness = (2 * one_mean * other_mean + stabiliser_mean) / (one_mean**2 + other_mean**2 + stabiliser_mean)
    border = WINDOW_RADIUS
    inside = contrast[..., border:-border, border:-border]
    return (brightness * contrast).mean((1, 2, 3)), inside.mean((1, 2, 3))


@functools.cache
def _gaussian_window(size: int, device: torch.device) -> Tensor:
    """Blurring along one axis as a matrix (size, size), reflecting at the borders."""
    offsets = torch.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1)
    weights = torch.exp(-0.5 * (offsets / WINDOW_DEVIATION) ** 2)
    places = (torch.arange(size)[:, None] + offsets).abs()
    places = torch.where(places >= size, 2 * (size - 1) - places, places)
    window = torch.zeros(size, size).scatter_add_(1, places, (weights / weights.sum()).expand(size, -1).contiguous())
    return window.to(device)


def gradient_similarity(one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Mean similarity (B,) of gradient magnitudes, 1 for equal images (Xue et al. 2014, arXiv 1308.3052)."""
    one_BHW, other_BHW = gradient_magnitude(one_BCHW), gradient_magnitude(other_BCHW)
    stabiliser = 170 / 255**2
    similarity_BHW = (2 * one_BHW * other_BHW + stabiliser) / (one_BHW.square() + other_BHW.square() + stabiliser)
    return similarity_BHW.mean((1, 2))


def gradient_magnitude(image_BCHW: Tensor) -> Tensor:
    """Length (B, H - 2, W - 2) of the luminance's central differences."""
    gray_BHW = luminance(image_BCHW)[:, 0]
    x_BHW = (gray_BHW[:, 1:-1, 2:] - gray_BHW[:, 1:-1, :-2]) / 2
    y_BHW = (gray_BHW[:, 2:, 1:-1] - gray_BHW[:, :-2, 1:-1]) / 2
    return (x_BHW.square() + y_BHW.square()).sqrt()


def luminance(image_BCHW: Tensor) -> Tensor:
    """Brightness (B, 1, H, W) of RGB images."""
    weights = torch.tensor(LUMINANCE, device=image_BCHW.device).view(1, 3, 1, 1)
    return (image_BCHW.float() * weights).sum(1, keepdim=True)


# Codes


def code_usage(codes_BN: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Use of the vocabulary by codes (B, N).

    token_utilisation: the least share of the K codes that any column uses; vocabulary_utilisation: the share that
    all columns together use. token_perplexity: mean over columns, of K. perplexity and codes_in_use: of whole latent
    actions, of K ** N; perplexity_ratio: the share of that space.
    """
    one_sample = EpisodeBootstrap(np.zeros(len(codes_BN), np.int64), seed=0, num_resamples=0)
    return {name: float(samples[0]) for name, samples in usage_samples(codes_BN, codebook_size, one_sample).items()}


def usage_samples(codes_BN: np.ndarray, codebook_size: int, bootstrap: EpisodeBootstrap) -> dict[str, np.ndarray]:
    """The numbers of `code_usage`, each resampled (R + 1,)."""
    used_NR, perplexity_NR = [], []
    vocabulary: dict[int, np.ndarray] = {}
    for codes_B in codes_BN.T:
        # A large vocabulary is mostly absent: only the codes that occur are counted.
        present, positions_B = np.unique(codes_B, return_inverse=True)
        counts_RU = bootstrap.histograms(positions_B, len(present))
        used_NR.append((counts_RU > 0).sum(1) / codebook_size)
        perplexity_NR.append(perplexities(counts_RU))
        for code, times_R in zip(present.tolist(), counts_RU.T, strict=True):
            vocabulary[code] = vocabulary.get(code, times_R > 0) | (times_R > 0)
    joint_B = joint_codes(codes_BN)
    counts_RU = bootstrap.histograms(joint_B, int(joint_B.max()) + 1)
    joint_R = perplexities(counts_RU)
    return {
        "token_utilisation": np.min(used_NR, 0),
        "vocabulary_utilisation": np.sum(list(vocabulary.values()), 0) / codebook_size,
        "token_perplexity": np.mean(perplexity_NR, 0),
        "codes_in_use": (counts_RU > 0).sum(1),
        "perplexity": joint_R,
        "perplexity_ratio": np.exp(np.log(joint_R) - codes_BN.shape[1] * math.log(codebook_size)),
    }


def joint_codes(codes_BN: np.ndarray) -> np.ndarray:
    """A number (B,) for each whole latent action: equal codes have equal numbers, from 0 on without gaps."""
    joint_B = np.zeros(len(codes_BN), np.int64)
    for codes_B in codes_BN.T:
        joint_B = np.unique(joint_B * (int(codes_B.max()) + 1) + codes_B, return_inverse=True)[1]
    return joint_B


def perplexities(counts_RU: np.ndarray) -> np.ndarray:
    """exp of the entropy of each histogram: how many equally used entries would be as varied."""
    share_RU = counts_RU / counts_RU.sum(1, keepdims=True, dtype=np.float64)
    logarithm_RU = np.log(share_RU, out=np.zeros_like(share_RU), where=share_RU > 0)
    return np.exp(-(share_RU * logarithm_RU).sum(1))


def kappa(agreement: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Agreement beyond chance as a share of what is beyond chance (Cohen 1960); 0 where chance leaves no room."""
    room = 1 - chance
    return np.where(room > 1e-9, (agreement - chance) / np.maximum(room, 1e-9), 0.0)


def between_code_share(groups_B: np.ndarray, actions_BA: np.ndarray, bootstrap: EpisodeBootstrap) -> np.ndarray:
    """Share (R + 1,) of the actions' variance that lies between groups, not within them, mean over dimensions.

    Adjusted for the number of groups as an adjusted R2 is, 1 - (within / (B - groups)) / (total / (B - 1)): with as
    many groups as pairs, everything lies between. 0 where no group holds two pairs.
    """
    actions_BA = actions_BA[:, varying(actions_BA)] - actions_BA[:, varying(actions_BA)].mean(0)
    if not actions_BA.shape[1]:
        return np.zeros(len(bootstrap.times_RE))
    num_groups = int(groups_B.max()) + 1
    counts_RU = bootstrap.histograms(groups_B, num_groups)
    flat = bootstrap.group_B * num_groups + groups_B
    shares = []
    for action_B in actions_BA.T:
        sums_EU = np.bincount(flat, action_B, minlength=bootstrap.num_episodes * num_groups)
        sums_RU = bootstrap.times_RE @ sums_EU.reshape(-1, num_groups)
        square_R = bootstrap.sums(np.square(action_B)[:, None])[:, 0]
        total_R = square_R - sums_RU.sum(1) ** 2 / counts_RU.sum(1)
        within_R = square_R - (sums_RU**2 / np.maximum(counts_RU, 1)).sum(1)
        freedom_R = counts_RU.sum(1) - (counts_RU > 0).sum(1)
        adjusted_R = 1 - (within_R / np.maximum(freedom_R, 1)) / (total_R / (counts_RU.sum(1) - 1)).clip(1e-12)
        shares.append(np.where(freedom_R > 0, adjusted_R, 0.0))
    return np.mean(shares, 0)


# Probes


def varying(true_BA: np.ndarray) -> np.ndarray:
    """(A,) which dimensions vary by more than a millionth of the largest variance, and by more than rounding."""
    true_BA = true_BA.astype(np.float64)
    variance_A = true_BA.var(0)
    return variance_A > max(1e-6 * variance_A.max(), 1e-12 * np.square(true_BA).mean())


def r_squared_samples(predicted_BA: np.ndarray, true_BA: np.ndarray, bootstrap: EpisodeBootstrap) -> np.ndarray:
    """Share (R + 1,) of the variance explained, averaged over the dimensions that vary; 0 where none does.

    1 - R2 is the normalised mean squared error (NMSE).
    """
    kept_A = varying(true_BA)
    if not kept_A.any():
        return np.zeros(len(bootstrap.times_RE))
    true_BA, predicted_BA = true_BA[:, kept_A].astype(np.float64), predicted_BA[:, kept_A]
    error_RA = bootstrap.means(np.square(predicted_BA - true_BA))
    centred_BA = true_BA - true_BA.mean(0)
    variance_RA = bootstrap.means(np.square(centred_BA)) - bootstrap.means(centred_BA) ** 2
    return (1 - error_RA / np.maximum(variance_RA, 1e-6 * centred_BA.var(0))).mean(1)


def fit_linear_probe(features_BF: np.ndarray, actions_BA: np.ndarray) -> Predictor:
    """Ridge regression from features (B, F) to actions (B, A)."""
    mean, scale = features_BF.mean(0), features_BF.std(0) + 1e-6
    offset = actions_BA.mean(0)
    x, y = (features_BF - mean) / scale, actions_BA - offset
    ridge = 1e-3 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ y)
    return lambda features: (features - mean) / scale @ weights + offset


def fit_mlp_probe(features_BF: np.ndarray, actions_BA: np.ndarray, seed: int = 0, num_steps: int = 400) -> Predictor:
    """Like `fit_linear_probe`, with one hidden layer of 128 instead of a straight line.

    The last fifth of the rows chooses when to stop: rows in the order of episodes make it other episodes.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, scale = features_BF.mean(0), features_BF.std(0) + 1e-6
    offset, spread = actions_BA.mean(0), actions_BA.std(0) + 1e-8
    x = torch.from_numpy(((features_BF - mean) / scale).astype(np.float32))
    y = torch.from_numpy(((actions_BA - offset) / spread).astype(np.float32))
    layers: list[Tensor] = []
    for width_in, width_out in ((x.shape[1], 128), (128, y.shape[1])):
        layers.append((torch.randn(width_in, width_out, generator=generator) / width_in**0.5).requires_grad_())
        layers.append(torch.zeros(width_out).requires_grad_())

    def forward(inputs: Tensor, weights: list[Tensor]) -> Tensor:
        return nn.functional.silu(inputs @ weights[0] + weights[1]) @ weights[2] + weights[3]

    num_fitted = max(1, len(x) - len(x) // 5)
    least, best = math.inf, [layer.detach().clone() for layer in layers]
    optimizer = torch.optim.AdamW(layers, lr=3e-3, weight_decay=1e-2)
    for step in range(num_steps):
        picks = torch.randint(num_fitted, (min(256, num_fitted),), generator=generator)
        loss = (forward(x[picks], layers) - y[picks]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            with torch.no_grad():
                error = float((forward(x[num_fitted - 1 :], layers) - y[num_fitted - 1 :]).square().mean())
            if error < least:
                least, best = error, [layer.detach().clone() for layer in layers]

    def predict(features: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(((features - mean) / scale).astype(np.float32))
        return forward(inputs, best).numpy() * spread + offset

    return predict


def fit_code_table(codes_BN: np.ndarray, actions_BA: np.ndarray) -> Predictor:
    """The mean action of each latent action; of all of them for one that does not occur."""
    unique, groups, counts = np.unique(codes_BN, axis=0, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(groups.reshape(-1), action) for action in actions_BA.T], 1)
    overall = actions_BA.mean(0)
    table = {tuple(code): mean for code, mean in zip(unique.tolist(), sums / counts[:, None], strict=True)}
    return lambda codes: np.stack([table.get(tuple(code), overall) for code in codes.tolist()])


def fit_principal_components(features_BF: np.ndarray, most: int = 64) -> Predictor:
    """Projection on the directions of largest variance, at most `most` of them."""
    mean = features_BF.mean(0)
    variances, directions = np.linalg.eigh(np.cov((features_BF - mean).T))
    kept = directions[:, np.argsort(-variances)[:most]]
    return lambda features: (features - mean) @ kept
