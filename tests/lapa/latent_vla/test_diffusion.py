import pytest
import torch

from lapa.latent_vla.diffusion import Diffusion, Flow, TimeEmbedding, build_noise_process, cosine_schedule, guided

T = 1000


def test_the_cosine_schedule_falls_from_the_data_to_noise():
    share = cosine_schedule(T)
    assert share[0] == 1 and share[-1] < 1e-5 and (share.diff() < 0).all()
    half = torch.cos(torch.tensor((0.5 + 0.008) / 1.008 * torch.pi / 2)) ** 2
    first = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    assert share[T // 2] == pytest.approx((half / first).item(), rel=1e-4)


def test_noise_in_one_leap_is_noise_step_by_step():
    process = Diffusion()
    share, generator = process.share_T.double(), torch.Generator().manual_seed(0)
    x = torch.full((50_000,), 1.7, dtype=torch.float64)
    for step in range(1, 301):
        kept = share[step] / share[step - 1]
        x = kept.sqrt() * x + (1 - kept).sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leap = process.corrupt(
        torch.full((1, 50_000), 1.7), torch.randn(1, 50_000, generator=generator), torch.ones(1) * 0.3
    )
    assert x.mean().item() == pytest.approx(leap.mean().item(), abs=0.01)
    assert x.std().item() == pytest.approx(leap.std().item(), abs=0.01)


def test_the_posterior_is_that_of_bayes():
    """q(x_{t-1} | x_t, x_0) from the product of two normals, against Ho et al. 2020, equation 7."""
    process = Diffusion(stochasticity=1.0)
    before, now = process.share_T[399].double(), process.share_T[400].double()
    clean, noised = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.8], dtype=torch.float64)
    kept = now / before
    precision = kept / (1 - kept) + 1 / (1 - before)
    mean = (kept.sqrt() * noised / (1 - kept) + before.sqrt() * clean / (1 - before)) / precision
    found, deviation = process.posterior(noised, clean, now, before)
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(deviation, precision**-0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("predicts", ["data", "papers"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "flow"])
def test_sampling_with_a_perfect_model_of_normal_data_gives_that_normal(sampler, predicts):
    mean, deviation = 0.5, 0.2
    process = Flow(predicts) if sampler == "flow" else Diffusion(predicts, stochasticity=float(sampler == "ddpm"))

    def predict(x, time_B):
        # The best guess of the noise given x, and with it of the velocity, for data of that mean and deviation.
        keep, add = process.scales(time_B, x)
        surplus = (x - keep * mean) / (keep**2 * deviation**2 + add**2)
        noise, clean = add * surplus, mean + keep * deviation**2 * surplus
        return process.target(clean, noise)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 20_000, generator=generator)
    found = process.sample(predict, start, 100, generator=generator)
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(deviation, abs=0.02)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_flow_sampler_reaches_the_target_of_a_straight_field(num_steps):
    target = torch.tensor([[0.3, -0.9]])
    found = Flow("papers").sample(lambda x, time_B: (x - target) / time_B[:, None], torch.randn(1, 2), num_steps)
    torch.testing.assert_close(found, target)


@pytest.mark.parametrize("predicts", ["data", "papers"])
@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_the_right_prediction_leads_back_to_the_data(name, predicts):
    process = build_noise_process(name, predicts)
    clean, noise = torch.rand(3, 2, 4) * 2 - 1, torch.randn(3, 2, 4)
    first = torch.full((3,), 1.0)
    start = process.corrupt(clean, noise, first)
    torch.testing.assert_close(process.corrupt(clean, noise, torch.zeros(3)), clean)
    torch.testing.assert_close(start, noise, atol=2e-2, rtol=0)

    def predict(x, time_B):
        keep, add = process.scales(time_B, x)
        return process.target(clean, (x - keep * clean) / add)

    torch.testing.assert_close(process.sample(predict, start, 5), clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["diffusion", "flow"])
def test_times_are_uniform_and_never_above_the_cap(name):
    process = build_noise_process(name)
    most = torch.tensor([0.5, 1.0]).repeat_interleave(2000)
    time = process.draw_times(4000, torch.Generator().manual_seed(0), most)
    assert time.min() > 0 and time[:2000].max() <= 0.5 and time.max() <= 1
    assert time[:2000].mean().item() == pytest.approx(0.25, abs=0.01)
    assert time[2000:].mean().item() == pytest.approx(0.5, abs=0.02)
    assert name == "flow" or torch.equal((time * T).round() / T, time)


def test_samples_stay_within_the_limit_of_each_dimension():
    limit = torch.tensor([0.5, 2.0])
    for process in (Diffusion(), Diffusion("papers"), Flow(), Flow("papers")):
        found = process.sample(lambda x, time_B: 9 * torch.ones_like(x), torch.randn(64, 3, 2), 4, limit)
        assert (found.abs() <= limit + 1e-6).all() and found[..., 1].abs().max() > 0.5


def test_guidance_of_one_is_the_conditional_prediction():
    conditional, unconditional = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(
        guided(conditional, unconditional, 3.0), unconditional + 3 * (conditional - unconditional)
    )


def test_times_are_told_apart():
    embedded = TimeEmbedding(32)(torch.arange(0, 1001, 20) / 1000)
    distance = torch.cdist(embedded, embedded) + torch.eye(len(embedded)) * 9
    assert distance.min() > 0.01


def test_an_unknown_process_is_refused():
    with pytest.raises(ValueError, match="unknown noise process 'gauss'"):
        build_noise_process("gauss")
    with pytest.raises(ValueError, match="predicts is 'noise', expected data or papers"):
        build_noise_process("diffusion", "noise")
