"""The inverse model and its pseudo actions, on discs whose displacement in pixels is the action."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_tensors
from lapa.data import action_chunks, read_store
from lapa.quantizer import label_actions, train_inverse
from lapa.quantizer.label_actions import load_action_labels
from lapa.schema import LabelActionsConfig, Runtime, Training, TrainInverseConfig
from tests.lapa.quantizer.conftest import write_store

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def inverse(moving_discs, other_discs, tmp_path_factory):
    """A model of pairs two frames apart, its folder, what the stage returned and its options."""
    folder = tmp_path_factory.mktemp("inverse")
    config = TrainInverseConfig(
        output_dir=str(folder),
        data=str(moving_discs),
        test_data=str(other_discs),
        frame_gap_s=0.2,
        holdout_fraction=0.25,
        image_size=32,
        width=8,
        num_keypoints=8,
        random_shift_pixels=2,
        training=Training(num_steps=150, batch_size=16, learning_rate=5e-3, warmup_steps=10, tensorboard=False),
        runtime=CPU,
    )
    return folder, train_inverse.run(config), config


@pytest.fixture(scope="module")
def pseudo_actions(inverse, other_discs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("actions")
    config = LabelActionsConfig(
        inverse=str(inverse[0]), data=str(other_discs), output_dir=str(folder), batch_size=7, runtime=CPU
    )
    label_actions.run(config)
    return folder


def test_displacements_are_told_in_episodes_that_were_never_trained_on(inverse):
    folder, numbers, _ = inverse
    # Two frames tell the sum of two actions and not their order, so half of the variance is all there is to tell.
    assert numbers["test_r2"] > 0.3 and numbers["held_out_r2"] > 0.3
    assert numbers["test_l1"] < 0.85 * numbers["test_mean_action_l1"]
    assert numbers["test_cosine"] > numbers["test_mean_action_cosine"] + 0.2
    assert read_json(folder / "metrics.json") == numbers


def test_training_sees_the_demonstrations_alone(inverse, equally_long_discs, tmp_path):
    folder, _, config = inverse
    train_inverse.run(replace(config, output_dir=str(tmp_path), test_data=str(equally_long_discs)))
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_pseudo_actions_follow_the_true_ones_where_some_pair_spans_the_frame(pseudo_actions, other_discs):
    store = read_store(other_discs)
    actions, is_known = load_action_labels(pseudo_actions, store)
    assert (is_known == (store.steps_left() >= 1)).all()
    assert not actions[~is_known].any()
    assert np.corrcoef(actions[is_known].ravel(), store.actions[is_known].ravel())[0, 1] > 0.6


def test_chunks_end_where_actions_are_unknown(pseudo_actions, other_discs):
    store = read_store(other_discs)
    _, is_pad = action_chunks(store, 3, load_action_labels(pseudo_actions, store))
    assert (is_pad == (np.arange(3)[None] > store.steps_left()[:, None] - 1)).all()


def test_pseudo_actions_of_other_frames_are_refused(pseudo_actions, moving_discs, tmp_path):
    with pytest.raises(ValueError, match="run `lapa label_actions` on these data"):
        load_action_labels(pseudo_actions, read_store(moving_discs))
    with pytest.raises(ValueError, match="written by `lapa label_actions`"):
        load_action_labels(tmp_path, read_store(moving_discs))


def test_video_is_no_demonstration_and_another_rate_no_test(inverse, tmp_path):
    config = replace(inverse[2], output_dir=str(tmp_path / "inverse"))
    silent = write_store(tmp_path / "silent")
    index = load_file(silent / "index.safetensors")
    write_tensors(silent / "index.safetensors", {"episode_offsets": index["episode_offsets"]})
    with pytest.raises(ValueError, match="has no actions"):
        train_inverse.run(replace(config, data=str(silent)))
    slow = replace(read_store(silent), fps=5.0)
    with pytest.raises(ValueError, match=r"\[5.0\] frames/s, the inverse model was trained at 10.0"):
        train_inverse.require_rate(slow, read_json(inverse[0] / "config.json"))


def test_both_frames_of_a_pair_are_shifted_alike():
    frames = np.random.default_rng(0).integers(0, 255, (3, 2, 16, 16, 3)).astype(np.uint8)
    frames[:, 1] = frames[:, 0]
    shifted = train_inverse.shift_pairs(frames, 3, np.random.default_rng(1))
    assert shifted.shape == frames.shape and (shifted[:, 0] == shifted[:, 1]).all()
    assert (shifted != frames).any()


def test_a_trained_model_loads_with_its_statistics(inverse):
    from lapa.quantizer.inverse import load_inverse

    model = load_inverse(inverse[0])
    frames = torch.rand(2, 2, 3, 32, 32)
    assert model.actions(frames).shape == (2, 2, 2)
    assert torch.allclose(model.actions(frames), model(frames) * model.std_A + model.mean_A)
    assert (model.std_A > 1).all()
