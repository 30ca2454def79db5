"""Auxiliary routers learn what expert choice does, and leave the model alone."""

import pytest
import torch

from lapa.backbones.auxiliary_router import auxiliary_loss, auxiliary_routers, expert_choice, train_auxiliary_routers
from lapa.backbones.dense import DenseTransformer
from lapa.runtime import Compute
from lapa.schema import DenseBackbone, Training
from lapa.trainer import fit
from tests.lapa.backbones.test_moma import build, inputs

CPU = Compute(torch.device("cpu"), None, compile=False)


def auxiliary_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if "auxiliary" in name}


@pytest.mark.parametrize("depth_capacity", [0.0, 0.5])
def test_the_auxiliary_loss_touches_the_auxiliary_routers_alone(depth_capacity):
    model = build(depth_capacity=depth_capacity)
    tokens_BSD, layout = inputs(batch=8)
    model(tokens_BSD.requires_grad_(), layout)
    model.auxiliary_loss().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == auxiliary_names(model)
    assert tokens_BSD.grad is None


def test_the_model_learns_the_same_with_and_without_its_auxiliary_routers(tmp_path):
    weights = []
    for share in (0.0, 100.0):
        model = build()
        torch.manual_seed(0)

        def loss(batch, model=model, share=share):
            return model(*batch).square().mul(torch.arange(16.0)).sum() + share * model.auxiliary_loss(), {}

        training = Training(num_steps=5, warmup_steps=1, tensorboard=False)
        fit(model, lambda rng: inputs(seed=int(rng.integers(9))), loss, training, CPU, tmp_path / str(share))
        weights.append({name: p for name, p in model.named_parameters() if "auxiliary" not in name})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_second_phase_learns_the_choice_and_nothing_else(tmp_path):
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [inputs(batch=16, seed=seed) for seed in range(4)]

    def agreement() -> float:
        model.eval()
        with torch.no_grad(), expert_choice(model):
            model(*batches[0])
        counts = [router.agreement() for router in auxiliary_routers(model)]
        return sum(c["right"] for c in counts) / sum(c["decisions"] for c in counts)

    first = agreement()
    train_auxiliary_routers(
        model,
        lambda batch: model(*batch),
        lambda rng: batches[rng.integers(4)],
        Training(num_steps=200, learning_rate=1e-2, warmup_steps=10, tensorboard=False),
        CPU,
        tmp_path,
    )
    assert agreement() > max(0.9, first)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == auxiliary_names(model)
    assert all(p.requires_grad for p in model.parameters())


def test_counts_of_agreement_are_of_the_last_decisions():
    model = build()
    model(*inputs(batch=4))
    text_router = auxiliary_routers(model)[0]
    counts = text_router.agreement()
    assert counts["decisions"] == 4 * 3 * 2 and counts["chosen"] == 4 * 3
    assert counts["right"] == counts["decisions"] - counts["taken"] - counts["chosen"] + 2 * counts["both"]


def test_there_is_no_loss_before_a_pass_in_training():
    model = build().eval()
    model(*inputs())
    assert auxiliary_loss(model) is None


def test_a_model_without_auxiliary_routers_is_refused(tmp_path):
    dense = DenseTransformer(DenseBackbone(width=16, num_heads=2))
    with pytest.raises(ValueError, match="has no auxiliary routers"):
        train_auxiliary_routers(dense, lambda batch: None, lambda rng: None, Training(), CPU, tmp_path)
