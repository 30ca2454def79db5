"""A block that takes some tokens of a sequence, and what the others keep."""

import torch

from lapa.backbones.base import Cache, Layout, attention_mask
from lapa.backbones.dense import Attention, Block, FeedForward
from lapa.backbones.mixture_of_depths import DepthRoutedBlock
from lapa.schema import DenseBackbone

CONFIG = DenseBackbone(width=16, num_heads=2)
SLOT = 7


def build(capacity: float = 0.25) -> DepthRoutedBlock:
    torch.manual_seed(0)
    return DepthRoutedBlock(CONFIG, Block(CONFIG, Attention(CONFIG, 0), FeedForward(CONFIG)), capacity, SLOT)


def sequence(batch: int = 2, length: int = 8, **ids) -> tuple[torch.Tensor, Layout, torch.Tensor]:
    torch.manual_seed(1)
    layout = Layout.of(torch.zeros(batch, length), **ids)
    return torch.randn(batch, length, 16), layout, attention_mask(layout, layout, "causal")[:, None]


def test_training_changes_a_quarter_of_each_sequence():
    x_BSD, layout, mask = sequence()
    changed_BS = (build()(x_BSD, layout, mask, None, None) != x_BSD).any(-1)
    assert changed_BS.sum(1).tolist() == [2, 2]


def test_padding_takes_no_place():
    is_token_BS = torch.ones(2, 8, dtype=torch.bool)
    is_token_BS[0, 4:] = False
    x_BSD, layout, mask = sequence(is_token_BS=is_token_BS)
    changed_BS = (build()(x_BSD, layout, mask, None, None) != x_BSD).any(-1)
    assert changed_BS.sum(1).tolist() == [1, 2] and not changed_BS[0, 4:].any()


def test_chosen_tokens_see_each_other_alone():
    block = build().eval()
    x_BSD, layout, mask = sequence(batch=1)
    chosen_S = torch.tensor([True, False, True, True, False, False, True, False])
    block.auxiliary.forward = lambda x_TD: torch.where(chosen_S, 1.0, -1.0)[:, None]
    out_BSD = block(x_BSD, layout, mask, None, None)
    kept = chosen_S.nonzero().flatten()
    inner = block.block(x_BSD[:, kept], layout[:, kept], mask[:, :, kept][..., kept], None, None)
    weight = block.router(torch.nn.functional.rms_norm(x_BSD, (16,)))[:, kept].sigmoid()
    torch.testing.assert_close(out_BSD[:, kept], x_BSD[:, kept] + weight * (inner - x_BSD[:, kept]))
    assert torch.equal(out_BSD[:, ~chosen_S], x_BSD[:, ~chosen_S])


def test_skipped_tokens_leave_no_keys_in_the_cache():
    block = build().eval()
    x_BSD, layout, _ = sequence(batch=1, length=4)
    block.auxiliary.forward = lambda x_TD: torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    cache = Cache(layout=layout)
    block(x_BSD, layout, attention_mask(layout, layout, "causal")[:, None], None, cache)
    assert cache.keys[0][0, 0].any(-1).tolist() == [True, False, True, False]
    assert cache.keys[SLOT].flatten().tolist() == [True, False, True, False]


def test_a_sequence_that_skips_altogether_stays_as_it_is():
    block = build().eval()
    x_BSD, layout, mask = sequence()
    block.auxiliary.forward = lambda x_TD: torch.full((len(x_TD), 1), -1.0)
    assert torch.equal(block(x_BSD, layout, mask, None, None), x_BSD)
    assert torch.equal(block(x_BSD, layout, mask, None, Cache(layout=layout)), x_BSD)
