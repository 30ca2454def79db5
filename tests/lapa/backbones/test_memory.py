import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lapa import schema
from lapa.backbones.base import IMAGE, TEXT, Layout, build_backbone
from lapa.backbones.memory import MemoryLayer, candidates, layers_with_memory
from lapa.checkpoint import load_weights, save_model
from lapa.schema import MemoryBackbone, MoTMemoryBackbone
from lapa.trainer import clip_gradients, parameter_groups

SMALL = MemoryBackbone(
    width=16, num_layers=6, num_heads=2, num_half_keys=6, num_memory_heads=3, num_best_slots=5, key_width=8
)


def build(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_backbone(dataclasses.replace(SMALL, **changes))


def memory_layers(model) -> list[MemoryLayer]:
    return [module for module in model.modules() if isinstance(module, MemoryLayer)]


def run(model, batch: int = 4, seed: int = 1):
    tokens_BSD = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(seed))
    return model(tokens_BSD, Layout.of(torch.full((batch, 5), TEXT)))


def brute_force(layer: MemoryLayer, x_TD: torch.Tensor) -> torch.Tensor:
    """The layer's output from the scores of every slot, a head and a token at a time."""
    table, out = layer.shared[0].weight, []
    num_half_keys, half_width = layer.num_half_keys, layer.keys.shape[-1]
    for x_D in x_TD:
        y_D = torch.zeros(table.shape[1])
        for head, q_2H in enumerate(layer.query(x_D).view(layer.num_heads, 2, half_width)):
            k_2NH = layer.keys[head]
            if layer.key_norm is not None:
                q_2H = q_2H * (q_2H.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
                k_2NH = layer.key_norm(k_2NH) / half_width**0.5
            score = {
                i * num_half_keys + j: q_2H[0] @ k_2NH[0, i] + q_2H[1] @ k_2NH[1, j]
                for i in range(num_half_keys)
                for j in range(num_half_keys)
            }
            best = sorted(score, key=lambda slot: -score[slot].item())[: layer.num_best]
            for slot, weight in zip(best, torch.stack([score[slot] for slot in best]).softmax(0), strict=True):
                y_D = y_D + weight * table[slot]
        out.append(y_D if layer.gate is None else layer.down(y_D * F.silu(layer.gate(x_D))))
    return torch.stack(out)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_memory_equals_brute_force_over_all_slots(gated, normalised):
    layer = memory_layers(build(memory_gate=gated, memory_query_key_norm=normalised))[0]
    x_TD = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x_TD), brute_force(layer, x_TD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_equal_those_of_brute_force(gated):
    layer = memory_layers(build(memory_gate=gated))[0]
    parameters = [*layer.parameters(), layer.shared[0].weight]
    x_TD = torch.randn(6, 16, requires_grad=True)
    cotangent_TD = torch.randn(6, 16)
    found = torch.autograd.grad(layer(x_TD), [x_TD, *parameters], cotangent_TD)
    expected = torch.autograd.grad(brute_force(layer, x_TD), [x_TD, *parameters], cotangent_TD)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_best", [1, 2, 5, 8])
def test_no_best_pair_is_left_out_of_the_candidates(num_best):
    generator = torch.Generator().manual_seed(num_best)
    kept = set(zip(*candidates(num_best).tolist(), strict=True))
    used = set()
    for _ in range(300):
        first, second = (torch.randn(num_best, generator=generator).sort(descending=True).values for _ in range(2))
        best = (first[:, None] + second).flatten().topk(num_best).indices.tolist()
        used |= {divmod(index, num_best) for index in best}
    assert used <= kept
    assert len(kept) < num_best**2 or num_best == 1


def test_layers_of_a_model_share_the_values_and_two_models_do_not():
    model, other = build(), build()
    layers = memory_layers(model)
    assert len(layers) == 3 and all(layer.shared[0] is model.memory for layer in layers)
    before = run(other)
    model.memory.weight.data.zero_()
    assert torch.equal(run(other), before)
    assert not torch.allclose(run(model), before)


def test_layers_have_keys_queries_and_projections_of_their_own():
    first, second, _ = memory_layers(build())
    assert not set(first.parameters()) & set(second.parameters())
    assert not torch.allclose(first.keys, second.keys)


def test_tokens_use_many_slots_and_several_each():
    layer = memory_layers(build())[0]
    slots_TK, weights_TK = layer.select(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    assert slots_TK.unique().numel() > 24  # of 36
    assert all(len(set(head.tolist())) == 5 for row in slots_TK for head in row.view(3, 5))
    torch.testing.assert_close(weights_TK.view(-1, 3, 5).sum(-1), torch.ones(200, 3))
    assert weights_TK.max() < 1.0


def test_only_the_values_that_were_looked_up_get_a_gradient():
    model = build(memory_layers=[2], num_half_keys=20)
    looked_up = []
    model.memory.register_forward_hook(lambda module, inputs, output: looked_up.append(inputs[0]))
    run(model, batch=1).square().mul(torch.arange(16)).sum().backward()
    used = torch.zeros(400, dtype=torch.bool)
    used[torch.cat(looked_up).unique()] = True
    assert 5 < used.sum() <= 5 * 15
    assert torch.equal(model.memory.weight.grad.abs().sum(1) > 0, used)


def test_values_learn_at_their_own_rate_and_are_clipped_apart():
    model = build(value_learning_rate_ratio=7.0)
    groups = parameter_groups(model, weight_decay=0.1)
    apart = [group for group in groups if group["clipped_apart"]]
    assert [(len(group["params"]), group["learning_rate_ratio"], group["weight_decay"]) for group in apart] == [
        (1, 7.0, 0.1)
    ]
    assert apart[0]["params"][0] is model.memory.weight
    assert all(group["learning_rate_ratio"] == 1.0 for group in groups if not group["clipped_apart"])

    run(model).square().mul(torch.randn(16)).sum().backward()
    model.memory.weight.grad.mul_(1e4)
    others = [p for group in groups if not group["clipped_apart"] for p in group["params"]]
    before = torch.cat([p.grad.flatten() for p in others])
    before = before / max(1.0, before.norm().item())
    clip_gradients(torch.optim.AdamW([{**group, "lr": 1e-3} for group in groups]), 1.0)
    assert model.memory.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in others]), before, rtol=1e-3, atol=1e-6)


def test_weights_start_as_published():
    model = build(width=64, num_half_keys=32, key_width=32, num_best_slots=4)
    layer = memory_layers(model)[0]
    assert model.memory.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert layer.keys.abs().max().item() == pytest.approx(32**-0.5, rel=0.02)
    assert layer.query.weight.abs().max().item() == pytest.approx((6 / (64 + 3 * 32)) ** 0.5, rel=0.02)


def test_a_saved_model_holds_the_table_once_and_loads_again(tmp_path):
    model, other = build(), build(seed=1)
    save_model(tmp_path, model.state_dict(), dataclasses.asdict(model.config))
    names = [name for name, tensor in load_file(tmp_path / "model.safetensors").items() if tensor.shape == (36, 16)]
    assert names == ["memory.weight"]
    load_weights(tmp_path, other)
    assert torch.equal(run(model), run(other))


def test_the_configuration_comes_back_from_its_dictionary():
    for config in (SMALL, MoTMemoryBackbone(memory_layers=[1])):
        assert schema.from_dict("backbone", dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("num_layers", "num_memory_layers", "expected"),
    [
        (24, 3, [4, 12, 20]),
        (2, 3, [1]),
        (1, 3, [0]),
        (4, 3, [1, 3]),
        (4, 1, [2]),
        (6, 3, [1, 3, 5]),
        (12, 3, [2, 6, 10]),
    ],
)
def test_memory_layers_are_spread_around_the_middle(num_layers, num_memory_layers, expected):
    config = dataclasses.replace(SMALL, num_layers=num_layers, num_memory_layers=num_memory_layers)
    assert layers_with_memory(config) == expected


def test_more_values_cost_parameters_and_only_the_scores_of_half_keys_in_operations():
    lengths = [10, 0, 0, 0, 0]
    small, large = build(num_half_keys=10), build(num_half_keys=20)
    assert large.memory.weight.numel() == 4 * small.memory.weight.numel()
    # Three layers, three heads, keys 8 wide, and ten more half keys a half: two operations each.
    assert large.forward_flops(lengths) - small.forward_flops(lengths) == 3 * 3 * 2 * 10 * 8 * 10


def test_experts_of_modalities_look_up_by_themselves_in_one_table():
    torch.manual_seed(0)
    model = build_backbone(MoTMemoryBackbone(width=16, num_layers=2, num_heads=2, num_half_keys=6, key_width=8))
    layers = memory_layers(model)
    assert len(layers) == 3 and all(layer.shared[0] is model.memory for layer in layers)
    tokens_BSD = torch.randn(2, 6, 16)
    layout = Layout.of(torch.tensor([[TEXT, TEXT, TEXT, IMAGE, IMAGE, IMAGE]] * 2))
    before = model(tokens_BSD, layout)
    layers[1].down.weight.data.zero_()  # the images' in the only memory layer, which is the last
    after = model(tokens_BSD, layout)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_layers": [6]}, "memory_layers"),
        ({"memory_layers": [1, 1]}, "memory_layers"),
        ({"key_width": 7}, "even"),
        ({"num_best_slots": 7}, "num_best_slots"),
        ({"num_memory_heads": 0}, "num_memory_heads"),
        ({"value_learning_rate_ratio": 0.0}, "value_learning_rate_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_narrow_expert_of_actions_cannot_read_wide_values():
    with pytest.raises(ValueError, match="action_width"):
        build_backbone(MoTMemoryBackbone(action_width=64))
