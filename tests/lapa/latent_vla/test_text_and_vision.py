import numpy as np
import pytest
import torch

from lapa.latent_vla.vision import build_image_tokenizer, random_shift
from lapa.text import PADDING_ID, count_longer, encode_text, word_id

SUITE_TEXT = (
    "move push slide go reach touch point bring make put to the next against at and arm over together red blue green "
    "yellow cube moon star pentagon left right top bottom centre center corner side up down above below away from "
    "of apart separate between near far block blocks table"
)


def test_words_of_the_suite_have_ids_of_their_own():
    assert len({word_id(word) for word in SUITE_TEXT.split()}) == len(SUITE_TEXT.split())


def test_case_and_punctuation_do_not_matter():
    assert encode_text(["Go to the RED moon!"], 8).tolist() == encode_text(["go to the red moon"], 8).tolist()


def test_text_is_padded_and_cut():
    ids = encode_text(["red moon", "a b c d e", ""], 4)
    assert ids.shape == (3, 4)
    assert (ids != PADDING_ID).sum(1).tolist() == [2, 4, 0]
    assert count_longer(["red moon", "a b c d e"], 4) == 1


@pytest.mark.parametrize(("name", "num_tokens"), [("keypoints", 16), ("grid", 16)])
def test_tokenizers_give_tokens_and_gradients(name, num_tokens):
    tokenizer = build_image_tokenizer(name, image_size=32, width=32)
    tokens = tokenizer(torch.rand(2, 3, 32, 32), torch.randn(2, 32))
    assert tokens.shape == (2, num_tokens, 32) and tokenizer.num_tokens == num_tokens
    torch.nn.init.normal_(tokenizer.stem.blocks[0].second[-1].weight)
    tokenizer(torch.rand(2, 3, 32, 32), torch.randn(2, 32)).square().sum().backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_keypoints_depend_on_the_instruction_and_the_grid_does_not():
    images = torch.rand(1, 3, 32, 32)
    for name, depends in (("keypoints", True), ("grid", False)):
        tokenizer = build_image_tokenizer(name, image_size=32, width=32)
        # A residual branch starts at zero, so that a new model ignores the instruction.
        for block in tokenizer.stem.blocks:
            torch.nn.init.normal_(block.second[-1].weight)
        one, other = tokenizer(images, torch.randn(1, 32)), tokenizer(images, torch.randn(1, 32))
        assert torch.allclose(one, other) is not depends


def test_a_keypoint_is_right_and_down_of_the_centre(monkeypatch):
    tokenizer = build_image_tokenizer("keypoints", 32, 32)
    logits = torch.zeros(1, 16, 8, 8)
    logits[:, :, 1, 7] = 100.0  # second row, last column
    monkeypatch.setattr(tokenizer.maps, "forward", lambda features, instruction: logits.flatten(2))
    places = tokenizer.places(torch.rand(1, 3, 32, 32), torch.randn(1, 32))
    torch.testing.assert_close(places, torch.tensor([0.875, -0.625]).expand(1, 16, 2))


def test_wrong_tokenizer_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown image_tokenizer 'pixels'.*grid.*keypoints"):
        build_image_tokenizer("pixels", 64, 128)
    with pytest.raises(ValueError, match="image_size is 60"):
        build_image_tokenizer("grid", 60, 128)


def test_random_shift_moves_each_image_and_repeats_the_border():
    frames = np.zeros((64, 16, 16, 3), np.uint8)
    frames[:, 8, 8] = 255
    shifted = random_shift(frames, 3, np.random.default_rng(0))
    assert shifted.shape == frames.shape and (shifted.max((1, 2, 3)) == 255).all()
    where = {tuple(np.argwhere(image[..., 0])[0]) for image in shifted}
    assert len(where) > 20 and all(5 <= row <= 11 and 5 <= column <= 11 for row, column in where)
    assert (random_shift(np.full((4, 8, 8, 3), 9, np.uint8), 3, np.random.default_rng(0)) == 9).all()
    assert (random_shift(frames, 3, np.random.default_rng(0)) == shifted).all()
