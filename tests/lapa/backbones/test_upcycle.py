"""Experts that begin as copies."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lapa.backbones.base import build_backbone
from lapa.backbones.moma import MixtureOfExperts
from lapa.backbones.upcycle import upcycle
from lapa.latent_vla import pretrain
from lapa.schema import DenseBackbone, MemoryBackbone, MoMaBackbone
from lapa.trainer import read_log
from tests.lapa.backbones.test_moma import inputs
from tests.lapa.latent_vla.conftest import write_labels, write_store
from tests.lapa.latent_vla.test_pretrain import config as pretrain_config

DENSE = DenseBackbone(width=16, num_layers=2, num_heads=2)
ONE_EXPERT = MoMaBackbone(width=16, num_layers=2, num_heads=2, num_experts=[1, 1, 1])
MANY = dataclasses.replace(ONE_EXPERT, num_experts=[2, 4, 1])


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    return build_backbone(config)


@pytest.mark.parametrize("source", [DENSE, ONE_EXPERT], ids=["dense", "one-expert"])
def test_with_one_expert_a_group_the_upcycled_model_is_its_source(source):
    trained, target = build(source, seed=3), build(ONE_EXPERT)
    target.load_state_dict(upcycle(trained.state_dict(), source, ONE_EXPERT, seed=0))
    torch.testing.assert_close(target.eval()(*inputs()), trained.eval()(*inputs()))


@pytest.mark.parametrize("source", [DENSE, ONE_EXPERT], ids=["dense", "one-expert"])
def test_a_token_of_one_expert_with_an_undecided_router_is_the_sources(source):
    trained, target = build(source, seed=3), build(MANY)
    target.load_state_dict(upcycle(trained.state_dict(), source, MANY, seed=0))
    x_BSD, layout = inputs()
    expected_BSD = trained.blocks[1].feed_forward(x_BSD, layout)
    mixture = target.eval().blocks[1].feed_forward
    assert isinstance(mixture, MixtureOfExperts)
    mixture.router.weight.data.zero_()
    for router in mixture.auxiliary.values():
        router.hidden.weight.data.zero_()
        router.output.bias.data.fill_(-1.0)[0] = 1.0  # the first expert takes everything
    torch.testing.assert_close(mixture(x_BSD, layout), expected_BSD)


def test_depths_can_be_added_to_a_model_without():
    trained = build(ONE_EXPERT, seed=3)
    config = dataclasses.replace(MANY, depth_capacity=0.25)
    target = build(config)
    target.load_state_dict(upcycle(trained.state_dict(), ONE_EXPERT, config, seed=0))
    assert torch.equal(target.blocks[0].block.attention.output.weight, trained.blocks[0].attention.output.weight)


def test_routers_are_new_and_the_seeds_own():
    state = build(DENSE).state_dict()
    one, same, other = (upcycle(state, DENSE, MANY, seed=seed) for seed in (1, 1, 2))
    name = "blocks.0.feed_forward.router.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (MANY, MANY, "one expert a group"),
        (MemoryBackbone(width=16, num_heads=2, num_half_keys=4), MANY, "expected a dense backbone"),
        (DENSE, DENSE, "only moma can be upcycled"),
        (DENSE, dataclasses.replace(MANY, width=32), "choose the same width"),
        (DENSE, dataclasses.replace(MANY, num_layers=3), "choose the same width"),
        (
            ONE_EXPERT,
            dataclasses.replace(
                MANY,
                groups=[["text", "image", "latent_action", "proprioception", "robot_action"]],
                num_experts=[8],
            ),
            "within an old one",
        ),
    ],
)
def test_what_does_not_fit_is_refused(source, config, message):
    with pytest.raises(ValueError, match=message):
        upcycle(build(source).state_dict(), source, config, seed=0)


def test_pretraining_can_begin_with_another_pretraining(tmp_path):
    store = write_store(tmp_path / "store")
    labels = write_labels(tmp_path / "labels", store)
    dense = pretrain_config(tmp_path / "dense", store, labels, num_steps=30)
    pretrain.run(dense)
    random = pretrain_config(tmp_path / "random", store, labels, num_steps=2)
    random.backbone = MoMaBackbone(width=32, num_layers=1, num_heads=2, num_experts=[2, 2, 1])
    upcycled = dataclasses.replace(random, init_from=dense.output_dir, output_dir=str(tmp_path / "upcycled"))
    losses = []
    for config in (upcycled, random):
        pretrain.run(config)
        losses.append(next(read_log(Path(config.output_dir) / "log.jsonl"))["loss"])
    assert losses[0] < losses[1] - 0.4
    with pytest.raises(ValueError, match="only the backbone may differ"):
        pretrain.run(dataclasses.replace(upcycled, image_tokenizer="grid", output_dir=str(tmp_path / "other")))
