import pytest
import torch

from lapa.checkpoint import save_model
from lapa.quantizer.base import build_quantizer, load_quantizer
from lapa.schema import ConvolutionalQuantizer, FSQCodebook, NSVQCodebook, TransformerQuantizer

MODELS = [
    ConvolutionalQuantizer(image_size=32, width=16, latent_dim=8, num_keypoints=8),
    ConvolutionalQuantizer(image_size=32, width=16, latent_dim=8, num_keypoints=8, num_motions=2),
    TransformerQuantizer(
        image_size=32,
        patch_size=8,
        width=32,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_decoder_layers=2,
        latent_dim=8,
    ),
]
CODEBOOKS = [FSQCodebook(code_length=2, codebook_size=8), NSVQCodebook(code_length=2, codebook_size=8)]
every_model = pytest.mark.parametrize("model", MODELS, ids=["convolutional", "two motions", "transformer"])
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS, ids=["fsq", "nsvq"])


def pairs_of_a_moving_square(count: int = 8, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    frames = torch.full((count, 2, 3, size, size), 0.2)
    for index in range(count):
        x, y = torch.randint(6, size - 12, (2,), generator=generator).tolist()
        dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
        frames[index, 0, :, y : y + 6, x : x + 6] = 0.9
        frames[index, 1, :, y + dy : y + dy + 6, x + dx : x + dx + 6] = 0.9
    return frames


@every_codebook
@every_model
def test_shapes_and_gradients(model, codebook):
    torch.manual_seed(0)
    quantizer = build_quantizer(model, codebook).train()
    # Forward models start from the copy of the first frame: one step away from it, every weight counts.
    for parameter in quantizer.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    frames = pairs_of_a_moving_square()
    loss, to_log = quantizer.loss(frames)
    loss.backward()
    without = [name for name, p in quantizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert sum(p.grad.abs().sum() > 0 for p in quantizer.parameters()) > 0.9 * len(list(quantizer.parameters()))
    assert all(value == value for value in to_log.values())

    quantizer.eval()
    codes, quantised = quantizer.encode(frames)
    assert codes.shape == (8, 2) and quantised.shape == (8, 2, 8)
    from_codes, from_latents = quantizer.decode(frames[:, 0], codes), quantizer.decode(frames[:, 0], quantised)
    assert from_codes.shape == (8, 3, 32, 32)
    torch.testing.assert_close(from_codes, from_latents, atol=1e-4, rtol=1e-4)


@every_model
def test_starts_near_the_copy_of_the_first_frame(model):
    quantizer = build_quantizer(model, CODEBOOKS[0]).train()
    assert quantizer.loss(pairs_of_a_moving_square())[0] < 1.2


@every_codebook
@every_model
def test_overfits_one_batch(model, codebook):
    torch.manual_seed(0)
    quantizer = build_quantizer(model, codebook).train()
    frames = pairs_of_a_moving_square()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=3e-3)
    for _ in range(150):
        loss, _ = quantizer.loss(frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35


@every_codebook
@every_model
def test_codes_are_equal_after_save_and_load(model, codebook, tmp_path):
    torch.manual_seed(0)
    quantizer = build_quantizer(model, codebook).train()
    frames = pairs_of_a_moving_square()
    quantizer.loss(frames)
    quantizer.eval()
    save_model(tmp_path, quantizer.state_dict(), quantizer.description())
    loaded = load_quantizer(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(quantizer.encode(frames)[0], loaded.encode(frames)[0])
        codes = quantizer.encode(frames)[0]
        assert torch.equal(quantizer.decode(frames[:, 0], codes), loaded.decode(frames[:, 0], codes))


@every_model
def test_other_image_sizes_are_refused(model):
    with pytest.raises(ValueError, match=r"takes \(B, 2, 3, 32, 32\)"):
        build_quantizer(model, CODEBOOKS[0]).encode(torch.zeros(1, 2, 3, 64, 64))
