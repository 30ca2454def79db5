import pytest
import torch

from lapa.latent_vla.patches import build_patches, to_images, to_patches
from lapa.schema import FutureFrame


def test_patches_and_images_are_inverse_and_row_by_row():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    patches = to_patches(images, 4)
    assert torch.equal(to_images(patches, 4, 2), images)
    assert torch.equal(patches[1, 1].view(3, 4, 4), images[1, :, :4, 4:])


@pytest.mark.parametrize("name", ["linear", "unet"])
def test_tokens_and_frames_have_their_shapes_and_every_weight_a_gradient(name):
    patches = build_patches(FutureFrame(patches=name, image_size=16, patch_size=4), 64, in_channels=6)
    # The convolutions of a residual branch begin at zero, and what is before them gets its gradient one step later.
    for name_, weight in patches.named_parameters():
        if name_.endswith("second.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    time_BD = torch.randn(2, 64)
    tokens, skips = patches.embed(torch.randn(2, 6, 16, 16), time_BD)
    frame = patches.read(torch.randn(2, 16, 64) + tokens, time_BD, skips)
    assert tokens.shape == (2, 16, 64) and frame.shape == (2, 3, 16, 16)
    frame.square().sum().backward()
    assert [n for n, p in patches.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_time_is_added_to_each_patch_vector():
    patches = build_patches(FutureFrame(image_size=8, patch_size=4), 64)
    image, time_BD = torch.randn(1, 3, 8, 8), torch.randn(1, 64)
    with_time, without = patches.embed(image, time_BD)[0], patches.embed(image, torch.zeros(1, 64))[0]
    torch.testing.assert_close(with_time - without, time_BD[:, None].expand(1, 4, 64))


def test_equal_patches_at_different_places_differ():
    tokens, _ = build_patches(FutureFrame(image_size=8, patch_size=4), 64).embed(
        torch.zeros(1, 3, 8, 8), torch.zeros(1, 64)
    )
    assert torch.pdist(tokens[0]).min() > 0.1


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patch_size is 5, expected a divisor of image_size, which is 16"):
        build_patches(FutureFrame(image_size=16, patch_size=5), 32)
    with pytest.raises(ValueError, match=r"patch_size is 3, expected 2, 4, 8"):
        build_patches(FutureFrame(patches="unet", image_size=9, patch_size=3), 32)
    with pytest.raises(ValueError, match=r"unknown patches 'conv'.*linear.*unet"):
        build_patches(FutureFrame(patches="conv"), 32)
