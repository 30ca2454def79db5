import pytest
import torch
import torch.nn.functional as F

from lapa.quantizer import transformer
from lapa.quantizer.base import build_quantizer
from lapa.quantizer.transformer import Attention, DisplacementHead, Layer, Motion, attend, attend_to_two
from lapa.schema import FSQCodebook, TransformerQuantizer

SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "num_heads": 2, "latent_dim": 8, "num_keypoints": 8}
SMALL |= {"num_spatial_layers": 2, "num_temporal_layers": 2, "num_decoder_layers": 1}


def small_quantizer(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build_quantizer(TransformerQuantizer(**SMALL | changes), FSQCodebook(code_length=2))


def away_from_the_start(quantizer):
    """With every weight off its initial value, so that zeroed branches count."""
    for parameter in quantizer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return quantizer


def value_and_gradients(function, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    value.float().square().sum().backward()
    return [value, *(x.grad for x in inputs)]


def test_attention_to_two_keys_is_softmax_attention():
    torch.manual_seed(0)
    q, k1, v1, k2, v2 = (torch.randn(3, 5, 2, 4, dtype=torch.float64) for _ in range(5))

    def by_softmax(q, k1, v1, k2, v2):
        keys, values = torch.stack([k1, k2], -2), torch.stack([v1, v2], -2)
        return F.scaled_dot_product_attention(q[..., None, :], keys, values)[..., 0, :]

    inputs = (3 * q, k1, v1, k2, v2)
    for closed, softmax in zip(
        value_and_gradients(attend_to_two, inputs), value_and_gradients(by_softmax, inputs), strict=True
    ):
        torch.testing.assert_close(closed, softmax)


@pytest.mark.parametrize("most_keys", [0, 256], ids=["fused", "written out"])
def test_attention_in_bfloat16_is_that_in_float32(most_keys, monkeypatch):
    monkeypatch.setattr(transformer, "MOST_KEYS_WRITTEN_OUT", most_keys)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 7, 8).bfloat16() for _ in range(3))
    low = value_and_gradients(attend, (q, k, v))
    high = value_and_gradients(F.scaled_dot_product_attention, (q.float(), k.float(), v.float()))
    for one, other in zip(low, high, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_a_patch_of_the_second_frame_reads_itself_and_its_like_in_the_first():
    torch.manual_seed(0)
    attention = Attention(16, 2)
    second, first = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    query, key, value = attention.query_key_value.weight.chunk(3)
    both = torch.stack([first, second], 2)
    q = attention.query_norm((second @ query.T).unflatten(-1, (2, 8)))
    k = attention.key_norm((both @ key.T).unflatten(-1, (2, 8)))
    weights = (torch.einsum("bpns,bptns->bptn", q, k) * 8**-0.5).softmax(2)
    read = torch.einsum("bptn,bptns->bpns", weights, (both @ value.T).unflatten(-1, (2, 8)))
    torch.testing.assert_close(attention(second, first), attention.out(read.flatten(2)))


def test_a_clip_gives_the_codes_of_its_pairs():
    quantizer = away_from_the_start(small_quantizer()).eval()
    clip = torch.rand(6, 3, 32, 32)
    pairs = torch.tensor([[0, 2], [1, 3], [2, 4], [3, 5], [5, 0]])
    codes, latents = quantizer.encode_clip(clip, pairs)
    expected_codes, expected_latents = quantizer.encode(clip[pairs])
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(latents, expected_latents)


def test_features_of_the_first_frame_do_not_see_the_second():
    quantizer = away_from_the_start(small_quantizer()).eval()
    seen = []
    quantizer.displacement.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    frames = torch.rand(4, 2, 3, 32, 32)
    other = torch.cat([frames[:, :1], torch.rand(4, 1, 3, 32, 32)], 1)
    assert not torch.allclose(quantizer.infer(frames), quantizer.infer(other))
    torch.testing.assert_close(seen[0][0], seen[1][0])


def test_a_displacement_is_the_same_wherever_it_began():
    torch.manual_seed(0)
    head = DisplacementHead(width=6, grid=5, num_keypoints=4, code_length=2, latent_dim=3)
    still, moving = torch.randn(6), torch.randn(6)

    def features(row: int, column: int) -> torch.Tensor:
        x = still.expand(5, 5, 6).clone()
        x[row, column] = moving
        return x.flatten(0, 1)[None]

    one, other = head(features(0, 1), features(2, 2)), head(features(2, 3), features(4, 4))
    assert one.shape == (1, 2, 3)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(head(features(2, 2), features(0, 1)), -one)
    torch.testing.assert_close(head(features(1, 1), features(1, 1)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_already_use_the_codebook(seed):
    """Latents far below the epsilon of the codebook's normalisation would all get one code, and never leave it."""
    quantizer = small_quantizer(seed).train()
    generator = torch.Generator().manual_seed(0)
    frames = torch.full((48, 2, 3, 32, 32), 0.2)
    for pair in frames:
        for frame, (x, y) in zip(pair, torch.randint(0, 26, (2, 2), generator=generator).tolist(), strict=True):
            frame[:, y : y + 6, x : x + 6] = 0.9
    latents = quantizer.infer(frames)
    assert latents.flatten(1).std(0).min() > 0.05
    for _ in range(20):
        codes, _ = quantizer.encode(frames)
    assert len(codes.unique(dim=0)) > 20


def test_a_layer_that_starts_as_identity_learns():
    layer = Layer(16, 2)
    layer.start_as_identity()
    x, first = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(layer(x, first_BPW=first), x)
    layer(x, first_BPW=first).square().sum().backward()
    assert layer.attention.out.weight.grad.abs().sum() > 0 and layer.narrow.weight.grad.abs().sum() > 0


def test_a_motion_moves_the_image_by_the_bells_offset():
    motion = Motion(latent_width=2, image_size=16, radius=0.25)
    # Rows are taken from 2 pixels below, columns from 1 to the left; the bells are as sharp as a pixel.
    motion.bells.weight.data.zero_()
    motion.bells.bias.data.copy_(torch.tensor([2 / 4, -1 / 4, 100.0, 100.0]))
    images = torch.rand(2, 3, 16, 16)
    moved = motion(images, torch.zeros(2, 2))
    torch.testing.assert_close(moved[..., :14, 1:], images[..., 2:, :15])


def test_the_latent_action_changes_the_prediction_from_the_start():
    quantizer = small_quantizer()
    first, latents = torch.rand(2, 3, 32, 32), torch.randn(2, 2, 8).requires_grad_()
    predicted = quantizer.decode(first, latents)
    assert 0.001 < (predicted - first).abs().mean() < 0.1
    predicted.square().sum().backward()
    assert latents.grad.abs().sum() > 0


def test_a_compiled_layer_is_the_layer():
    torch.manual_seed(0)
    layer = Layer(16, 2, condition_width=4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    inputs = (torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(2, 4))
    for one, other in zip(
        value_and_gradients(lambda x, first, condition: compiled(x, first_BPW=first, condition_BV=condition), inputs),
        value_and_gradients(lambda x, first, condition: layer(x, first_BPW=first, condition_BV=condition), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"multiple of model\.patch_size = 12"):
        small_quantizer(patch_size=12)
    with pytest.raises(ValueError, match="multiple of num_heads = 5"):
        small_quantizer(num_heads=5)
