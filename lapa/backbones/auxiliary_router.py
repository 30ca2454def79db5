"""Routers that decide from one token alone what expert choice decided by looking at the whole batch.

Expert choice (and mixture-of-depths) takes the best tokens of a batch, so a token's route depends on tokens that come
after it, and on other samples: it can be trained so, but not run so. After MoMa (arXiv 2407.21770, section 2.4) each
router is accompanied by a small classifier of the same input,

    p = sigmoid(W2 SiLU(W1 x))      W1: D to D / 2, W2: to one output an expert; the expert takes the token if p > 0.5

trained by binary cross-entropy on what expert choice took. The paper trains them after the model, which is frozen then.
Here they learn beside it, on detached inputs: no gradient of theirs reaches the model, and since they are clipped apart
(`lapa.trainer.parameter_groups`) the model's own steps are those that it would take without them. They see a moving
target until the learning rate has decayed; `train_auxiliary_routers` is the paper's second phase, for what is left.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.runtime import Compute
from lapa.schema import Training
from lapa.trainer import fit


class AuxiliaryRouter(nn.Module):
    """One yes or no for every token and expert, from the token alone."""

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.hidden = nn.Linear(width, width // 2, bias=False)
        self.output = nn.Linear(width // 2, num_experts)
        nn.init.zeros_(self.output.bias)
        for parameter in self.parameters():
            # Not a slower rate, but a group of its own: their gradients do not count in the clipping of the model's.
            parameter.learning_rate_ratio = 1.0  # type: ignore[attr-defined]
        self.observed: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) float32; the expert takes the token if its logit is positive."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.output(F.silu(self.hidden(x_TD.float())))

    def observe(self, x_TD: Tensor, index_T: Tensor, is_chosen_TE: Tensor) -> None:
        """Keep what expert choice decided on the rows `index_T` of x, for `loss` and `agreement`."""
        self.observed = x_TD.detach(), index_T, is_chosen_TE

    def loss(self) -> Tensor | None:
        """Scalar binary cross-entropy on the last decisions; None if there are none."""
        if self.observed is None or not len(self.observed[1]):
            return None
        x_TD, index_T, is_chosen_TE = self.observed
        return F.binary_cross_entropy_with_logits(self(x_TD[index_T]), is_chosen_TE.float())

    @torch.no_grad()
    def agreement(self) -> dict[str, float]:
        """Counts over the last decisions.

        decisions: all. right: as expert choice. chosen, taken, both: by expert choice, here, by both. tokens: all.
        left_out, left_out_here: tokens that expert choice gave to no expert, and that are given to none here.
        """
        if self.observed is None:
            return {}
        x_TD, index_T, is_chosen_TE = self.observed
        is_taken_TE = self(x_TD[index_T]) > 0
        return {
            "decisions": float(is_taken_TE.numel()),
            "right": float((is_taken_TE == is_chosen_TE).sum()),
            "chosen": float(is_chosen_TE.sum()),
            "taken": float(is_taken_TE.sum()),
            "both": float((is_taken_TE & is_chosen_TE).sum()),
            "tokens": float(len(is_taken_TE)),
            "left_out": float((~is_chosen_TE.any(1)).sum()),
            "left_out_here": float((~is_taken_TE.any(1)).sum()),
        }


class Routed(nn.Module):
    """A part of a model that chooses tokens in training, and asks auxiliary routers in evaluation.

    Attributes:
        is_choosing: choose in evaluation too; see `expert_choice`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_choosing = False

    @property
    def sees_the_batch(self) -> bool:
        """Whether routes depend on all tokens of the batch."""
        return self.training or self.is_choosing


@contextmanager
def expert_choice(model: nn.Module) -> Iterator[None]:
    """Evaluate with the routes of training, which look at later tokens and at other samples.

    For measurements beside the causal ones only: what a model that sees the future predicts of it is no prediction.
    """
    parts = [part for part in model.modules() if isinstance(part, Routed)]
    for part in parts:
        part.is_choosing = True
    try:
        yield
    finally:
        for part in parts:
            part.is_choosing = False


def auxiliary_routers(model: nn.Module) -> list[AuxiliaryRouter]:
    """All auxiliary routers of a model."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryRouter)]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Mean binary cross-entropy of all routers on the last forward pass in training; None where there was none."""
    losses = [loss for router in auxiliary_routers(model) if (loss := router.loss()) is not None]
    return torch.stack(losses).mean() if losses else None


def train_auxiliary_routers(
    model: nn.Module,
    run_forward: Callable[[Any], Any],
    make_batch: Callable[[np.random.Generator], Any],
    training: Training,
    compute: Compute,
    output_dir: Path,
) -> dict[str, float]:
    """The paper's second phase: train the auxiliary routers of a model whose other weights are frozen.

    Args:
        run_forward: what a step of training does with a batch, up to the hidden states; no gradient is needed.
        output_dir: for the log and the state to resume from; another folder than the model's own.

    Returns the last logged numbers. ValueError for a model without auxiliary routers.
    """
    routers = auxiliary_routers(model)
    if not routers:
        raise ValueError("the model has no auxiliary routers: mixtures of several experts, or of depths, have them")
    own = {id(parameter) for router in routers for parameter in router.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]

    def loss(batch: Any) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            run_forward(batch)
        found = auxiliary_loss(model)
        if found is None:
            raise ValueError("run_forward showed the routers no token: let it run the model on the batch")
        return found, {}

    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return fit(model, make_batch, loss, training, compute, output_dir, description="auxiliary routers")
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
