"""Tokens sorted by group (modality, expert) once a forward pass, so that each group is one matrix product.

    routing = route(group_ids_BS, num_groups)
    segments = routing.split(x_BSD)          a tensor (T_m, D) for every group, which may be empty
    x_BSD = routing.merge(segments)          back in the order of the sequence

`grouped_linear` multiplies rows that are sorted already, each group with its own matrix.

Shapes: B batch, S sequence, T = B * S tokens, M groups, T_m tokens of a group, D width, F output width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which tokens of a batch are of which group.

    group_ids_BS: int64, the group of every token.
    order_T: int64, flat indices b * S + s of the tokens, group by group, within one in the order of the batch.
    inverse_T: int64, where each token of the batch went.
    lengths: number of tokens of each group; they add up to T.
    """

    group_ids_BS: Tensor
    order_T: Tensor
    inverse_T: Tensor
    lengths: list[int]

    def split(self, x_BSD: Tensor) -> list[Tensor]:
        """The rows (T_m, D) of each group."""
        return list(_Permute.apply(x_BSD.flatten(0, 1), self.order_T, self.inverse_T).split(self.lengths))

    def merge(self, segments: Sequence[Tensor]) -> Tensor:
        """The rows (T_m, D) of each group as one batch (B, S, D); what is given for an empty group is not looked at."""
        rows_TD = torch.cat([segment_TD for segment_TD, length in zip(segments, self.lengths, strict=True) if length])
        return _Permute.apply(rows_TD, self.inverse_T, self.order_T).unflatten(0, self.group_ids_BS.shape)


def route(group_ids_BS: Tensor, num_groups: int) -> Routing:
    """Sort the tokens of a batch by group id in [0, num_groups); the one point where the host waits for the device."""
    group_ids_T = group_ids_BS.flatten()
    # Not bincount, which waits a second time on a GPU.
    lengths_M = (group_ids_T == torch.arange(num_groups, device=group_ids_T.device)[:, None]).sum(1)
    order_T = group_ids_T.argsort(stable=True)
    inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))
    return Routing(group_ids_BS, order_T, inverse_T, lengths_M.tolist())


def grouped_linear(x_TD: Tensor, weights_MDF: Tensor, lengths: Sequence[int]) -> Tensor:
    """(T, F): the first lengths[0] rows times the first matrix, the next lengths[1] times the second, and so on."""
    if len(lengths) != len(weights_MDF) or sum(lengths) != len(x_TD):
        raise ValueError(
            f"lengths {list(lengths)} do not fit {len(x_TD)} rows and {len(weights_MDF)} matrices: "
            "give the number of rows of each matrix"
        )
    pairs = zip(x_TD.split(list(lengths)), weights_MDF.unbind(), strict=True)
    return torch.cat([rows_TD @ weight_DF for rows_TD, weight_DF in pairs])


class _Permute(torch.autograd.Function):
    """Rows in another order. That of indexing sums gradients into zeros; a permutation's is a permutation too."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TD.index_select(0, order_T)

    @staticmethod
    def backward(ctx, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_T,) = ctx.saved_tensors
        return gradient_TD.index_select(0, inverse_T), None, None
