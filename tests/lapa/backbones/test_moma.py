"""Expert choice, and what auxiliary routers make of it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lapa.backbones.auxiliary_router import auxiliary_routers, expert_choice
from lapa.backbones.base import IMAGE, LATENT_ACTION, ROBOT_ACTION, TEXT, Cache, Layout, build_backbone
from lapa.backbones.moma import MixtureOfExperts, MoMaTransformer
from lapa.schema import MoMaBackbone

MODALITIES = [TEXT, TEXT, TEXT, IMAGE, IMAGE, IMAGE, IMAGE, LATENT_ACTION, LATENT_ACTION, ROBOT_ACTION]
CONFIG = MoMaBackbone(width=16, num_layers=2, num_heads=2, num_experts=[2, 4, 1])


def build(seed: int = 0, **changes) -> MoMaTransformer:
    torch.manual_seed(seed)
    model = build_backbone(dataclasses.replace(CONFIG, **changes))
    assert isinstance(model, MoMaTransformer)
    return model


def inputs(batch: int = 3, seed: int = 0, **ids) -> tuple[torch.Tensor, Layout]:
    tokens_BSD = torch.randn(batch, len(MODALITIES), 16, generator=torch.Generator().manual_seed(seed))
    return tokens_BSD, Layout.of(torch.tensor(MODALITIES).expand(batch, -1), **ids)


def decided(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The model with auxiliary routers that say yes and no about equally often, far from the threshold."""
    generator = torch.Generator().manual_seed(seed)
    for router in auxiliary_routers(model):
        for parameter in router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def by_a_plain_loop(mixture: MixtureOfExperts, x_BSD: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Expert choice token by token, as the paper states it."""
    out_BSD, first = torch.zeros_like(x_BSD), 0
    for group, number in enumerate(mixture.num_experts):
        members = [
            (b, s)
            for b in range(x_BSD.shape[0])
            for s in range(x_BSD.shape[1])
            if layout.is_token_BS[b, s] and mixture.group_of_modality[layout.modality_ids_BS[b, s]] == group
        ]
        for expert in range(number):
            gate_up, down = mixture.experts[group].gate_up[expert], mixture.experts[group].down[expert]

            def weight(place, column=first + expert, routed=number > 1):
                return torch.sigmoid(mixture.router.weight[column] @ x_BSD[place]) if routed else torch.tensor(1.0)

            capacity = math.ceil(mixture.capacity_factor * len(members) / number) if number > 1 else len(members)
            for place in sorted(members, key=lambda place: -weight(place).item())[:capacity]:
                gate, up = (x_BSD[place] @ gate_up).chunk(2)
                out_BSD[place] += weight(place) * ((F.silu(gate) * up) @ down)
        first += number if number > 1 else 0
    return out_BSD


@pytest.mark.parametrize("capacity_factor", [1.0, 1.5])
def test_expert_choice_equals_a_plain_loop(capacity_factor):
    mixture = build(capacity_factor=capacity_factor).blocks[0].feed_forward
    is_token_BS = torch.ones(3, len(MODALITIES), dtype=torch.bool)
    is_token_BS[1, [0, 4, 9]] = False
    x_BSD, layout = inputs(is_token_BS=is_token_BS)
    with torch.no_grad():
        expected_BSD = by_a_plain_loop(mixture, x_BSD, layout)
        torch.testing.assert_close(mixture(x_BSD, layout), expected_BSD)
    assert not expected_BSD[1, [0, 4, 9]].any()


def test_a_group_with_fewer_tokens_than_experts_is_served():
    mixture = build(num_experts=[2, 8, 1]).blocks[0].feed_forward
    x_BSD, layout = inputs(batch=1)
    with torch.no_grad():
        torch.testing.assert_close(mixture(x_BSD, layout), by_a_plain_loop(mixture, x_BSD, layout))
        text_alone_BSD = mixture(x_BSD[:, :3], layout[:, :3])
    assert text_alone_BSD.shape == (1, 3, 16)


def test_auxiliary_routers_decide_and_the_main_router_weighs():
    mixture = decided(build()).blocks[0].feed_forward
    x_BSD, layout = inputs()
    with torch.no_grad():
        out_BSD = mixture(x_BSD, layout)
        for b, s in [(0, 4), (1, 5), (2, 6)]:
            x_D = x_BSD[b, s]
            takes_E = mixture.auxiliary["1"](x_D[None])[0] > 0
            weight_E = torch.sigmoid(mixture.router.weight[2:] @ x_D)  # the first two outputs are the text's
            expected_D = torch.zeros(16)
            for expert in takes_E.nonzero().flatten():
                gate, up = (x_D @ mixture.experts[1].gate_up[expert]).chunk(2)
                expected_D += weight_E[expert] * ((F.silu(gate) * up) @ mixture.experts[1].down[expert])
            torch.testing.assert_close(out_BSD[b, s], expected_D)


@pytest.mark.parametrize("depth_capacity", [0.0, 0.5])
def test_inference_knows_neither_later_tokens_nor_other_samples(depth_capacity):
    model = decided(build(mask="causal", depth_capacity=depth_capacity))
    tokens_BSD, layout = inputs(batch=3)
    whole_BSD = model(tokens_BSD, layout)
    other_BSD = torch.randn_like(tokens_BSD)
    other_BSD[1, :6] = tokens_BSD[1, :6]
    torch.testing.assert_close(model(other_BSD, layout)[1, :6], whole_BSD[1, :6])
    with expert_choice(model):
        leaking_BSD = model(tokens_BSD, layout)
        assert not torch.allclose(model(other_BSD, layout)[1, :6], leaking_BSD[1, :6], atol=1e-3)
    torch.testing.assert_close(model(tokens_BSD, layout), whole_BSD)


@pytest.mark.parametrize("depth_capacity", [0.0, 0.5])
def test_decided_routers_decode_token_by_token_as_the_whole(depth_capacity):
    model = decided(build(mask="causal", depth_capacity=depth_capacity, rotary_theta=100.0))
    tokens_BSD, layout = inputs()
    cache = Cache()
    steps = [model(tokens_BSD[:, s : s + 1], layout[:, s : s + 1], cache) for s in range(len(MODALITIES))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BSD, layout), atol=2e-5, rtol=1e-4)


def test_a_cache_is_refused_while_the_whole_batch_is_looked_at():
    model = build()
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        model(*inputs(), Cache())
    with expert_choice(model.eval()), pytest.raises(ValueError, match="outside of expert_choice"):
        model(*inputs(), Cache())


def test_noise_changes_the_choice_in_training_alone():
    model = build(router_noise=1.0)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outputs.append(model(*inputs()))
    assert not torch.allclose(*outputs)
    with expert_choice(model.eval()):
        assert torch.equal(model(*inputs()), model(*inputs()))


def test_flops_with_depths_are_those_of_the_chosen_tokens():
    model = build(depth_capacity=0.25, num_experts=[1, 1, 1])
    tokens_BSD, layout = inputs(batch=1)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(tokens_BSD, layout)
    assert model.forward_flops([3, 4, 2, 0, 1]) == counter.get_total_flops()
    assert model.forward_flops([3, 4, 2, 0, 1]) < 0.7 * build(num_experts=[1, 1, 1]).forward_flops([3, 4, 2, 0, 1])


def test_auxiliary_flops_are_the_rest_of_what_evaluation_takes():
    model = build(capacity_factor=2.0, num_experts=[2, 2, 1])
    for router in auxiliary_routers(model):
        router.output.bias.data.fill_(1e3)  # every expert takes every token, as with this capacity in training
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.eval()(*inputs(batch=1))
    lengths = [3, 4, 2, 0, 1]
    assert model.forward_flops(lengths) + model.auxiliary_flops(lengths) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [["text"], ["image"]], "num_experts": [2, 2]}, "in exactly one group"),
        ({"num_experts": [4, 4]}, "positive number for each of the 3 groups"),
        ({"num_experts": [4, 0, 1]}, "positive number"),
        ({"capacity_factor": 0.0}, "more than 0"),
        ({"depth_capacity": 1.0}, "expected a share"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
