"""Numbers that say whether latent actions are any good: reconstruction, code usage, probes.

B pairs, C colours, H and W pixels, L tokens, K codes a token, F features, A action dimensions.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio of values in [0, 1], from a mean over all pixels of all images.

    The mean comes first because a ratio per image is infinite wherever nothing moved.
    """
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def code_usage(codes_BL: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Use of the vocabulary by codes (B, L).

    token_utilisation: the least share of the K codes that any token position uses; vocabulary_utilisation: the
    share that all positions together use. token_perplexity: mean over positions, of K. perplexity and
    codes_in_use: of whole latent actions, of K ** L; perplexity_ratio: the share of that space.
    """
    length = codes_BL.shape[1]
    token_counts = np.stack([np.bincount(codes, minlength=codebook_size) for codes in codes_BL.T])
    joint = codes_BL.astype(np.int64) @ (codebook_size ** np.arange(length))
    joint_counts = np.unique(joint, return_counts=True)[1]
    return {
        "token_utilisation": float((token_counts > 0).mean(1).min()),
        "vocabulary_utilisation": float((token_counts.sum(0) > 0).mean()),
        "token_perplexity": float(np.mean([perplexity(counts) for counts in token_counts])),
        "codes_in_use": float(len(joint_counts)),
        "perplexity": perplexity(joint_counts),
        "perplexity_ratio": perplexity(joint_counts) / codebook_size**length,
    }


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a histogram: the number of equally used entries that would be as varied."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def r_squared(predicted_BA: np.ndarray, true_BA: np.ndarray) -> float:
    """Share of the variance explained, averaged over action dimensions; 1 - R2 is the normalised error (NMSE).

    Dimensions that hardly vary (less than a millionth of the largest variance) are left out.
    """
    variance_A = true_BA.var(0)
    kept = variance_A > 1e-6 * variance_A.max()
    error_A = ((predicted_BA - true_BA) ** 2).mean(0)
    return float(np.mean(1 - error_A[kept] / variance_A[kept])) if kept.any() else 0.0


def linear_probe_r2(
    train_features: np.ndarray, train_actions: np.ndarray, features: np.ndarray, actions: np.ndarray
) -> float:
    """R2 on (features, actions) of a ridge regression fitted on the training arrays, (B, F) to (B, A)."""
    mean, scale = train_features.mean(0), train_features.std(0) + 1e-6
    offset = train_actions.mean(0)
    x, y = (train_features - mean) / scale, train_actions - offset
    ridge = 1e-3 * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ y)
    return r_squared((features - mean) / scale @ weights + offset, actions)


def mlp_probe_r2(
    train_features: np.ndarray,
    train_actions: np.ndarray,
    features: np.ndarray,
    actions: np.ndarray,
    seed: int = 0,
    num_steps: int = 400,
) -> float:
    """Like `linear_probe_r2`, with one hidden layer of 128 instead of a straight line."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = train_features.mean(0), train_features.std(0) + 1e-6
    offset, spread = train_actions.mean(0), train_actions.std(0) + 1e-8
    x = torch.from_numpy(((train_features - mean) / scale).astype(np.float32))
    y = torch.from_numpy(((train_actions - offset) / spread).astype(np.float32))
    layers: list[Tensor] = []
    for width_in, width_out in ((x.shape[1], 128), (128, y.shape[1])):
        layers.append((torch.randn(width_in, width_out, generator=generator) / width_in**0.5).requires_grad_())
        layers.append(torch.zeros(width_out).requires_grad_())

    def forward(inputs: Tensor) -> Tensor:
        return nn.functional.silu(inputs @ layers[0] + layers[1]) @ layers[2] + layers[3]

    optimizer = torch.optim.AdamW(layers, lr=3e-3, weight_decay=1e-2)
    for _ in range(num_steps):
        picks = torch.randint(len(x), (min(256, len(x)),), generator=generator)
        loss = (forward(x[picks]) - y[picks]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = forward(torch.from_numpy(((features - mean) / scale).astype(np.float32))).numpy()
    return r_squared(predicted * spread + offset, actions)
