import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_json, write_tensors
from lapa.data import read_store
from lapa.latent_vla import pretrain
from lapa.schema import DenseBackbone, FutureFrame, PretrainConfig, Runtime, Training, WordText
from tests.lapa.latent_vla.conftest import write_labels, write_store

BACKBONE = DenseBackbone(width=32, num_layers=1, num_heads=2)


def config(tmp_path, store, labels=None, predict="latent", num_steps=60, **changes) -> PretrainConfig:
    return PretrainConfig(
        output_dir=str(tmp_path / "pretrained"),
        data=str(store),
        labels=str(labels) if labels else None,
        predict=predict,
        backbone=BACKBONE,
        text=WordText(),
        image_size=16,
        random_shift_pixels=1,
        chunk_size=3,
        holdout_fraction=0.2,
        training=Training(
            num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, log_every_steps=2, tensorboard=False
        ),
        runtime=Runtime(device="cpu", dtype="float32", num_threads=1),
        **changes,
    )


def test_latent_pretraining_learns_the_token_that_the_instruction_decides(tmp_path, toy_store, toy_labels):
    numbers = pretrain.run(config(tmp_path, toy_store, toy_labels))
    assert numbers["token_0_accuracy"] == 1.0
    assert numbers["token_cross_entropy"] < numbers["marginal_token_cross_entropy"]
    folder = tmp_path / "pretrained"
    assert read_json(folder / "metrics.json")["joint_accuracy"] == numbers["joint_accuracy"]
    saved = read_json(folder / "config.json")
    assert (saved["target"], saved["num_codes"], saved["codebook_size"]) == ("latent", 2, 3)
    assert not (folder / "checkpoint").exists()
    assert "held_out_token_accuracy" in (folder / "log.jsonl").read_text()
    assert (folder / "images" / "keypoints.png").stat().st_size > 1000


def test_pretraining_tells_the_latent_actions_to_come(tmp_path, toy_store, toy_labels):
    numbers = pretrain.run(config(tmp_path, toy_store, toy_labels, latent_chunk_size=2))
    assert numbers["token_0_accuracy"] == 1.0
    # The direction stays, the other token is noise: about half of ln 3 a token.
    assert numbers["readout_cross_entropy_1_ahead"] < 0.8 * numbers["marginal_token_cross_entropy"]
    assert read_json(tmp_path / "pretrained" / "config.json")["latent_chunk_size"] == 2


def test_pretraining_denoises_the_future_frame_too(tmp_path, toy_store, toy_labels):
    frame = FutureFrame(weight=1.0, image_size=8, patch_size=2, num_sampling_steps=8)
    numbers = pretrain.run(config(tmp_path, toy_store, toy_labels, future_frame=frame))
    assert numbers["token_0_accuracy"] == 1.0
    assert numbers["future_frame_loss"] < 0.5
    assert numbers["future_frame_told_psnr_db"] > 10
    folder = tmp_path / "pretrained"
    assert (folder / "images" / "future_frames.png").stat().st_size > 1000
    assert read_json(folder / "config.json")["future_frame"]["patch_size"] == 2
    assert "held_out_future_frame_loss" in (folder / "log.jsonl").read_text()


def test_a_future_frame_without_codes_before_it_is_refused(tmp_path, toy_store):
    with pytest.raises(ValueError, match=r"future_frame.weight needs predict=latent"):
        pretrain.run(config(tmp_path, toy_store, predict="action", future_frame=FutureFrame(weight=5.0)))


@pytest.mark.parametrize("action_head", ["chunk", "bins"])
def test_action_pretraining_learns_and_saves_its_statistics(tmp_path, toy_store, action_head):
    cfg = config(tmp_path, toy_store, predict="action", num_steps=150, action_head=action_head, num_bins=8)
    # A shift by a pixel of 16 hides so much that what is learned depends on the seed and on the processor.
    numbers = pretrain.run(dataclasses.replace(cfg, random_shift_pixels=0))
    if action_head == "bins":  # midpoints of the toy's two wide bins are near none of its actions
        assert numbers["bin_cross_entropy"] < 0.2  # of one dimension .69 without a picture, of the other 0
    else:
        assert numbers["first_action_mse"] < 0.7 * numbers["marginal_first_action_mse"]
        assert numbers["first_action_cosine"] > 0.7
    saved = read_json(tmp_path / "pretrained" / "config.json")
    assert saved["action_std"][0] == pytest.approx(0.91, abs=0.03) and saved["chunk_size"] == 3


def test_pretraining_has_no_head_that_samples(tmp_path, toy_store):
    with pytest.raises(ValueError, match=r"action_head is 'flow', expected chunk or bins"):
        pretrain.run(config(tmp_path, toy_store, predict="action", action_head="flow"))


def test_pseudo_actions_take_the_place_of_true_ones(tmp_path, toy_store):
    """The labels say the opposite of what was done, and cover half of the frames."""
    store = read_store(toy_store)
    is_known = np.arange(store.num_frames) % 6 < 3
    labels = tmp_path / "labels"
    labels.mkdir()
    opposite = {"action": torch.from_numpy(-store.actions), "is_known": torch.from_numpy(is_known)}
    write_tensors(labels / "actions.safetensors", opposite)
    write_json(labels / "actions.json", {"store_fingerprint": store.fingerprint, "num_frames": store.num_frames})
    pretrain.run(config(tmp_path, toy_store, predict="action", num_steps=150, action_labels=str(labels)))
    saved = read_json(tmp_path / "pretrained" / "config.json")
    assert saved["action_mean"][1] == pytest.approx(-0.5)
    metrics = read_json(tmp_path / "pretrained" / "metrics.json")
    assert metrics["first_action_cosine"] > 0.7 and metrics["num_train_frames"] == 16 * 3


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, toy_store, toy_labels, monkeypatch):
    whole = config(tmp_path / "whole", toy_store, toy_labels, num_steps=8)
    whole.training.checkpoint_every_steps = 4
    pretrain.run(whole)

    killed = dataclasses.replace(whole, output_dir=str(tmp_path / "killed"))
    calls = 0
    read = pretrain.Inputs.read

    def read_until_killed(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return read(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Inputs, "read", read_until_killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(killed)
    pretrain.run(killed)
    weights = [load_file(f"{c.output_dir}/model.safetensors") for c in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_quantizer_that_failed_its_gate_is_refused_unless_told(tmp_path, toy_store):
    labels = write_labels(tmp_path / "labels", toy_store, passed=False)
    with pytest.raises(ValueError, match=r"(?s)failed its gate.*delta_psnr.*ignore_gate=true"):
        pretrain.run(config(tmp_path, toy_store, labels))
    pretrain.run(config(tmp_path, toy_store, labels, num_steps=2, ignore_gate=True))


def test_labels_of_another_codebook_size_are_refused(tmp_path, toy_store):
    labels = write_labels(tmp_path / "labels", toy_store)
    write_json(labels / "labels.json", read_json(labels / "labels.json") | {"codebook_size": 2})
    with pytest.raises(ValueError, match=r"codebook_size is 2, the labels .* use code 2: run `lapa label`"):
        pretrain.run(config(tmp_path, toy_store, labels))


def test_labels_of_other_data_are_refused(tmp_path, toy_store, toy_labels):
    other = write_store(tmp_path / "other", num_episodes=10, seed=1)
    with pytest.raises(ValueError, match="run `lapa label` on these data"):
        pretrain.run(config(tmp_path, other, toy_labels))


def test_missing_inputs_are_named(tmp_path, toy_store):
    with pytest.raises(ValueError, match="needs labels="):
        pretrain.run(config(tmp_path, toy_store))
    with pytest.raises(ValueError, match="predict is 'pixels'"):
        pretrain.run(config(tmp_path, toy_store, predict="pixels"))
    video = write_store(tmp_path / "video")
    index = load_file(video / "index.safetensors")
    write_tensors(video / "index.safetensors", {"episode_offsets": index["episode_offsets"]})
    with pytest.raises(ValueError, match="has no actions"):
        pretrain.run(config(tmp_path, video, predict="action"))
