import numpy as np
import pytest
import torch

from lapa.backbones.base import attention_mask
from lapa.schema import Runtime, StudyConfig, TransfusionStudy
from lapa.studies import study, transfusion
from lapa.studies.moving_blocks import COLOURS, JITTER, PLACES_X, PLACES_Y, draw_clips, frame_errors, square
from lapa.studies.transfusion import CodedClipModel, Regression

TINY = TransfusionStudy(
    image_size=8,
    patch_size=2,
    width=32,
    num_layers=1,
    num_heads=2,
    unet_channels=8,
    codebook_size=16,
    num_steps=3,
    batch_size=8,
    num_sampling_steps=2,
    num_eval_clips=16,
)


def clips(count: int = 64, seed: int = 0, size: int = 16):
    return draw_clips(count, size, np.random.default_rng(seed))


# The clips


def test_a_block_covers_its_area_wherever_it_lies():
    centres = np.random.default_rng(0).uniform(3, 13, (20, 2))
    images = square(centres, 4, 16)
    assert images.sum((1, 2)) == pytest.approx(16.0, abs=1e-4)
    columns = np.arange(16) + 0.5
    assert (images.sum(1) @ columns / 16) == pytest.approx(centres[:, 0], abs=1e-4)
    assert (images.sum(2) @ columns / 16) == pytest.approx(centres[:, 1], abs=1e-4)


def test_the_instruction_says_which_block_moves_and_where_to():
    given = clips(200)
    rows = torch.arange(200)
    colour, column = given.words_BW[:, 0], given.words_BW[:, 1] - len(COLOURS)
    moved = (given.present_BCHW - given.future_BCHW).abs().amax((2, 3)) > 0.1
    assert torch.equal(moved.nonzero()[:, 1], colour)
    centres = torch.arange(16) + 0.5
    brightness = (given.future_BCHW[rows, colour] + 1) / 2
    x, y = brightness.sum(1) @ centres / 16, brightness.sum(2) @ centres / 16
    assert (x - 16 * torch.tensor(PLACES_X)[column]).abs().max() < 16 * JITTER + 1e-3
    is_low = (y[:, None] - 16 * torch.tensor(PLACES_Y)).abs().argmin(1)
    assert (y - 16 * torch.tensor(PLACES_Y)[is_low]).abs().max() < 16 * JITTER + 1e-3
    assert 60 < is_low.sum() < 140
    # Two blocks of different colours, whole and apart, in every frame.
    for frame in (given.present_BCHW, given.future_BCHW):
        assert ((frame + 1) / 2).sum((1, 2, 3)).tolist() == pytest.approx([32.0] * 200, abs=1e-3)
        assert ((frame + 1) / 2).sum(1).max() <= 1 + 1e-5


def test_a_right_future_has_no_error_and_the_mean_of_both_has():
    given = clips(200)
    found = frame_errors(given.future_BCHW, given)
    assert found["squared_error"] == pytest.approx(0, abs=1e-9)
    assert found["position_error_px"] < 0.15 and found["right_share"] == 1
    assert 0.4 < found["lower_share"] < 0.6
    mean = frame_errors(given.outcomes_BOCHW.mean(1), given)
    assert mean["position_error_px"] > 2 and mean["right_share"] < 0.1
    assert frame_errors(given.present_BCHW, given)["right_share"] == 0
    empty = frame_errors(torch.full_like(given.future_BCHW, -1), given)
    assert empty["position_error_px"] > 1.5


def test_clips_are_those_of_their_generator():
    assert torch.equal(clips(seed=1).future_BCHW, clips(seed=1).future_BCHW)
    assert not torch.equal(clips(seed=1).future_BCHW, clips(seed=2).future_BCHW)


# The arms


@pytest.mark.parametrize("name", transfusion.builders(TINY))
def test_every_arm_learns_imagines_and_describes(name):
    torch.manual_seed(0)
    model = transfusion.builders(TINY)[name](0)
    given = clips(8, size=8)
    loss, _ = model.loss(given)
    loss.backward()
    assert model.word.grad.abs().sum() > 0
    model.eval()
    assert model.imagine(given, torch.Generator().manual_seed(0)).shape == (8, 3, 8, 8)
    assert model.describe(given).shape == (8, 2)


@pytest.mark.parametrize("name", ["transfusion", "vq_frames", "causal_mask"])
@pytest.mark.parametrize("described", [False, True])
def test_who_sees_whom_in_a_clip(name, described, monkeypatch):
    model = transfusion.builders(TINY)[name](0)
    monkeypatch.setattr(transfusion, "DESCRIBED_SHARE", float(described))
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    model.loss(clips(2, size=8))
    (layout,) = seen
    frame = ["text", *["patch"] * 16, "text"]
    kinds = frame + ["text"] * 3 if described else ["text"] * 3 + frame
    mask = attention_mask(layout, layout, model.backbone.mask)
    for query, of_query in enumerate(kinds):
        for key, of_key in enumerate(kinds):
            assert mask[1, query, key] == (key <= query or (of_query == of_key == "patch" and name == "transfusion"))


def test_words_are_told_by_the_cache_as_in_training(monkeypatch):
    """What `describe` reads one word at a time is what the loss of a described clip is made of."""
    monkeypatch.setattr(transfusion, "DESCRIBED_SHARE", 1.0)
    model = transfusion.builders(TINY)["regression"](0).eval()  # its described frames are clean
    given, logits = clips(8, size=8), []
    model.next_word.register_forward_hook(lambda _, __, output: logits.append(output))
    model.loss(given)
    described = model.describe(given)
    torch.testing.assert_close(logits[1][:, 0], logits[0][:, 0], atol=1e-4, rtol=1e-4)
    same = described[:, 0] == given.words_BW[:, 0]
    torch.testing.assert_close(logits[2][same, 0], logits[0][same, 1], atol=1e-4, rtol=1e-4)


def test_codes_are_the_nearest_patches_and_the_codebook_is_fitted():
    model = transfusion.builders(TINY)["vq_frames"](0)
    assert isinstance(model, CodedClipModel)
    assert torch.equal(model.encode(model.decode(torch.arange(16)[None])), torch.arange(16)[None])
    given = clips(100, seed=9, size=8)
    coded = frame_errors(model.decode(model.encode(given.future_BCHW)), given)["squared_error"]
    black = frame_errors(torch.full_like(given.future_BCHW, -1), given)["squared_error"]
    assert coded < 0.7 * black


def test_regression_sees_nothing_of_the_future_it_predicts():
    process = Regression()
    most = torch.tensor([1.0, 0.5])
    time = process.draw_times(2, None, most)
    assert time.tolist() == [1, 0]
    clean = torch.rand(2, 3, 4, 4)
    given = process.corrupt(clean, torch.randn_like(clean), time)
    assert given[0].abs().sum() == 0 and torch.equal(given[1], clean[1])


def test_wide_has_as_many_parameters_as_the_unet_and_costs_less():
    models = {name: build(0) for name, build in transfusion.builders(TINY).items() if name in ("unet", "wide")}
    unet, wide = (transfusion.num_parameters(models[name]) for name in ("unet", "wide"))
    assert 1 <= wide / unet < 1.05
    assert transfusion.training_flops(models["unet"], TINY) > transfusion.training_flops(models["wide"], TINY)


def test_the_study_runs_end_to_end(tmp_path):
    config = StudyConfig(
        output_dir=str(tmp_path), study=TINY, arms=["transfusion", "vq_frames", "unet"], seeds=[0],
        runtime=Runtime(device="cpu", dtype="float32", num_threads=1),
    )  # fmt: skip
    numbers = study.run(config)
    assert set(numbers) == {f"{arm}_right_share" for arm in config.arms}
    text = (tmp_path / "table.md").read_text()
    assert all(column in text for column in transfusion.COLUMNS)
    assert (tmp_path / "runs" / "unet-seed0" / "future_frames.png").is_file()
    found = study.read_json(tmp_path / "results.json")
    assert found["unet"]["num_steps"]["mean"] < found["transfusion"]["num_steps"]["mean"] == 3
    flops = [found[arm]["training_gigaflops"]["mean"] for arm in config.arms]
    assert max(flops) < 2 * min(flops)  # a step is the unit here
