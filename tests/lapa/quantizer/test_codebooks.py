import pytest
import torch
from torch import nn

from lapa.quantizer.codebooks import build_codebook, fsq_levels
from lapa.schema import FSQCodebook, NSVQCodebook

CODEBOOKS = [
    NSVQCodebook(code_length=2, codebook_size=8),
    FSQCodebook(code_length=2, codebook_size=8),
    FSQCodebook(code_length=3, codebook_size=64),
]


@pytest.mark.parametrize("config", CODEBOOKS, ids=str)
def test_shapes_types_and_lookup(config):
    torch.manual_seed(0)
    codebook = build_codebook(config, latent_dim=16).train()
    latents = torch.randn(256, config.code_length, 16)
    for _ in range(60):
        codebook(latents)
    quantised, codes = codebook.eval()(latents)
    assert quantised.shape == latents.shape and quantised.dtype == torch.float32
    assert codes.shape == (256, config.code_length) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < config.codebook_size
    torch.testing.assert_close(codebook.lookup(codes), quantised, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CODEBOOKS, ids=str)
def test_gradients_reach_the_latents(config):
    codebook = build_codebook(config, latent_dim=16).train()
    latents = torch.randn(32, config.code_length, 16, requires_grad=True)
    quantised, _ = codebook(latents)
    (quantised * torch.randn_like(quantised)).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in codebook.named_parameters() if "bias" not in n)


@pytest.mark.parametrize("config", CODEBOOKS, ids=str)
def test_codes_survive_save_and_load(config):
    torch.manual_seed(0)
    codebook, other = (build_codebook(config, latent_dim=16) for _ in range(2))
    latents = 3 + 0.1 * torch.randn(64, config.code_length, 16)
    for _ in range(60):
        codebook.train()(latents)
    other.load_state_dict(codebook.state_dict())
    assert torch.equal(codebook.eval()(latents)[1], other.eval()(latents)[1])


class PlainNSVQ(nn.Module):
    """Noise substitution as published, with neither normalisation nor replacement: the known failure."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(size, dim))

    def forward(self, z):
        codes = torch.cdist(z, self.codes[None]).argmin(-1)
        nearest = self.codes[codes]
        if not self.training:
            return nearest, codes
        noise = nn.functional.normalize(torch.randn_like(z), dim=-1)
        return z + (z - nearest).norm(dim=-1, keepdim=True) * noise, codes


def codes_in_use(codebook: nn.Module, steps: int = 300) -> int:
    """Train a small autoencoder of points in the plane whose latents start small and off centre."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2, 16), nn.Linear(16, 2)
    with torch.no_grad():
        encoder.weight.mul_(0.05)
        encoder.bias.fill_(1.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *codebook.parameters()], lr=1e-3)
    codebook.train()
    for _ in range(steps):
        points = torch.rand(64, 2) * 2 - 1
        quantised, _ = codebook(encoder(points)[:, None])
        loss = (decoder(quantised[:, 0]) - points).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = torch.rand(1024, 2) * 2 - 1
    with torch.no_grad():
        return codebook.eval()(encoder(points)[:, None])[1].unique().numel()


def test_no_collapse_where_plain_nsvq_collapses():
    torch.manual_seed(0)
    assert codes_in_use(PlainNSVQ(8, 16)) <= 2
    assert codes_in_use(build_codebook(NSVQCodebook(code_length=1, codebook_size=8), 16)) == 8
    assert codes_in_use(build_codebook(FSQCodebook(code_length=1, codebook_size=8), 16)) == 8


def test_nsvq_counts_every_token_and_moves_unused_codes_apart():
    torch.manual_seed(0)
    config = NSVQCodebook(code_length=2, codebook_size=8, replace_every_steps=5)
    codebook = build_codebook(config, latent_dim=4).train()
    with torch.no_grad():
        codebook.codes_LKD[:, 1:] = 100.0
    latents = torch.randn(32, 2, 4)
    for _ in range(4):
        codebook(latents)
    assert codebook.usage_LK.sum(1).tolist() == [4 * 32, 4 * 32]
    codebook(latents)
    assert codebook.usage_LK.sum() == 0
    assert codebook.codes_LKD.max() < 50
    for codes in codebook.codes_LKD.detach():
        assert torch.pdist(codes).min() > 1e-3


@pytest.mark.parametrize("exponent", [1, 5], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize("size", [8, 16])
def test_fsq_uses_its_levels_evenly(size, exponent):
    torch.manual_seed(0)
    codebook = build_codebook(FSQCodebook(code_length=2, codebook_size=size), latent_dim=16).train()
    for _ in range(300):
        codebook(7 + 0.1 * torch.randn(64, 2, 16) ** exponent)
    _, codes = codebook.eval()(7 + 0.1 * torch.randn(8192, 2, 16) ** exponent)
    share = torch.bincount(codes[:, 0], minlength=size) / 8192
    assert share.min() > 0.5 / size and share.max() < 2 / size


def test_fsq_levels():
    assert [fsq_levels(n) for n in (5, 8, 16, 64, 1000)] == [[5], [8], [16], [8, 8], [10, 10, 10]]
    with pytest.raises(ValueError, match=r"codebook_size is 17"):
        fsq_levels(17)
