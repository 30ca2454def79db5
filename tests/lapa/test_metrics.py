import numpy as np
import pytest
import torch

from lapa import metrics
from lapa.metrics import EpisodeBootstrap


def bootstrap_of(num_pairs, num_episodes, seed=0, num_resamples=400):
    return EpisodeBootstrap(np.arange(num_pairs) % num_episodes, seed, num_resamples)


@pytest.mark.parametrize(("size", "num_scales"), [(32, 2), (64, 3), (128, 4)])
def test_structural_similarity_is_that_of_torchmetrics(size, num_scales):
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    generator = torch.Generator().manual_seed(size)
    one = torch.nn.functional.avg_pool2d(torch.rand(4, 3, size, size, generator=generator), 3, 1, 1)
    other = (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1)
    weights = metrics.SCALE_WEIGHTS[:num_scales]
    expected = reference(
        metrics.luminance(one).clamp(0, 1),
        metrics.luminance(other).clamp(0, 1),
        sigma=0.8,
        kernel_size=7,
        reduction="none",
        data_range=1.0,
        betas=tuple(weight / sum(weights) for weight in weights),
    )
    torch.testing.assert_close(metrics.multi_scale_ssim(one, other), expected, atol=1e-5, rtol=0)


def test_similarities_are_one_for_equal_images_and_fall_with_blur():
    sharp = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, 1, 2)
    for similarity in (metrics.multi_scale_ssim, metrics.gradient_similarity):
        torch.testing.assert_close(similarity(sharp, sharp), torch.ones(3))
        assert (similarity(sharp, blurred) < 0.8).all()


def test_interval_covers_the_mean_of_the_episodes_at_its_rate():
    """Values differ between episodes and hardly within: resampling pairs would give intervals ten times too narrow."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(100):
        episode = np.repeat(np.arange(40), 100)
        values = rng.normal(size=40)[episode] + 0.01 * rng.normal(size=4000)
        bootstrap = EpisodeBootstrap(episode, trial, num_resamples=200)
        estimate = bootstrap.estimate("x", bootstrap.means(values[:, None])[:, 0])
        assert estimate["x"] == pytest.approx(values.mean())
        covered += estimate["x_low"] <= 0 <= estimate["x_high"]
    assert 85 <= covered <= 100


def test_one_episode_has_no_interval():
    bootstrap = EpisodeBootstrap(np.zeros(5, int), 0)
    assert bootstrap.estimate("x", bootstrap.means(np.arange(5.0)[:, None])[:, 0]) == {"x": 2.0}


def test_interval_of_a_count_holds_the_estimate_and_stops_at_its_bounds():
    codes = np.random.default_rng(0).integers(8, size=(300, 2))
    bootstrap = bootstrap_of(300, 30)
    samples = metrics.usage_samples(codes, 8, bootstrap)
    estimate = bootstrap.estimate_count("codes_in_use", samples["codes_in_use"], most=64.0)
    assert samples["codes_in_use"][1:].max() <= estimate["codes_in_use"], "a resample holds no code that is not there"
    assert estimate["codes_in_use_low"] < estimate["codes_in_use"] < estimate["codes_in_use_high"] <= 64


def test_code_usage_of_uniform_single_and_huge_vocabularies():
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2)
    assert metrics.code_usage(grid, 4) == pytest.approx(
        {
            "token_utilisation": 1,
            "vocabulary_utilisation": 1,
            "token_perplexity": 4,
            "codes_in_use": 16,
            "perplexity": 16,
            "perplexity_ratio": 1,
        }
    )
    collapsed = metrics.code_usage(np.full((50, 3), 2), 4)
    assert collapsed["perplexity"] == pytest.approx(1) and collapsed["vocabulary_utilisation"] == 0.25
    # More latent actions than 64 bits can number: 32 columns of 256 codes.
    huge = metrics.code_usage(np.random.default_rng(0).integers(256, size=(500, 32)), 256)
    assert huge["codes_in_use"] == 500 and 0 < huge["perplexity_ratio"] < 1e-70


def test_joint_codes_tell_latent_actions_apart():
    codes = np.array([[0, 3], [1, 0], [0, 3], [3, 0], [0, 0]])
    joint = metrics.joint_codes(codes)
    assert joint[0] == joint[2] and len(set(joint.tolist())) == 4 and joint.max() == 3


def test_kappa_is_zero_at_chance_and_one_at_full_agreement():
    values = metrics.kappa(np.array([0.25, 1.0, 1.0]), np.array([0.25, 0.25, 1.0]))
    np.testing.assert_allclose(values, [0, 1, 0])


def test_between_code_share_is_not_fooled_by_as_many_codes_as_pairs():
    rng = np.random.default_rng(0)
    actions, bootstrap = rng.normal(size=(400, 2)), bootstrap_of(400, 40)
    unrelated = metrics.between_code_share(rng.permutation(np.arange(400) % 150), actions, bootstrap)[0]
    assert abs(unrelated) < 0.15
    assert metrics.between_code_share(np.arange(400), actions, bootstrap)[0] == 0
    quadrant = (actions[:, 0] > 0) * 2 + (actions[:, 1] > 0)
    assert metrics.between_code_share(quadrant, actions, bootstrap)[0] == pytest.approx(2 / np.pi, abs=0.05)


def test_probes_find_what_they_can_express_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(900, 5)), rng.normal(size=(900, 40))
    actions = features[:, :2] @ rng.normal(size=(2, 2))
    squares = features[:, :2] ** 2
    train, test = slice(0, 600), slice(600, 900)
    bootstrap = bootstrap_of(300, 30)

    def r2(fit, inputs, outputs):
        predicted = fit(inputs[train], outputs[train])(inputs[test])
        return metrics.r_squared_samples(predicted, outputs[test], bootstrap)[0]

    assert r2(metrics.fit_linear_probe, features, actions) > 0.99
    assert r2(metrics.fit_mlp_probe, features, actions) > 0.95
    assert r2(metrics.fit_linear_probe, features, squares) < 0.1 < 0.8 < r2(metrics.fit_mlp_probe, features, squares)
    for fit in (metrics.fit_linear_probe, metrics.fit_mlp_probe):
        assert -0.25 < r2(fit, noise, actions) < 0.1, "a baseline that overfits would flatter the latent actions"


def test_r_squared_ignores_dimensions_that_stand_still():
    true = np.stack([np.arange(10.0), np.zeros(10)], 1)
    predicted = np.stack([np.arange(10.0), np.ones(10)], 1)
    assert metrics.r_squared_samples(predicted, true, bootstrap_of(10, 5))[0] == pytest.approx(1)
    assert metrics.r_squared_samples(true, np.zeros((10, 2)), bootstrap_of(10, 5))[0] == 0


def test_code_table_predicts_the_mean_of_a_code_and_of_all_for_an_unknown_one():
    predict = metrics.fit_code_table(np.array([[0, 1], [0, 1], [2, 2]]), np.array([[1.0], [3.0], [8.0]]))
    np.testing.assert_allclose(predict(np.array([[2, 2], [0, 1], [5, 5]])), [[8], [2], [4]])
