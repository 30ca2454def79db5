import numpy as np
import pytest
import torch

from lapa.checkpoint import read_json
from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.latent_vla.model import VisionLanguageTrunk
from lapa.latent_vla.planner import FramePlanner
from lapa.latent_vla.transfusion import FrameDenoiser
from lapa.schema import FutureFrame, WordText
from tests.lapa.latent_vla.conftest import EPISODE_LENGTH
from tests.lapa.latent_vla.test_pretrain import BACKBONE, config

FRAME = FutureFrame(image_size=8, patch_size=2, num_sampling_steps=4)


def planner(**changes) -> FramePlanner:
    torch.manual_seed(0)
    trunk = VisionLanguageTrunk(BACKBONE, WordText(), "keypoints", 16)
    return FramePlanner(trunk, FutureFrame(**(vars(FRAME) | changes)))


def inputs(model, texts):
    images = torch.rand(len(texts), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return images, model.trunk.encode_text(texts)


def test_every_weight_that_plans_has_a_gradient():
    model = planner(condition_dropout=0.0)
    images, ids = inputs(model, ["go left", "go right"] * 4)
    loss, numbers = model.loss(images, ids, images.flip(3), torch.Generator().manual_seed(2))
    loss.backward()
    assert float(numbers["future_frame_loss"]) == pytest.approx(float(loss))
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Nothing follows the frame, and no readout token is read.
    assert silent <= {"trunk.readout"}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_same_observation_gives_the_same_plan_wherever_it_is_in_the_batch(guidance):
    model = planner(guidance=guidance).eval()
    images, ids = inputs(model, ["go left", "go right", "go left"])
    images[2] = images[0]
    plan = model.imagine(images, ids)
    assert plan.shape == (3, 3, 8, 8) and plan.min() >= 0 and plan.max() <= 1
    assert torch.allclose(plan[0], plan[2], atol=1e-5) and not torch.allclose(plan[0], plan[1], atol=1e-3)
    sampled = model.imagine(images, ids, torch.Generator().manual_seed(3))
    assert not torch.allclose(sampled[0], sampled[2], atol=1e-3)


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_planner_of_changes_begins_by_planning_that_nothing_changes(patches):
    model = planner(predicts="change", patches=patches, unet_channels=8).eval()
    images, ids = inputs(model, ["go left", "go right"])
    assert torch.allclose(model.imagine(images, ids), (model.frame.shrink(images) + 1) / 2, atol=1e-6)
    loss, _ = model.loss(images, ids, images, torch.Generator().manual_seed(2))
    assert float(loss) == pytest.approx(0, abs=1e-9)


def test_a_change_needs_a_present_frame_to_be_added_to():
    with pytest.raises(ValueError, match="predicts=change needs the present frame beside the noised one"):
        FrameDenoiser(32, FutureFrame(predicts="change"))
    with pytest.raises(ValueError, match=r"future_frame\.predicts is 'noise', expected data, papers or change"):
        FrameDenoiser(32, FutureFrame(predicts="noise"))


def test_pretraining_learns_where_the_instruction_sends_the_square(tmp_path, toy_store):
    frame = FutureFrame(image_size=16, patch_size=4, num_sampling_steps=8, condition_dropout=0.0, predicts="change")
    cfg = config(tmp_path, toy_store, predict="frame", num_steps=200, future_frame=frame, frame_gap_s=0.2)
    numbers = pretrain.run(cfg)
    assert numbers["future_frame_planned_psnr_db"] > numbers["future_frame_copy_psnr_db"]
    folder = tmp_path / "pretrained"
    saved = read_json(folder / "config.json")
    assert (saved["target"], saved["frame_gap_frames"], saved["future_frame"]["patch_size"]) == ("frame", 2, 4)
    assert (folder / "images" / "future_frames.png").stat().st_size > 1000
    assert read_json(folder / "metrics.json")["num_train_frames"] == 16 * (EPISODE_LENGTH - 2)


def test_images_are_shrunk_to_the_size_that_is_denoised(toy_store):
    model = planner()
    frames = to_float(np.asarray(read_store(toy_store).frames[:2]))
    assert model.frame.shrink(frames).shape == (2, 3, 8, 8)
    assert float(model.frame.shrink(torch.ones(1, 3, 16, 16)).min()) == pytest.approx(1.0)
