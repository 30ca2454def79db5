import dataclasses

import pytest
import torch

from lapa.backbones.base import (
    IMAGE,
    LATENT_ACTION,
    NUM_MODALITIES,
    PROPRIOCEPTION,
    ROBOT_ACTION,
    TEXT,
    Cache,
    Layout,
    build_backbone,
)
from lapa.backbones.mot import expert_widths, modality_groups
from lapa.schema import DenseBackbone, MoTBackbone

SIZES = {"width": 32, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2, "rotary_theta": 1e4}
# Rows with other modalities in other places, and a modality that only one of them has.
MODALITY_IDS = torch.tensor([[TEXT, IMAGE, IMAGE, TEXT, LATENT_ACTION, IMAGE], [IMAGE, TEXT, TEXT, TEXT, IMAGE, IMAGE]])


def inputs() -> tuple[torch.Tensor, Layout]:
    tokens_BSD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    return tokens_BSD, Layout.of(MODALITY_IDS, block_ids_BS=torch.tensor([[0, 0, 0, -1, -1, -1]] * 2))


def dense_and_identical_experts(**options):
    """A dense transformer with random gains, and one of experts that are all copies of it."""
    torch.manual_seed(0)
    dense = build_backbone(DenseBackbone(**SIZES)).eval()
    for weight in dense.parameters():
        if weight.ndim == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    mot = build_backbone(MoTBackbone(**SIZES, **options)).eval()
    of_dense = dense.state_dict()
    state = {}
    for name in mot.state_dict():
        parts = [part for part in name.replace("norms.", "norm.").split(".")]
        # blocks.<layer>.<part>.<expert>.<weight> and norms.<expert>.weight, without the expert
        expert = 1 if parts[0] == "norm" else next(i for i, part in enumerate(parts) if i > 1 and part.isdigit())
        state[name] = of_dense[".".join(parts[:expert] + parts[expert + 1 :])]
    mot.load_state_dict(state)
    return dense, mot


@pytest.mark.parametrize(
    "untie", [["attention", "feed_forward", "norms"], ["feed_forward"], ["norms", "attention"], []]
)
@pytest.mark.parametrize("merged", [[], [["text", "image"]]])
def test_identical_experts_equal_the_dense_transformer(untie, merged):
    dense, mot = dense_and_identical_experts(untie=untie, merged=merged)
    tokens_BSD, layout = inputs()
    torch.testing.assert_close(mot(tokens_BSD, layout), dense(tokens_BSD, layout), atol=1e-5, rtol=1e-5)


def test_identical_experts_decode_as_the_dense_transformer():
    dense, mot = dense_and_identical_experts()
    tokens_BSD, layout = inputs()
    hidden = []
    for model in (dense, mot):
        cache = Cache()
        hidden.append([model(tokens_BSD[:, a:b], layout[:, a:b], cache) for a, b in [(0, 3), (3, 4), (4, 6)]])
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


def test_gradients_of_identical_experts_add_up_to_those_of_the_dense_transformer():
    dense, mot = dense_and_identical_experts(merged=[])
    tokens_BSD, layout = inputs()
    for model in (dense, mot):
        model(tokens_BSD, layout).square().mul(
            torch.randn(32, generator=torch.Generator().manual_seed(2))
        ).sum().backward()
    for expected, found in (
        (dense.blocks[0].attention.query_key_value, mot.blocks[0].attention.query_key_value),
        (dense.blocks[0].attention.query_norm, mot.blocks[0].attention.query_norm),
        (dense.blocks[1].feed_forward.down, [module.down for module in mot.blocks[1].feed_forward]),
        (dense.norm, mot.norms),
    ):
        total = sum(module.weight.grad for module in found if module.weight.grad is not None)
        torch.testing.assert_close(total, expected.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "part", ["attention.query_key_value", "attention.output", "attention.query_norm", "feed_forward"]
)
def test_a_modality_has_weights_of_its_own(part):
    torch.manual_seed(0)
    mot = build_backbone(MoTBackbone(**{**SIZES, "num_layers": 1}, mask="causal")).eval()
    tokens_BSD, layout = inputs()
    before_BSD = mot(tokens_BSD, layout)
    with torch.no_grad():
        for weight in mot.blocks[0].get_submodule(f"{part}.{IMAGE}").parameters():
            weight.mul_(1 + torch.rand(weight.shape))
    after_BSD = mot(tokens_BSD, layout)
    changed_BS = ~torch.isclose(before_BSD, after_BSD, atol=1e-6).all(-1)
    # A first token attends to itself alone, whatever its query.
    assert changed_BS[:, 1:][MODALITY_IDS[:, 1:] == IMAGE].all()
    # The first text token of the first row comes before every image token.
    assert not changed_BS[0, 0]
    # What others see of an image changes with its keys and values alone.
    assert bool(changed_BS[0, 3]) == (part == "attention.query_key_value")


def test_an_expert_without_tokens_gets_no_gradient():
    mot = build_backbone(MoTBackbone(**SIZES, merged=[]))
    mot(*inputs()).sum().backward()
    assert mot.blocks[0].feed_forward[ROBOT_ACTION].down.weight.grad is None
    assert mot.blocks[0].feed_forward[LATENT_ACTION].down.weight.grad is not None


def test_experts_multiply_the_parameters_and_not_the_flops():
    dense = build_backbone(DenseBackbone(**SIZES))
    mot = build_backbone(MoTBackbone(**SIZES, merged=[]))
    assert mot.num_parameters() == NUM_MODALITIES * dense.num_parameters()
    assert mot.forward_flops([3, 4, 1, 1, 2]) == dense.forward_flops([3, 4, 1, 1, 2])


def test_a_narrower_action_expert_costs_less_and_attends_with_the_same_heads():
    config = MoTBackbone(**SIZES, action_width=16)
    assert expert_widths(config) == [32, 32, 16]
    narrow, full = build_backbone(config), build_backbone(dataclasses.replace(config, action_width=0))
    assert narrow.blocks[0].attention.query_key_value[2].weight.shape == (64, 16)
    assert narrow.forward_flops([0, 0, 0, 0, 9]) < full.forward_flops([0, 0, 0, 0, 9])
    assert narrow.forward_flops([5, 9, 0, 0, 0]) == full.forward_flops([5, 9, 0, 0, 0])
    assert narrow(*inputs()).shape == (2, 6, 32)


def test_norms_after_each_part_keep_the_update_at_unit_scale():
    torch.manual_seed(0)
    mot = build_backbone(MoTBackbone(**SIZES, norm_placement="post")).eval()
    updates = []
    for norm in mot.blocks[0].feed_forward_norm:
        norm.register_forward_hook(lambda module, inputs, output: updates.append(output))
    mot(*inputs())
    rms = torch.cat(updates).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-3, rtol=0)


def test_compiled_it_gives_the_same_hidden_states_and_gradients():
    torch.manual_seed(0)
    mot = build_backbone(MoTBackbone(**{**SIZES, "num_layers": 1}))
    found = []
    for model in (mot, torch.compile(mot, backend="eager")):
        hidden_BSD = model(*inputs())
        mot.zero_grad()
        hidden_BSD.square().mul(torch.arange(32)).sum().backward()
        found.append([hidden_BSD, *(weight.grad for weight in mot.parameters())])
    torch.testing.assert_close(found[0], found[1])


def test_modalities_that_are_not_merged_have_an_expert_each():
    assert modality_groups(MoTBackbone()) == [[TEXT], [IMAGE], [LATENT_ACTION, PROPRIOCEPTION, ROBOT_ACTION]]
    assert modality_groups(MoTBackbone(merged=[["image", "text"]])) == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"untie": ["embeddings"]}, r"backbone.untie is \['embeddings'\], expected some of"),
        ({"merged": [["sound"]]}, "expected lists of different names among"),
        ({"merged": [["text"], ["text", "image"]]}, "expected lists of different names among"),
        ({"norm_placement": "none"}, "expected pre or post"),
        ({"action_width": 16, "untie": ["feed_forward"]}, "shares no weights with another"),
        (
            {"action_width": 16, "merged": [["text", "latent_action", "proprioception", "robot_action"]]},
            "leaves no expert of actions alone",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(MoTBackbone(**{**SIZES, **options}))
