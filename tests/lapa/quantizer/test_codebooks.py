import pytest
import torch
from torch import Tensor, nn

from lapa.quantizer.codebooks.base import LatentCodebook, build_codebook
from lapa.quantizer.codebooks.fsq import fsq_levels
from lapa.quantizer.codebooks.nsvq import NSVQ
from lapa.quantizer.codebooks.vq import VQ
from lapa.schema import (
    Codebook,
    ContinuousCodebook,
    FSQCodebook,
    LFQCodebook,
    NSVQCodebook,
    ResidualCodebook,
    VQCodebook,
)

DISCRETE = [NSVQCodebook, FSQCodebook, VQCodebook, ResidualCodebook, LFQCodebook]
SIZES = [(4, 8), (16, 4), (4, 16), (8, 128), (128, 8), (1, 64), (3, 2)]
EVERY = [kind(code_length=2, codebook_size=8) for kind in DISCRETE] + [ContinuousCodebook(code_length=2)]
every_codebook = pytest.mark.parametrize("config", EVERY, ids=lambda config: config.name)


def trained(config: Codebook, latents: Tensor, num_steps: int = 20) -> LatentCodebook:
    """A codebook of width 16 in inference mode, that has seen `latents` in training."""
    torch.manual_seed(0)
    codebook = build_codebook(config, latent_dim=16).train()
    for _ in range(num_steps):
        codebook(latents)
    return codebook.eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", DISCRETE, ids=lambda kind: kind.name)
def test_every_size_gives_codes_in_range_that_look_up_to_the_latents(kind, size):
    length, codebook_size = size
    latents = torch.randn(256, length, 16, generator=torch.Generator().manual_seed(0))
    codebook = trained(kind(code_length=length, codebook_size=codebook_size), latents, num_steps=3)
    quantised, codes, loss = codebook(latents)
    assert codebook.is_discrete and codebook.codebook_size == codebook_size
    assert codebook.num_codes == length * (2 if kind is ResidualCodebook else 1)
    assert quantised.shape == latents.shape and quantised.dtype == torch.float32 and loss == 0
    assert codes.shape == (256, codebook.num_codes) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codebook_size
    assert codes[:, 0].unique().numel() > 1
    torch.testing.assert_close(codebook.lookup(codes), quantised, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 4])
def test_continuous_codes_are_the_means_and_look_up_to_the_latents(length):
    latents = torch.randn(64, length, 16)
    codebook = trained(ContinuousCodebook(code_length=length), latents)
    quantised, codes, loss = codebook(latents)
    assert not codebook.is_discrete and codebook.codebook_size == 0 and loss == 0
    assert codes.shape == (64, codebook.num_codes) == (64, length * 16) and codes.dtype == torch.float32
    assert torch.equal(codebook.lookup(codes), quantised)


def test_bfloat16_latents_are_quantised_in_float32():
    latents = torch.randn(32, 2, 16)
    for config in EVERY:
        codebook = trained(config, latents)
        with torch.autocast("cpu", torch.bfloat16):
            quantised, codes, _ = codebook(latents.bfloat16())
            assert quantised.dtype == torch.float32
            torch.testing.assert_close(codebook.lookup(codes), quantised)


@every_codebook
def test_gradients_reach_the_latents_and_every_parameter(config):
    torch.manual_seed(0)
    codebook = build_codebook(config, latent_dim=16).train()
    latents = torch.randn(32, config.code_length, 16, requires_grad=True)
    quantised, _, loss = codebook(latents)
    ((quantised * torch.randn_like(quantised)).sum() + loss).backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    # A bias in front of a batch normalisation moves nothing.
    trained_ones = [
        (n, p) for n, p in codebook.named_parameters() if n not in ("fsq.project_in.bias", "project_in.bias")
    ]
    assert not [name for name, p in trained_ones if p.grad is None or p.grad.abs().sum() == 0]


@every_codebook
def test_codes_survive_save_and_load(config):
    latents = 3 + 0.1 * torch.randn(64, config.code_length, 16)
    codebook = trained(config, latents)
    other = build_codebook(config, latent_dim=16)
    other.load_state_dict(codebook.state_dict())
    assert torch.equal(codebook(latents).codes_BN, other.eval()(latents).codes_BN)


class PlainNSVQ(nn.Module):
    """Noise substitution as released with LAPA: no normalisation, and its rule of replacement.

    A code counts once a batch however many latents take it, and unused codes become copies of used ones, 1e-12 apart.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(size, dim))
        self.used = torch.zeros(size)
        self.steps = 0

    def forward(self, z_BLD):
        codes = torch.cdist(z_BLD, self.codes[None]).argmin(-1)
        nearest = self.codes[codes]
        if not self.training:
            return nearest, codes
        self.used[codes.unique()] += 1
        self.steps += 1
        if self.steps % 10 == 0 and self.steps <= 100:
            is_used = self.used / len(z_BLD) > 0.01
            with torch.no_grad():
                picks = is_used.nonzero()[torch.randint(int(is_used.sum()), (int((~is_used).sum()),)), 0]
                self.codes[~is_used] = self.codes[picks] + 1e-12 * torch.randn(len(picks), self.codes.shape[1])
            self.used.zero_()
        noise = nn.functional.normalize(torch.randn_like(z_BLD), dim=-1)
        return z_BLD + (z_BLD - nearest).norm(dim=-1, keepdim=True) * noise, codes


def points_in_the_plane(count: int, exponent: int) -> Tensor:
    """Even in a square, or for an exponent above 1 mostly near its centre with a heavy tail."""
    points = torch.rand(count, 2) * 2 - 1
    return points.sign() * points.abs() ** exponent


def codes_in_use(codebook: nn.Module, exponent: int = 1, steps: int = 200) -> int:
    """Train a small autoencoder whose latents are nearly constant: a far offset, and points in the plane beside it.

    Returns how many codes are in use afterwards, at the code position that uses the fewest.
    """
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2, 16), nn.Linear(16, 2)
    with torch.no_grad():
        encoder.weight.mul_(0.05)
        encoder.bias.fill_(1.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *codebook.parameters()], lr=1e-3)
    codebook.train()
    for _ in range(steps):
        points = points_in_the_plane(64, exponent)
        quantised, _, *loss = codebook(encoder(points)[:, None])
        total = (decoder(quantised[:, 0]) - points).square().mean() + sum(loss)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        codes = codebook.eval()(encoder(points_in_the_plane(1024, exponent))[:, None])[1]
    return min(column.unique().numel() for column in codes.unbind(1))


@pytest.mark.parametrize("exponent", [1, 5], ids=["even", "heavy-tailed"])
def test_no_collapse_where_the_released_nsvq_collapses(exponent):
    torch.manual_seed(0)
    assert codes_in_use(PlainNSVQ(8, 16), exponent) <= 2
    for kind in DISCRETE:
        torch.manual_seed(0)
        # Three signs of numbers with mean zero are three lines through the centre of the plane: six sectors.
        most = 6 if kind is LFQCodebook else 7
        assert codes_in_use(build_codebook(kind(code_length=1, codebook_size=8), 16), exponent) >= most, kind


@every_codebook
def test_overfits_one_batch(config):
    torch.manual_seed(0)
    codebook = build_codebook(config, 16).train()
    encoder, decoder = nn.Linear(8, 32), nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 8))
    samples = torch.randn(16, 8)
    model = nn.ModuleList([encoder, codebook, decoder])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        quantised, _, loss = codebook(encoder(samples).view(-1, 2, 16))
        error = (decoder(quantised.flatten(1)) - samples).square().mean()
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
    with torch.no_grad():
        quantised = codebook.eval()(encoder(samples).view(-1, 2, 16)).latents_BLD
        assert (decoder(quantised.flatten(1)) - samples).square().mean() < 0.25 * samples.square().mean()


@pytest.mark.parametrize(("free_bits", "nats"), [(0.0, 0.0), (0.5, 0.5)])
def test_the_prior_silences_a_latent_that_nothing_asks_for_down_to_its_free_bits(free_bits, nats):
    torch.manual_seed(0)
    codebook = build_codebook(ContinuousCodebook(code_length=1, beta=1.0, free_bits=free_bits), 16).train()
    optimizer = torch.optim.Adam(codebook.parameters(), lr=3e-2)
    latents = torch.randn(256, 1, 16)
    for _ in range(200):
        loss = codebook(latents).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / 16 == pytest.approx(nats, abs=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NSVQCodebook(code_length=0), "code_length 0"),
        (VQCodebook(codebook_size=1), "at least 2 codes"),
        (ResidualCodebook(num_levels=0), "num_levels is 0"),
        (LFQCodebook(codebook_size=6), "codebook_size is 6.*power of two"),
        (FSQCodebook(codebook_size=17), "codebook_size is 17"),
        (ContinuousCodebook(codebook_size=8), "have no codes"),
        (ContinuousCodebook(beta=-1.0), "beta is -1.0"),
        (Codebook(name="kmeans"), "unknown codebook 'kmeans'"),
    ],
)
def test_what_cannot_be_is_refused_and_explained(config, message):
    with pytest.raises(ValueError, match=message):
        build_codebook(config, 16)


def test_vq_moves_dead_codes_to_latents_of_the_batch():
    torch.manual_seed(0)
    config = VQCodebook(code_length=2, codebook_size=8)
    codebook = VQ(config, latent_dim=4, num_levels=1).train()
    latents = torch.randn(32, 2, 4)
    codebook(latents)
    level = codebook.levels[0]
    with torch.no_grad():
        level._codebook.embed[:, 1:] = 100.0
        level._codebook.embed_avg[:, 1:] = 100.0 * level._codebook.cluster_size[:, 1:, None]
    for _ in range(100):
        codebook(latents)
    assert level.codebook.abs().max() < 10
    assert min(column.unique().numel() for column in codebook.eval()(latents).codes_BN.unbind(1)) == 8


def test_nsvq_counts_every_token_and_moves_unused_codes_apart():
    torch.manual_seed(0)
    config = NSVQCodebook(code_length=2, codebook_size=8, replace_every_steps=5)
    codebook = NSVQ(config, latent_dim=4).train()
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
    codes = codebook.eval()(7 + 0.1 * torch.randn(8192, 2, 16) ** exponent).codes_BN
    share = torch.bincount(codes[:, 0], minlength=size) / 8192
    assert share.min() > 0.5 / size and share.max() < 2 / size


def test_fsq_levels():
    assert [fsq_levels(n) for n in (5, 8, 16, 64, 1000)] == [[5], [8], [16], [8, 8], [10, 10, 10]]
    with pytest.raises(ValueError, match=r"codebook_size is 17"):
        fsq_levels(17)
