"""UniPi end to end in the toy world: plan the frame, tell the actions from it."""

import pytest
import torch
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_json
from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.quantizer import train_inverse
from lapa.schema import FinetuneUnipiConfig, FutureFrame, Runtime, Training, TrainInverseConfig
from policies import finetune_unipi
from policies.unipi.configuration_unipi import UnipiConfig
from policies.unipi.modeling_unipi import UnipiPolicy
from tests.lapa.latent_vla.conftest import write_store
from tests.lapa.latent_vla.test_pretrain import config as pretrain_config

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)
FRAME = FutureFrame(image_size=16, patch_size=4, num_sampling_steps=4, condition_dropout=0.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Demonstrations, a planner pretrained on them and an inverse model."""
    folder = tmp_path_factory.mktemp("unipi")
    demos = write_store(folder / "demos")
    pretrain.run(pretrain_config(folder, demos, predict="frame", num_steps=150, future_frame=FRAME, frame_gap_s=0.2))
    training = Training(num_steps=150, batch_size=16, learning_rate=5e-3, warmup_steps=10, tensorboard=False)
    train_inverse.run(
        TrainInverseConfig(
            output_dir=str(folder / "inverse"),
            data=str(demos),
            frame_gap_s=0.2,
            image_size=16,
            width=8,
            num_keypoints=8,
            random_shift_pixels=1,
            training=training,
            runtime=CPU,
        )
    )
    return folder


def config(parts, output_dir, **changes) -> FinetuneUnipiConfig:
    values = {
        "output_dir": str(output_dir),
        "data": str(parts / "demos"),
        "pretrained": str(parts / "pretrained"),
        "inverse": str(parts / "inverse"),
        "random_shift_pixels": 1,
        "num_sampling_steps": 4,
        "training": Training(num_steps=10, batch_size=16, learning_rate=1e-3, warmup_steps=2, tensorboard=False),
        "runtime": CPU,
    }
    return FinetuneUnipiConfig(**(values | changes))


@pytest.fixture(scope="module")
def policy_folder(parts):
    finetune_unipi.run(config(parts, parts / "policy"))
    return parts / "policy"


def load(folder):
    register_third_party_plugins()
    policy = get_policy_class("unipi").from_pretrained(folder)
    return policy.eval(), *make_pre_post_processors(policy.config, pretrained_path=str(folder))


def test_the_saved_policy_goes_where_the_instruction_says(parts, policy_folder):
    policy, preprocess, postprocess = load(policy_folder)
    assert isinstance(policy, UnipiPolicy)
    store = read_store(parts / "demos")
    first = store.episode_offsets[:-1]
    batch = {"observation.image": to_float(store.frames[first]), "task": store.instructions}
    actions = postprocess(policy.select_action(preprocess(batch)))
    right = (actions[:, 0] > 0).numpy() == (store.actions[first, 0] > 0)
    assert right.mean() > 0.8


def test_a_plan_serves_two_actions_and_then_is_made_anew(parts, policy_folder, monkeypatch):
    policy, preprocess, _ = load(policy_folder)
    batch = preprocess({"observation.image": torch.rand(3, 3, 16, 16), "task": ["go to the left"] * 3})
    plans = []
    imagine = policy.planner.imagine
    monkeypatch.setattr(policy.planner, "imagine", lambda *a: plans.append(1) or imagine(*a))
    actions = [policy.select_action(batch) for _ in range(5)]
    assert len(plans) == 3 and actions[0].shape == (3, 2)
    assert torch.equal(actions[0], actions[2]), "the same observation, the same plan"
    policy.reset()
    policy.select_action(batch)
    assert len(plans) == 4


def test_the_inverse_model_stays_as_it_was_trained(parts, policy_folder):
    policy = load_file(policy_folder / "model.safetensors")
    for name, tensor in load_file(parts / "inverse" / "model.safetensors").items():
        assert torch.equal(policy[f"inverse.{name}"], tensor)
    planner = load_file(parts / "pretrained" / "model.safetensors")
    assert any(not torch.equal(policy[f"planner.{name}"], tensor) for name, tensor in planner.items())
    assert read_json(policy_folder / "config.json")["frame_gap_frames"] == 2


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    other = tmp_path / "pretrained"
    other.mkdir()
    saved = read_json(parts / "pretrained" / "config.json")
    write_json(other / "config.json", saved | {"target": "latent"})
    with pytest.raises(ValueError, match="UniPi needs predict=frame"):
        finetune_unipi.run(config(parts, tmp_path / "policy", pretrained=str(other)))
    write_json(other / "config.json", saved | {"image_size": 32})
    with pytest.raises(ValueError, match="the planner sees 32 px, the inverse model"):
        finetune_unipi.run(config(parts, tmp_path / "policy", pretrained=str(other)))
    with pytest.raises(ValueError, match="n_action_steps is 4, expected 1 to frame_gap_frames"):
        UnipiConfig(frame_gap_frames=3, n_action_steps=4)


def test_training_by_lerobot_needs_the_frame_to_plan(policy_folder):
    policy, _, _ = load(policy_folder)
    assert policy.config.observation_delta_indices == [0, 2]
    pairs = {"observation.image": torch.rand(2, 2, 3, 16, 16), "task": ["go to the left"] * 2}
    loss, numbers = policy(pairs)
    assert loss.requires_grad and numbers["future_frame_loss"] == pytest.approx(float(loss))
    with pytest.raises(ValueError, match=r"expected \(B, 2, C, H, W\)"):
        policy({"observation.image": torch.rand(2, 3, 16, 16), "task": ["go to the left"] * 2})
