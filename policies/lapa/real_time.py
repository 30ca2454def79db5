"""Real-time chunking: a new chunk that goes on from what the robot is doing while it is computed.

Diffusion and flow policies inpaint the new chunk under the old one's guidance (Black et al. 2025, arXiv 2506.07339). A
head that predicts a chunk at once has nothing to guide, so the two are mixed: the old actions while the new chunk is
under way, then linearly over to the new ones.

Shapes: B batch, T chunk size, P actions left of the old chunk, A action dimensions.
"""

import torch
from torch import Tensor


def blend_chunks(chunk_BTA: Tensor, left_over_PA: Tensor | None, inference_delay: int) -> Tensor:
    """The chunk (B, T, A), continuing the actions that are left of the one before.

    Args:
        left_over_PA: normalised; LeRobot pads it with rows of zeros, which are not actions.
        inference_delay: control steps that pass before the new chunk can be used.
    """
    if left_over_PA is None:
        return chunk_BTA
    is_action_P = (left_over_PA != 0).any(-1)
    num_left = min(int(is_action_P.nonzero().max()) + 1 if is_action_P.any() else 0, chunk_BTA.shape[1])
    if not num_left:
        return chunk_BTA
    steps = torch.arange(num_left, device=chunk_BTA.device)
    # The share of the old chunk: 1 up to the delay, 0 where it ends.
    share_P = ((num_left - steps) / max(1, num_left - inference_delay + 1)).clamp(0, 1)
    share_P1 = share_P.to(chunk_BTA.dtype)[:, None]
    blended_BTA = chunk_BTA.clone()
    old_PA = left_over_PA[:num_left].to(chunk_BTA)
    blended_BTA[:, :num_left] = share_P1 * old_PA + (1 - share_P1) * chunk_BTA[:, :num_left]
    return blended_BTA
