"""Heads that tie a latent action to what a robot measured or did; trained beside the quantizer and then dropped.

Shapes: B batch, L code_length, D latent_dim, S state dimensions, A action dimensions.
"""

import torch
from torch import Tensor, nn

from lapa.quantizer.targets.base import relative_error


def head(num_inputs: int, hidden_width: int, num_outputs: int) -> nn.Module:
    """One hidden layer, or a linear map where `hidden_width` is 0."""
    if hidden_width == 0:
        return nn.Linear(num_inputs, num_outputs)
    return nn.Sequential(nn.Linear(num_inputs, hidden_width), nn.SiLU(), nn.Linear(hidden_width, num_outputs))


class Proprioception(nn.Module):
    """The change of the proprioceptive state from the present state and the latent action (villa-X, 2507.23682).

    mean_S and std_S are of the states, change_std_S is of their change, on training pairs.
    """

    def __init__(self, latent_size: int, hidden_width: int, mean_S: Tensor, std_S: Tensor, change_std_S: Tensor):
        super().__init__()
        self.mean_S: Tensor
        self.std_S: Tensor
        self.change_std_S: Tensor
        for name, values in (("mean_S", mean_S), ("std_S", std_S), ("change_std_S", change_std_S)):
            self.register_buffer(name, values, persistent=False)
        self.head = head(latent_size + len(mean_S), hidden_width, len(mean_S))

    def forward(self, latents_BLD: Tensor, states_B2S: Tensor) -> Tensor:
        """Squared error as a share of that of predicting no change."""
        present_BS, future_BS = states_B2S.unbind(1)
        change_BS = (future_BS - present_BS) / self.change_std_S
        inputs_BI = torch.cat([latents_BLD.flatten(1), (present_BS - self.mean_S) / self.std_S], 1)
        return relative_error((self.head(inputs_BI).float() - change_BS).square(), change_BS.square())


class Grounding(nn.Module):
    """The executed displacement from the latent action, for the few pairs that have one (LAOM, arXiv 2502.00379).

    mean_A and std_A are of the labelled training pairs alone.
    """

    def __init__(self, latent_size: int, hidden_width: int, mean_A: Tensor, std_A: Tensor):
        super().__init__()
        self.mean_A: Tensor
        self.std_A: Tensor
        self.register_buffer("mean_A", mean_A, persistent=False)
        self.register_buffer("std_A", std_A, persistent=False)
        self.head = head(latent_size, hidden_width, len(mean_A))

    def forward(self, latents_BLD: Tensor, actions_BA: Tensor, has_action_B: Tensor) -> Tensor:
        """Squared error, on labelled pairs, as a share of the variance of their actions; 0 where there are none."""
        true_BA = (actions_BA - self.mean_A) / self.std_A
        error_B = (self.head(latents_BLD.flatten(1)).float() - true_BA).square().mean(1)
        has_B = has_action_B.to(error_B.dtype)
        return relative_error(error_B * has_B, has_B)
