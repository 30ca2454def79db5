from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

import lerobot_policy_lapa
from policies.lapa.configuration_lapa import LapaConfig
from policies.lapa.modeling_lapa import LapaPolicy

IMAGE_KEY = "observation.images.top"
TEXTS = ["go to the red moon", "reach the blue cube"]
STATISTICS = {"action": {"mean": torch.tensor([1.0, 2.0]), "std": torch.tensor([0.5, 0.1])}}


def small_config(**changes) -> LapaConfig:
    values = {
        "input_features": {IMAGE_KEY: PolicyFeature(FeatureType.VISUAL, (3, 32, 32))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
        "device": "cpu",
        "push_to_hub": False,
        "image_size": 32,
        "backbone": {"name": "dense", "width": 32, "num_layers": 1, "num_heads": 2},
        "chunk_size": 3,
        "n_action_steps": 2,
    }
    return LapaConfig(**(values | changes))


def new_policy(**changes) -> LapaPolicy:
    torch.manual_seed(0)
    return LapaPolicy(small_config(**changes))


def observation(size: int = 32, seed: int = 0) -> dict:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return {IMAGE_KEY: images, "task": TEXTS}


def training_batch() -> dict:
    return observation() | {"action": torch.randn(2, 3, 2), "action_is_pad": torch.zeros(2, 3, dtype=torch.bool)}


def test_the_plugin_module_lets_lerobot_build_the_policy_by_its_type():
    assert lerobot_policy_lapa.LapaConfig is PreTrainedConfig.get_choice_class("lapa")
    assert get_policy_class("lapa") is LapaPolicy
    assert make_policy_config("lapa", device="cpu").type == "lapa"


def test_forward_gives_a_loss_with_gradients_and_plain_numbers():
    policy = new_policy()
    loss, numbers = policy.forward(training_batch())
    loss.backward()
    assert all(type(value) is float for value in numbers.values())
    assert policy.model.trunk.readout.grad.abs().sum() > 0


def test_reduction_none_gives_a_loss_a_sample():
    policy, batch = new_policy(), training_batch()
    losses, _ = policy.forward(batch, reduction="none")
    assert losses.shape == (2,)
    assert losses.mean().item() == pytest.approx(policy.forward(batch)[0].item())


def test_select_action_looks_again_after_n_action_steps_and_after_reset():
    policy = new_policy()
    chunk = policy.predict_action_chunk(observation())
    assert chunk.shape == (2, 3, 2)
    assert torch.equal(policy.select_action(observation()), chunk[:, 0])
    assert torch.equal(policy.select_action(observation(seed=5)), chunk[:, 1])
    assert not torch.equal(policy.select_action(observation(seed=5)), chunk[:, 2])
    policy.reset()
    assert torch.equal(policy.select_action(observation()), chunk[:, 0])


def test_images_of_another_size_are_resized():
    assert new_policy().predict_action_chunk(observation(size=96)).shape == (2, 3, 2)


def test_a_batch_without_task_or_image_is_refused():
    policy = new_policy()
    with pytest.raises(ValueError, match="no `task`"):
        policy.select_action({IMAGE_KEY: torch.rand(1, 3, 32, 32)})
    with pytest.raises(ValueError, match="rename_map"):
        policy.select_action({"task": ["go"]})


def test_a_saved_policy_acts_the_same_in_the_units_of_its_data(tmp_path: Path):
    policy = new_policy()
    preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=STATISTICS)
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(tmp_path)
    loaded = LapaPolicy.from_pretrained(tmp_path)
    load_pre, load_post = make_pre_post_processors(loaded.config, pretrained_path=str(tmp_path))
    one = {IMAGE_KEY: torch.rand(3, 32, 32), "task": TEXTS[0]}
    normalised = policy.eval().select_action(preprocessor(one))
    acted = load_post(loaded.select_action(load_pre(one)))
    assert torch.allclose(acted, normalised * STATISTICS["action"]["std"] + STATISTICS["action"]["mean"])


def test_instructions_and_padding_survive_the_preprocessor():
    preprocessor, _ = make_pre_post_processors(small_config(), dataset_stats=STATISTICS)
    batch = preprocessor(training_batch() | {"action": torch.tensor([1.5, 2.0]).expand(2, 3, 2)})
    assert batch["task"] == TEXTS and batch["action_is_pad"].shape == (2, 3)
    assert torch.allclose(batch["action"], torch.tensor([1.0, 0.0]).expand(2, 3, 2), atol=1e-5)
    assert batch[IMAGE_KEY].min() >= 0 and batch[IMAGE_KEY].max() <= 1


def test_missing_action_statistics_are_an_error():
    with pytest.raises(ValueError, match=r"statistics \['mean', 'std'\] are missing"):
        make_pre_post_processors(small_config())
    with pytest.raises(ValueError, match=r"statistics \['std'\] are missing"):
        make_pre_post_processors(small_config(), dataset_stats={"action": {"mean": torch.zeros(2)}})


def test_weights_of_another_model_are_not_half_loaded(tmp_path: Path):
    new_policy().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        LapaPolicy.from_pretrained(tmp_path, config=small_config(chunk_size=4))


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="expected 1 to chunk_size"):
        small_config(n_action_steps=4)
    with pytest.raises(ValueError, match="needs an image"):
        new_policy(input_features={"observation.state": PolicyFeature(FeatureType.STATE, (2,))})
    with pytest.raises(ValueError, match="unknown backbone"):
        new_policy(backbone={"name": "sparse"})


def test_optimiser_groups_hold_every_parameter_once():
    policy = new_policy()
    held = [id(p) for group in policy.get_optim_params() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in policy.parameters())
    assert np.isclose(policy.config.get_optimizer_preset().lr, policy.config.optimizer_lr)
