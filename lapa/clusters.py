"""k-means, for codes that nothing was trained for."""

import torch
from torch import Tensor

NUM_ROUNDS = 12


def kmeans(points_NC: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Codes (K, C) by Lloyd's algorithm; a code that nobody is nearest to moves to the worst explained point.

    Raises ValueError for more codes than points.
    """
    if len(points_NC) < num_codes:
        raise ValueError(f"{num_codes} codes were asked for, of {len(points_NC)} points: use fewer codes or more data")
    codes_KC = points_NC[torch.randperm(len(points_NC), generator=generator)[:num_codes]].clone()
    for _ in range(NUM_ROUNDS):
        distance_N, nearest_N = torch.cdist(points_NC, codes_KC).min(1)
        sums_KC = torch.zeros_like(codes_KC).index_add_(0, nearest_N, points_NC)
        counts_K = nearest_N.bincount(minlength=num_codes)
        codes_KC = sums_KC / counts_K.clamp(min=1)[:, None]
        empty = (counts_K == 0).nonzero().flatten()
        codes_KC[empty] = points_NC[distance_N.topk(len(empty)).indices]
    return codes_KC
