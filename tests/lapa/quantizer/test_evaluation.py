"""Metrics on quantizers whose answers are known: the forward model pastes a disc, the inverse model finds it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapa.data import FramePairs, read_store
from lapa.metrics import EpisodeBootstrap
from lapa.quantizer.base import build_quantizer
from lapa.quantizer.evaluation import check_gate, continuous_usage, evaluate
from lapa.quantizer.gallery import write_gallery
from lapa.quantizer.latent_actions import apply_codes, code_statistics, encode_pairs, episodes_of
from lapa.quantizer.transfer import agreement_samples, draw_donors
from lapa.runtime import setup
from lapa.schema import (
    ContinuousCodebook,
    ConvolutionalQuantizer,
    FSQCodebook,
    QuantizerGate,
    ResidualCodebook,
    Runtime,
)

COMPUTE = setup(Runtime(device="cpu", dtype="float32", num_threads=1))
MODEL = ConvolutionalQuantizer(image_size=32, width=8, latent_dim=8, num_keypoints=8)


@pytest.fixture(scope="module")
def pairs(moving_discs):
    store = read_store(moving_discs)
    return FramePairs(store, 2, np.arange(8)), FramePairs(store, 2, np.arange(8, 12))


def quantizer(codebook):
    torch.manual_seed(0)
    return build_quantizer(MODEL, codebook).eval()


class Compass(torch.nn.Module):
    """A quantizer with perfect knowledge of the toy world: four codes, four directions in which the disc moves."""

    is_discrete, num_codes, codebook_size = True, 1, 4
    steps = torch.tensor([[0, 4], [4, 0], [0, -4], [-4, 0]])

    @property
    def codebook(self):
        return self

    def encode(self, frames_B2CHW):
        places = torch.stack([self.place(frames) for frames in frames_B2CHW.unbind(1)], 1)
        moved = (places[:, 1] - places[:, 0]).float()
        codes = torch.cdist(moved, self.steps.float()).argmin(1, keepdim=True)
        return codes, self.lookup(codes)

    def lookup(self, codes_BN):
        return self.steps[codes_BN].float()

    def decode(self, first_BCHW, latents_BLD):
        shifts = latents_BLD[:, 0].long().tolist()
        return torch.stack([first.roll(shift, (1, 2)) for first, shift in zip(first_BCHW, shifts, strict=True)])

    @staticmethod
    def place(frames_BCHW):
        brightest = torch.nn.functional.avg_pool2d(frames_BCHW.mean(1, keepdim=True), 5, 1).flatten(1).argmax(1)
        return torch.stack([brightest // 28, brightest % 28], 1)


def test_a_quantizer_that_moves_the_disc_the_same_everywhere_transfers(pairs):
    model = Compass()
    metrics, held_out = evaluate(model, pairs[0], pairs[1], 64, 0, COMPUTE)
    assert metrics["roundtrip_agreement"] > 0.8 and metrics["transfer_kappa"] > 0.7
    assert metrics["transfer_kappa_low"] <= metrics["transfer_kappa"] <= metrics["transfer_kappa_high"]
    assert metrics["transfer_probe_r2"] > 0.5 * metrics["linear_probe_r2"] > 0
    assert metrics["num_pairs"] == len(held_out.codes) == 24 and metrics["num_episodes"] == 4


def test_a_forward_model_that_ignores_codes_transfers_nothing(pairs):
    model = Compass()
    model.decode = lambda first, latents: first.roll((4, 0), (2, 3))
    metrics, _ = evaluate(model, pairs[0], pairs[1], 64, 0, COMPUTE)
    assert metrics["delta_psnr_db"] == pytest.approx(0) and metrics["delta_psnr_uniform_db"] == pytest.approx(0)
    assert abs(metrics["transfer_kappa"]) < 0.05, "always reading the same code is agreement by chance"
    assert not check_gate(metrics, QuantizerGate())["passed"]


def test_nothing_too_faint_to_see_can_be_read_back(pairs):
    """A code hidden in the last bits of the prediction would fake transfer."""
    model = Compass()
    model.decode = lambda first, latents: first + 1e-4 * latents[:, :1, :1, None]
    model.encode = lambda frames: (
        codes := ((frames[:, 1] - frames[:, 0]).mean((1, 2, 3), keepdim=True)[..., 0, 0] > 1e-9).long(),
        model.lookup(codes),
    )
    outcome = apply_codes(model, pairs[1], np.arange(4), np.array([[1], [1], [3], [3]]), COMPUTE)
    assert (outcome.read.codes == 0).all()


def test_metrics_with_intervals_for_discrete_and_continuous_codes(pairs):
    for codebook in (FSQCodebook(code_length=2, codebook_size=4), ContinuousCodebook(code_length=2)):
        metrics, _ = evaluate(quantizer(codebook), *pairs, 24, 0, COMPUTE)
        usage = "perplexity" if isinstance(codebook, FSQCodebook) else "active_dimensions"
        for name in ("linear_probe_r2", "delta_psnr_db", "ssim_over_copy", "transfer_probe_r2", usage):
            assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
        assert all(np.isfinite(value) for value in metrics.values())
        assert ("perplexity" in metrics) == (usage == "perplexity") == ("delta_psnr_uniform_db" in metrics)
        assert metrics["pixel_difference_probe_r2"] <= 1 and metrics["present_frame_probe_r2"] < 0.5


def test_pairs_without_actions_have_no_probes(pairs):
    silent = [FramePairs(replace(one.store, actions=None), 2, np.arange(12)) for one in pairs]
    metrics, _ = evaluate(Compass(), *silent, 24, 0, COMPUTE)
    assert "transfer_kappa" in metrics and not any("probe" in name for name in metrics)


def test_another_data_set_is_measured_too(pairs, other_discs):
    other = FramePairs(read_store(other_discs), 2, np.arange(10))
    metrics, _ = evaluate(Compass(), *pairs, 24, 0, COMPUTE, other)
    assert metrics["transfer_data2_kappa"] > 0.7 and metrics["data2_num_pairs"] == 24
    assert abs(metrics["data2_linear_probe_r2"] - metrics["linear_probe_r2"]) < 0.4


def test_transfer_across_sources_is_told_apart(pairs):
    store = replace(pairs[1].store, sources=["left"] * 10 + ["right"] * 2)
    metrics, _ = evaluate(Compass(), pairs[0], FramePairs(store, 2, np.arange(8, 12)), 64, 0, COMPUTE)
    assert metrics["transfer_across_kappa"] > 0.7


@pytest.mark.parametrize("same_source", [True, False])
def test_donors_come_from_another_episode_of_the_wanted_source(same_source):
    episode = np.repeat(np.arange(6), 5)
    source = np.array(["a", "b"])[episode % 2]
    donors = draw_donors(episode, source, np.random.default_rng(0), same_source)
    assert (episode[donors] != episode).all()
    assert ((source[donors] == source) == same_source).all()


def test_donors_of_a_lone_episode_are_other_pairs():
    donors = draw_donors(np.zeros(5, int), np.array(["a"] * 5), np.random.default_rng(0), same_source=True)
    assert (donors != np.arange(5)).all()


def test_chance_agreement_is_what_unrelated_codes_give():
    rng = np.random.default_rng(0)
    codes = rng.choice(4, p=[0.7, 0.1, 0.1, 0.1], size=(2, 4000, 2))
    samples = agreement_samples(codes[0], codes[1], EpisodeBootstrap(np.arange(4000) % 50, 0, 50))
    assert samples["chance"][0] == pytest.approx(0.52, abs=0.02)
    assert abs(samples["kappa"][0]) < 0.05


def test_repeated_dimensions_count_as_active_but_not_as_information():
    one = np.random.default_rng(0).normal(size=(500, 1)) * 0.5
    bootstrap = EpisodeBootstrap(np.arange(500) % 20, 0, 50)
    usage = continuous_usage(np.concatenate([one, one, 0 * one], 1), bootstrap)
    assert usage["active_dimensions"] == 2 and usage["effective_dimensions"] == pytest.approx(1)
    assert usage["num_dimensions"] == 3
    alone = continuous_usage(one, bootstrap)["information_bits"]
    assert alone == pytest.approx(-0.5 * np.log2(1 - 0.25), rel=0.1)


def test_code_statistics_are_those_of_the_pairs_with_the_code(pairs):
    encoded = encode_pairs(Compass(), pairs[1], np.arange(len(pairs[1])), COMPUTE)
    actions = pairs[1].displacements(encoded.indices)
    rows = code_statistics(encoded, actions)
    assert sum(row["count"] for row in rows) == len(actions)
    assert [row["count"] for row in rows] == sorted((row["count"] for row in rows), reverse=True)
    members = actions[encoded.codes[:, 0] == int(rows[0]["code"])]
    assert rows[0]["mean_0"] == pytest.approx(members[:, 0].mean())
    assert rows[0]["standard_deviation_1"] == pytest.approx(members[:, 1].std())


@pytest.mark.parametrize(
    "codebook",
    [ContinuousCodebook(code_length=1), ResidualCodebook(code_length=3, codebook_size=128)],
    ids=["continuous", "residual"],
)
def test_gallery_draws_every_kind_of_code(pairs, other_discs, codebook, tmp_path):
    model = quantizer(codebook)
    encoded = encode_pairs(model, pairs[1], np.arange(len(pairs[1])), COMPUTE)
    other = FramePairs(read_store(other_discs), 2, np.arange(10))
    displacements = pairs[1].displacements(encoded.indices)
    paths = write_gallery(tmp_path, model, pairs[1], encoded, COMPUTE, displacements, other)
    assert {path.stem for path in paths} == {"gallery", "transfer", "reconstructions", "usage", "arrows"}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_episodes_of_pairs(pairs):
    assert set(episodes_of(pairs[1], np.arange(len(pairs[1])))) == {8, 9, 10, 11}
