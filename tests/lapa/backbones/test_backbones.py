"""What every backbone of the zoo has to do, whatever it is made of."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapa import schema
from lapa.backbones.base import (
    BACKBONES,
    IMAGE,
    LATENT_ACTION,
    NUM_MODALITIES,
    ROBOT_ACTION,
    TEXT,
    Cache,
    Layout,
    attention_mask,
    build_backbone,
)
from lapa.schema import (
    Backbone,
    DenseBackbone,
    HuggingFaceBackbone,
    MemoryBackbone,
    MoMaBackbone,
    MoTBackbone,
    MoTMemoryBackbone,
)

MODALITIES = [TEXT, TEXT, TEXT, IMAGE, IMAGE, IMAGE, IMAGE, LATENT_ACTION, LATENT_ACTION, ROBOT_ACTION]
SMALL = {
    "dense": DenseBackbone(width=32, num_layers=2, num_heads=4),
    "dense-rotary-grouped": DenseBackbone(
        width=32, num_layers=2, num_heads=4, num_key_value_heads=2, rotary_theta=1e4, query_key_norm=False
    ),
    "mot": MoTBackbone(width=32, num_layers=2, num_heads=4),
    "mot-post-rotary-narrow": MoTBackbone(
        width=32, num_layers=2, num_heads=4, norm_placement="post", rotary_theta=1e4, merged=[], action_width=16
    ),
    "mot-feed-forward": MoTBackbone(width=32, num_layers=2, num_heads=4, untie=["feed_forward"]),
    "memory": MemoryBackbone(width=32, num_layers=2, num_heads=4, num_half_keys=8, num_best_slots=4, key_width=16),
    "memory-plain": MemoryBackbone(
        width=32, num_layers=3, num_heads=4, memory_layers=[0, 2], memory_gate=False, memory_query_key_norm=False
    ),
    "mot-memory": MoTMemoryBackbone(width=32, num_layers=2, num_heads=4, num_half_keys=8, key_width=16),
    "huggingface": HuggingFaceBackbone(
        mask="block_causal",
        model_config={
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "moma": MoMaBackbone(width=32, num_layers=2, num_heads=4, num_experts=[3, 4, 2]),
    "moma-mixed-depths": MoMaBackbone(
        width=32,
        num_layers=2,
        num_heads=4,
        groups=[["text", "image", "latent_action", "proprioception", "robot_action"]],
        num_experts=[3],
        router_noise=1.0,
        depth_capacity=0.5,
        rotary_theta=1e4,
    ),
}
every_backbone = pytest.mark.parametrize("name", SMALL)


def build(name: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_backbone(dataclasses.replace(SMALL[name], **changes))


def inputs(batch: int = 2, seed: int = 0, **ids) -> tuple[torch.Tensor, Layout]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BSD = torch.randn(batch, len(MODALITIES), 32, generator=generator)
    return tokens_BSD, Layout.of(torch.tensor(MODALITIES).expand(batch, -1), **ids)


def prefix_blocks(batch: int = 2) -> torch.Tensor:
    return torch.tensor([0 if m in (TEXT, IMAGE) else -1 for m in MODALITIES]).expand(batch, -1)


def test_every_backbone_of_the_table_is_tested_and_can_be_chosen():
    assert {config.name for config in SMALL.values()} >= set(BACKBONES)
    assert set(BACKBONES) == set(schema.GROUPS["backbone"])


@every_backbone
def test_hidden_states_keep_the_shape_of_the_embeddings(name):
    assert build(name)(*inputs()).shape == (2, len(MODALITIES), 32)


@every_backbone
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    # Enough rows and modalities that every expert and memory is used by some token.
    tokens_BSD, layout = inputs(batch=16)
    layout = dataclasses.replace(layout, modality_ids_BS=torch.arange(160).view(16, 10) % NUM_MODALITIES)
    loss = model(tokens_BSD, layout).square().mul(torch.randn(32)).sum()
    auxiliary = model.auxiliary_loss()
    (loss if auxiliary is None else loss + auxiliary).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_backbone
@pytest.mark.parametrize("changed", [4, 9])
def test_a_causal_model_predicts_from_the_past_alone(name, changed):
    model = build(name, mask="causal").eval()
    tokens_BSD, layout = inputs()
    other_BSD = tokens_BSD.clone()
    other_BSD[:, changed] += 1
    before, after = model(tokens_BSD, layout), model(other_BSD, layout)
    torch.testing.assert_close(before[:, :changed], after[:, :changed])
    assert not torch.allclose(before[:, changed], after[:, changed], atol=1e-3)
    # Cutting the sequence short changes nothing for what is left: nothing depends on how much follows.
    torch.testing.assert_close(model(tokens_BSD[:, :changed], layout[:, :changed]), before[:, :changed])


@every_backbone
def test_a_sample_does_not_depend_on_its_batch(name):
    model = build(name).eval()
    tokens_BSD, layout = inputs(batch=4)
    torch.testing.assert_close(model(tokens_BSD, layout)[2:3], model(tokens_BSD[2:3], layout[2:3]))


@every_backbone
def test_decoding_with_a_cache_equals_the_whole_sequence(name):
    model = build(name).eval()
    tokens_BSD, layout = inputs(block_ids_BS=prefix_blocks())
    whole_BSD = model(tokens_BSD, layout)
    cache = Cache()
    parts = [model(tokens_BSD[:, a:b], layout[:, a:b], cache) for a, b in [(0, 7), (7, 8), (8, 10)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BSD, atol=2e-5, rtol=1e-4)
    assert cache.length == 10
    cache.truncate(8)
    torch.testing.assert_close(model(tokens_BSD[:, 8:], layout[:, 8:], cache), whole_BSD[:, 8:], atol=2e-5, rtol=1e-4)


@every_backbone
def test_packed_documents_do_not_see_each_other(name):
    model = build(name).eval()
    tokens_BSD, one = inputs()
    other_BSD, _ = inputs(seed=1)
    packed_BSD = torch.cat([tokens_BSD, other_BSD], dim=1)
    second = dataclasses.replace(one, document_ids_BS=torch.ones_like(one.document_ids_BS))
    hidden_BSD = model(packed_BSD, one.then(second))
    expected_BSD = torch.cat([model(tokens_BSD, one), model(other_BSD, one)], dim=1)
    torch.testing.assert_close(hidden_BSD, expected_BSD, atol=2e-5, rtol=1e-4)


@every_backbone
def test_padding_changes_nothing(name):
    model = build(name).eval()
    tokens_BSD, _ = inputs()
    is_token_BS = torch.ones(2, len(MODALITIES), dtype=torch.bool)
    is_token_BS[0, 1:3] = False
    _, layout = inputs(is_token_BS=is_token_BS)
    other_BSD = tokens_BSD.clone()
    other_BSD[0, 1:3] = 7.0
    before, after = model(tokens_BSD, layout), model(other_BSD, layout)
    torch.testing.assert_close(before[is_token_BS], after[is_token_BS])
    kept = is_token_BS[0].nonzero().flatten()
    alone_BSD = model(tokens_BSD[:1, kept], layout[:1].select(kept[None]))
    torch.testing.assert_close(before[:1, kept], alone_BSD, atol=2e-5, rtol=1e-4)


@every_backbone
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for checkpoint_activations in (False, True):
        model = build(name, checkpoint_activations=checkpoint_activations)
        torch.manual_seed(5)
        model(*inputs(batch=8)).square().mul(torch.randn(32)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_backbone
def test_flops_are_those_that_a_profiler_counts(name):
    # Where experts choose tokens, capacities fix the load in training; afterwards it depends on what the tokens are.
    model = build(name).train(isinstance(SMALL[name], MoMaBackbone))
    tokens_BSD, layout = inputs(batch=1)
    # The fused attention of the CPU is not in the profiler's list; its plain form is.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens_BSD, layout)
    lengths = torch.tensor(MODALITIES).bincount(minlength=NUM_MODALITIES).tolist()
    assert model.forward_flops(lengths) == counter.get_total_flops()


@every_backbone
def test_one_batch_can_be_learned_by_heart(name):
    model = build(name)
    tokens_BSD, layout = inputs(batch=8)
    target_BSD = torch.randn(tokens_BSD.shape, generator=torch.Generator().manual_seed(3))
    head = torch.nn.Linear(32, 32)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(150):
        loss = (head(model(tokens_BSD, layout)) - target_BSD).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0]


@every_backbone
def test_weights_saved_and_loaded_give_the_same_hidden_states(name, tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = build(name).eval(), build(name, seed=1).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(*inputs()), other(*inputs()))


@every_backbone
def test_the_same_seed_builds_the_same_model(name):
    states = [build(name, seed=3).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class TestMasks:
    layout = Layout.of(
        torch.zeros(1, 5),
        block_ids_BS=torch.tensor([[0, 0, -1, 1, 1]]),
        is_token_BS=torch.tensor([[True, False, True, True, True]]),
    )

    def test_causal(self):
        assert attention_mask(self.layout, self.layout, "causal")[0].int().tolist() == [
            [1, 0, 0, 0, 0],
            [0, 1, 0, 0, 0],
            [1, 0, 1, 0, 0],
            [1, 0, 1, 1, 0],
            [1, 0, 1, 1, 1],
        ]

    def test_a_block_sees_itself_both_ways(self):
        assert attention_mask(self.layout, self.layout, "block_causal")[0, 3:].int().tolist() == [[1, 0, 1, 1, 1]] * 2

    def test_bidirectional(self):
        assert attention_mask(self.layout, self.layout, "bidirectional")[0, 0].int().tolist() == [1, 0, 1, 1, 1]

    def test_positions_leave_padding_out(self):
        assert self.layout.position_ids_BS.tolist() == [[0, 0, 1, 2, 3]]

    def test_an_unknown_mask_is_refused(self):
        with pytest.raises(ValueError, match="expected causal, bidirectional or block_causal"):
            attention_mask(self.layout, self.layout, "diagonal")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backbone 'sparse'.*dense"):
        build_backbone(Backbone(name="sparse"))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        build_backbone(DenseBackbone(width=30, num_heads=4))
