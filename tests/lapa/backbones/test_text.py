import torch

from lapa.backbones.text import WordEncoder, build_text_encoder
from lapa.schema import WordText


def summaries(encoder: WordEncoder, *texts: str) -> torch.Tensor:
    return encoder(encoder.encode_text(texts)).summary_BD


def test_the_summary_tells_which_block_goes_to_which():
    texts = "push the red star to the blue cube", "push the blue star to the red cube"
    torch.manual_seed(0)
    one, other = summaries(build_text_encoder(WordText(), 64), *texts)
    assert (one - other).abs().mean() > 0.02
    one, other = summaries(build_text_encoder(WordText(num_layers=0), 64), *texts)
    torch.testing.assert_close(one, other)


def test_the_summary_does_not_see_padding():
    torch.manual_seed(0)
    encoder = build_text_encoder(WordText(), 64)
    alone, beside_a_longer_one = summaries(encoder, "go left"), summaries(encoder, "go left", "push the red star left")
    torch.testing.assert_close(alone[0], beside_a_longer_one[0])


def test_an_empty_instruction_has_an_empty_summary_and_finite_gradients():
    encoder = build_text_encoder(WordText(), 64)
    summary_BD = summaries(encoder, "", "go left")
    assert not summary_BD[0].any()
    summary_BD.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
