import pytest
import torch

from lapa.backbones.routing import grouped_linear, route

GROUP_IDS = torch.tensor([[2, 0, 0, 2, 3], [0, 3, 2, 2, 2]])  # group 1 is empty
NUM_GROUPS = 4


def test_tokens_are_sorted_by_group_and_keep_their_order_within_one():
    routing = route(GROUP_IDS, NUM_GROUPS)
    assert routing.lengths == [3, 0, 5, 2]
    assert routing.order_T.tolist() == [1, 2, 5, 0, 3, 7, 8, 9, 4, 6]


def test_splitting_gives_each_group_its_rows_and_merging_undoes_it():
    routing = route(GROUP_IDS, NUM_GROUPS)
    x_BSD = torch.randn(2, 5, 3)
    segments = routing.split(x_BSD)
    for group, segment_TD in enumerate(segments):
        assert torch.equal(segment_TD, x_BSD[GROUP_IDS.eq(group)])
    assert torch.equal(routing.merge(segments), x_BSD)


def test_gradients_of_splitting_and_merging_are_exact():
    routing = route(GROUP_IDS, NUM_GROUPS)
    x_BSD = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(s * (i + 1) for i, s in enumerate(routing.split(x))), x_BSD)
    segments = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in routing.lengths]
    assert torch.autograd.gradcheck(lambda *rows: routing.merge(rows).square(), segments)


def test_grouped_linear_multiplies_each_group_with_its_own_matrix():
    routing = route(GROUP_IDS, NUM_GROUPS)
    x_BSD, weights_MDF = torch.randn(2, 5, 3), torch.randn(NUM_GROUPS, 3, 6, requires_grad=True)
    out_TF = grouped_linear(torch.cat(routing.split(x_BSD)), weights_MDF, routing.lengths)
    expected_BSF = torch.einsum("bsd,bsdf->bsf", x_BSD, weights_MDF[GROUP_IDS])
    torch.testing.assert_close(routing.merge(out_TF.split(routing.lengths)), expected_BSF)
    out_TF.square().sum().backward()
    assert weights_MDF.grad[1].abs().sum() == 0 and all(weights_MDF.grad[[0, 2, 3]].abs().sum((1, 2)) > 0)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit 4 rows and 2 matrices"):
        grouped_linear(torch.zeros(4, 3), torch.zeros(2, 3, 3), [1, 2])
