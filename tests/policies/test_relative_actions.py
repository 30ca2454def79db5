"""Relative actions: a policy learns how far to go, and is still asked for places to go to."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_tensors
from lapa.data import read_store
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from policies.serving.served_policy import ServedPolicy
from tests.lapa.latent_vla.conftest import write_store
from tests.policies.test_state import STATE, STATE_FEATURES, config, small_config

STEP = np.array([0.3, -0.1])


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The robot shall always go STEP further than where it is, and pictures tell nothing."""
    folder = write_store(tmp_path_factory.mktemp("demos") / "store")
    store = read_store(folder)
    rng = np.random.default_rng(0)
    starts = rng.normal(5.0, 1.0, (store.num_episodes, 2))
    times = np.arange(store.num_frames) - np.repeat(store.episode_offsets[:-1], np.diff(store.episode_offsets))
    states = starts[store.episode_of_frame()] + times[:, None] * STEP
    index = load_file(folder / "index.safetensors")
    values = {"state": states, "action": states + STEP}
    index |= {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    write_tensors(folder / "index.safetensors", index)
    np.full(store.frames.shape, 60, np.uint8).tofile(folder / "frames.u8")
    meta = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(meta | {"instructions": ["go"] * store.num_episodes}))
    return folder


def first_places(folder, state: np.ndarray) -> np.ndarray:
    """(T, 2): the actions that a robot at `state` is told."""
    policy = ServedPolicy(folder, torch.device("cpu"))
    image = np.full((16, 16, 3), 60, np.uint8)
    return policy.infer({"observation.image": image, STATE: state.astype(np.float32), "task": "go"})


@pytest.mark.parametrize("action_head", ["chunk", "bins", "flow"])
def test_a_robot_far_from_the_demonstrations_is_told_to_go_on_from_where_it_is(tmp_path, demos, action_head):
    options = config(tmp_path, demos, num_steps=80, relative_actions=True, action_head=action_head, num_bins=16)
    options.training.learning_rate = 1e-2
    finetune.run(options)
    far = np.array([20.0, -12.0])
    expected = far + STEP * np.arange(1, 4)[:, None]
    assert first_places(tmp_path / "policy", far) == pytest.approx(expected, abs=0.35)


def test_places_alone_are_not_extrapolated_as_far(tmp_path, demos):
    """What the option is for: the same training without it is off by much more."""
    options = config(tmp_path, demos, num_steps=80)
    options.training.learning_rate = 1e-2
    finetune.run(options)
    far = np.array([20.0, -12.0])
    assert np.abs(first_places(tmp_path / "policy", far)[0] - far - STEP).max() > 1


def test_policies_without_the_option_hold_no_numbers_of_it(tmp_path, demos):
    finetune.run(config(tmp_path, demos))
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    assert not [name for name in weights if "relative_actions" in name]
    assert read_json(tmp_path / "policy" / "config.json")["relative_actions"] is False


def test_lerobots_statistics_place_the_state_among_the_actions():
    """As lerobot-train builds it: from the data set's statistics alone."""
    features = STATE_FEATURES | {STATE: type(STATE_FEATURES[STATE])(STATE_FEATURES[STATE].type, (2,))}
    statistics = {
        "action": {"mean": np.array([1.0, 2.0]), "std": np.array([0.5, 4.0])},
        STATE: {"mean": np.array([3.0, 2.0]), "std": np.array([1.0, 1.0])},
    }
    settings = small_config(input_features=features, use_state=True, relative_actions=True)
    relative = LapaPolicy(settings, dataset_stats=statistics).relative_actions
    state = torch.tensor([[7.0, 6.0]])
    normalised = (state - torch.tensor([3.0, 2.0])) / 1.0
    place = relative.actions(torch.zeros(1, 1, 2), relative.place(normalised))[0, 0]
    place = place * torch.tensor([0.5, 4.0]) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(place, state[0])


def test_what_cannot_be_relative_is_refused():
    with pytest.raises(ValueError, match="use_state=true"):
        LapaPolicy(small_config(relative_actions=True))
    with pytest.raises(ValueError, match="2 and 3 of them"):
        LapaPolicy(small_config(input_features=STATE_FEATURES, use_state=True, relative_actions=True))
    with pytest.raises(ValueError, match="expected state or last_action"):
        small_config(relative_to="goal")


LOAD = np.array([2.0, 0.0])


@pytest.fixture(scope="module")
def under_load(tmp_path_factory, demos):
    """The first joint stays LOAD behind its command in half of the episodes, and no picture or state tells in which."""
    folder = tmp_path_factory.mktemp("under_load") / "store"
    shutil.copytree(demos, folder)
    store = read_store(folder)
    assert store.actions is not None
    index = load_file(folder / "index.safetensors")
    is_loaded = (store.episode_of_frame() % 2 == 0)[:, None]
    index["action"] = torch.from_numpy(np.float32(store.actions + LOAD * is_loaded))
    write_tensors(folder / "index.safetensors", index)
    return folder


def test_a_joint_that_stays_behind_is_told_to_go_on_from_its_last_command(tmp_path, under_load):
    places, state = {}, np.array([5.0, 5.0], np.float32)
    for relative_to in ("state", "last_action"):
        folder = tmp_path / relative_to
        folder.mkdir()
        options = config(folder, under_load, num_steps=80, relative_actions=True, relative_to=relative_to)
        options.training.learning_rate = 1e-2
        finetune.run(options)
        policy = ServedPolicy(folder / "policy", torch.device("cpu"))
        assert ("action" in policy.inputs) == (relative_to == "last_action")
        seen = {"observation.image": np.full((16, 16, 3), 60, np.uint8), STATE: state, "task": "go"}
        places[relative_to] = [
            policy.infer(seen | {"action": np.float32(state + load)})[0] for load in (LOAD, 0 * LOAD)
        ]
    # Commands were STEP apart, whatever the load.
    loaded, free = places["last_action"]
    assert loaded == pytest.approx(state + LOAD + STEP, abs=0.35)
    assert free == pytest.approx(state + STEP, abs=0.35)
    assert max(abs(place[0] - right[0]) for place, right in zip(places["state"], (loaded, free), strict=True)) > 0.7


def test_the_policy_remembers_its_last_action_until_the_episode_ends():
    features = STATE_FEATURES | {STATE: type(STATE_FEATURES[STATE])(STATE_FEATURES[STATE].type, (2,))}
    statistics = {key: {"mean": np.zeros(2), "std": np.ones(2)} for key in ("action", STATE)}
    settings = small_config(
        input_features=features,
        use_state=True,
        relative_actions=True,
        relative_to="last_action",
        n_action_steps=1,
    )
    assert settings.action_delta_indices == [-1, 0, 1, 2]
    policy = LapaPolicy(settings, dataset_stats=statistics)
    seen = {"observation.images.top": torch.zeros(1, 3, 32, 32), "task": ["go"], STATE: torch.zeros(1, 2)}
    first, second = policy.select_action(seen), policy.select_action(seen)
    torch.testing.assert_close(second, 2 * first, atol=1e-5, rtol=0)  # as far again, from where it was sent
    told = policy.predict_action_chunk(seen | {"action": torch.full((1, 1, 2), 7.0)})
    torch.testing.assert_close(told[:, 0], first + 7, atol=1e-5, rtol=0)
    left_over = policy.predict_action_chunk(seen, prev_chunk_left_over=torch.full((1, 2), 7.0), inference_delay=0)
    torch.testing.assert_close(left_over[:, 1:], told[:, 1:], atol=1e-5, rtol=0)
    policy.reset()
    torch.testing.assert_close(policy.select_action(seen), first)
