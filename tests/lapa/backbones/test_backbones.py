import pytest
import torch

from lapa.backbones.base import IMAGE, LATENT_ACTION, TEXT, build_backbone
from lapa.schema import Backbone, DenseBackbone

SMALL = DenseBackbone(width=32, num_layers=2, num_heads=4)


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BSD = torch.randn(2, 7, 32, generator=generator)
    modality_ids_BS = torch.tensor([TEXT, TEXT, IMAGE, IMAGE, IMAGE, LATENT_ACTION, LATENT_ACTION]).expand(2, -1)
    return tokens_BSD, modality_ids_BS, torch.ones(2, 7, 7, dtype=torch.bool)


def test_hidden_states_keep_the_shape_of_the_embeddings():
    assert build_backbone(SMALL)(*inputs()).shape == (2, 7, 32)


def test_every_parameter_gets_a_gradient():
    model = build_backbone(SMALL)
    model(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_masked_token_changes_nothing_for_those_who_cannot_see_it():
    model = build_backbone(SMALL).eval()
    tokens, ids, mask = inputs()
    mask[:, :6, 6] = False
    changed = tokens.clone()
    changed[:, 6] += 1
    before, after = model(tokens, ids, mask), model(changed, ids, mask)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


def test_the_same_seed_builds_the_same_model():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_backbone(SMALL).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backbone 'sparse'.*dense"):
        build_backbone(Backbone(name="sparse"))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        build_backbone(DenseBackbone(width=30, num_heads=4))
