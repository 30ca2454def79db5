import pytest
import torch

from policies.lapa.real_time import blend_chunks

NEW = torch.full((1, 4, 2), 5.0)


def test_without_an_old_chunk_nothing_changes():
    assert torch.equal(blend_chunks(NEW, None, 2), NEW)
    assert torch.equal(blend_chunks(NEW, torch.zeros(10, 2), 2), NEW)


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 4, 9])
def test_actions_under_way_stay_and_the_rest_moves_over_to_the_new_ones(delay):
    left = torch.cat([torch.ones(3, 2), torch.zeros(7, 2)])
    blended = blend_chunks(NEW, left, delay)[0, :, 0]
    assert (blended[: min(delay, 3)] == 1).all()
    assert blended[3] == 5
    assert (blended.diff() >= 0).all() and (delay >= 3 or blended[2] > 1)


def test_more_is_left_than_the_new_chunk_holds():
    assert torch.equal(blend_chunks(NEW, torch.ones(10, 2), 10), torch.ones(1, 4, 2))
