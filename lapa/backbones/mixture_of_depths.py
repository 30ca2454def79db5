"""Mixture-of-depths: a block that most tokens skip, attention included (arXiv 2404.02258; in MoMa, 2407.21770 2.3).

In training the router's best `capacity` tokens of each sequence go through the block, the others stay as they are:

    x = x + sigmoid(w x) * (block(x) - x)     for those that are chosen, which see each other alone

so that a token's route depends on later tokens. In evaluation an auxiliary router decides for each token by itself. One
wrong decision removes a token's keys for all that follow, which is why the method suffers from errors that a mixture of
experts does not mind.

With a cache, skipped tokens get empty slots in this layer's keys and values, so that positions in it stay those of the
sequence, and a mark by which later tokens leave them out.

Shapes: B batch, S sequence, C chosen tokens of the fullest row, P past and present tokens, D width, N heads, H width
of a head, K half of it.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.backbones.auxiliary_router import AuxiliaryRouter, Routed
from lapa.backbones.base import PADDING_DOCUMENT, Cache, Layout
from lapa.schema import DenseBackbone


def depth_capacity(capacity: float, length: int) -> int:
    """Number of tokens of a sequence that a block takes."""
    return math.ceil(capacity * length)


class SparseCache(Cache):
    """What a block's attention sees of the cache: it adds the keys of C tokens, and the others' slots stay empty."""

    def __init__(self, whole: Cache, index_BC: Tensor, length: int):
        super().__init__()
        self.whole, self.index_BC, self.length_of_sequence = whole, index_BC, length

    def extend(self, layer: int, keys_BNSH: Tensor, values_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        """Add C keys and values at their places among the new tokens; all (B, N, P, H) are returned."""
        return self.whole.extend(layer, self._spread(keys_BNSH), self._spread(values_BNSH))

    def _spread(self, x_BNCH: Tensor) -> Tensor:
        index_BNCH = self.index_BC[:, None, :, None].expand_as(x_BNCH)
        return x_BNCH.new_zeros(*x_BNCH.shape[:2], self.length_of_sequence, x_BNCH.shape[3]).scatter(
            2, index_BNCH, x_BNCH
        )


class DepthRoutedBlock(Routed):
    """A block behind a router.

    Args:
        block: x, layout, mask, angles and cache to x, as `lapa.backbones.dense.Block`.
        capacity: share of the tokens of a sequence that go through it in training.
        presence_slot: where in the cache it marks which tokens went through; no layer's own number.
    """

    def __init__(self, config: DenseBackbone, block: nn.Module, capacity: float, presence_slot: int):
        super().__init__()
        self.block = block
        self.capacity = capacity
        self.presence_slot = presence_slot
        self.router = nn.Linear(config.width, 1, bias=False)
        self.auxiliary = AuxiliaryRouter(config.width, 1)

    def forward(
        self, x_BSD: Tensor, layout: Layout, mask_B1SP: Tensor, angles_B1SK: Tensor | None, cache: Cache | None
    ) -> Tensor:
        with torch.autocast(x_BSD.device.type, enabled=False):
            # Not the residual stream itself, whose size grows with depth.
            normed_BSD = F.rms_norm(x_BSD.float(), x_BSD.shape[-1:])
            score_BS = self.router(normed_BSD).squeeze(-1)
        is_token_BS = layout.is_token_BS
        if self.sees_the_batch:
            is_chosen_BS = self.best(score_BS, is_token_BS)
            num_chosen = depth_capacity(self.capacity, x_BSD.shape[1])
            index_T = is_token_BS.flatten().nonzero().flatten()
            self.auxiliary.observe(normed_BSD.flatten(0, 1), index_T, is_chosen_BS.flatten()[index_T, None])
        else:
            is_chosen_BS = (self.auxiliary(normed_BSD.flatten(0, 1)) > 0).view_as(is_token_BS) & is_token_BS
            # At least one, if only as padding: a cache wants its slots even where nothing is chosen.
            num_chosen = max(1, int(is_chosen_BS.sum(1).max()))

        # The chosen ones of each row first, in order; rows that have fewer are filled up with padding.
        index_BC = is_chosen_BS.int().argsort(dim=1, descending=True, stable=True)[:, :num_chosen]
        is_chosen_BC = is_chosen_BS.gather(1, index_BC)
        chosen = layout.select(index_BC)
        chosen = dataclasses.replace(
            chosen, document_ids_BS=chosen.document_ids_BS.masked_fill(~is_chosen_BC, PADDING_DOCUMENT)
        )
        mask_B1CP, sparse_cache = self.see(mask_B1SP, index_BC, is_chosen_BS, cache)
        angles_B1CK = None
        if angles_B1SK is not None:
            angles_B1CK = angles_B1SK.gather(2, index_BC[:, None, :, None].expand(-1, -1, -1, angles_B1SK.shape[-1]))
        index_BCD = index_BC[..., None].expand(-1, -1, x_BSD.shape[-1])
        x_BCD = x_BSD.gather(1, index_BCD)
        update_BCD = self.block(x_BCD, chosen, mask_B1CP, angles_B1CK, sparse_cache) - x_BCD
        weight_BC1 = (score_BS.gather(1, index_BC).sigmoid() * is_chosen_BC)[..., None]
        return x_BSD.scatter_add(1, index_BCD, (update_BCD * weight_BC1).to(x_BSD.dtype))

    def best(self, score_BS: Tensor, is_token_BS: Tensor) -> Tensor:
        """(B, S) bool, the best of each row's tokens, as many as its capacity."""
        num_best_B = (self.capacity * is_token_BS.sum(1)).ceil()
        order_BS = score_BS.masked_fill(~is_token_BS, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank_S = torch.arange(score_BS.shape[1], device=score_BS.device)
        return torch.zeros_like(is_token_BS).scatter(1, order_BS, rank_S < num_best_B[:, None])

    def see(
        self, mask_B1SP: Tensor, index_BC: Tensor, is_chosen_BS: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """Who of the chosen looks at whom, (B, 1, C, C) or with a cache (B, 1, C, P); and the block's cache."""
        mask_BCP = mask_B1SP[:, 0].gather(1, index_BC[..., None].expand(-1, -1, mask_B1SP.shape[-1]))
        if cache is None:
            is_chosen_BC = is_chosen_BS.gather(1, index_BC)
            mask_BCC = mask_BCP.gather(2, index_BC[:, None].expand(-1, index_BC.shape[1], -1))
            itself_CC = torch.eye(index_BC.shape[1], dtype=torch.bool, device=index_BC.device)
            return ((mask_BCC & is_chosen_BC[:, None]) | itself_CC)[:, None], None
        present_BNPH = is_chosen_BS[:, None, :, None]
        present_BNPH, _ = cache.extend(self.presence_slot, present_BNPH, present_BNPH)
        length = is_chosen_BS.shape[1]
        own_BC1 = index_BC[..., None] + mask_BCP.shape[-1] - length
        mask_BCP = (mask_BCP & present_BNPH[:, 0, None, :, 0]).scatter(2, own_BC1, True)
        return mask_BCP[:, None], SparseCache(cache, index_BC, length)
