"""Several robots finetuned together: one trunk, and a complete policy folder each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_tensors
from lapa.data import read_store
from lapa.latent_vla import pretrain
from lapa.schema import DenseBackbone, FinetuneConfig, MixturePart, PretrainConfig, Runtime, Training, WordText
from policies import finetune
from policies.serving.served_policy import ServedPolicy
from tests.lapa.latent_vla.conftest import write_labels, write_store

BACKBONE = DenseBackbone(width=32, num_layers=1, num_heads=2)
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
ARM_ACTION = 50 + 10 * np.arange(7)  # in units of its own, far from those of the other robot


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """plane: 2 numbers, left or right. arm: 7 numbers in other units, and a state of 4; the same instructions."""
    root = tmp_path_factory.mktemp("demos")
    plane, arm = (write_store(root / name, num_episodes=8, seed=seed) for seed, name in enumerate(("plane", "arm")))
    for folder, state_dim in ((plane, 3), (arm, 4)):
        index = load_file(folder / "index.safetensors")
        side = index["action"][:, :1]
        if folder == arm:
            index["action"] = torch.from_numpy(ARM_ACTION).float() + 5 * side
        index["state"] = torch.randn(len(side), state_dim, generator=torch.Generator().manual_seed(0))
        write_tensors(folder / "index.safetensors", index)
    return plane, arm


def robots(demos, **changes) -> list[MixturePart]:
    plane, arm = map(str, demos)
    return [MixturePart(path=plane, embodiment="plane"), MixturePart(path=arm, weight=2.0, embodiment="arm", **changes)]


def config(folder, num_steps=2, **changes) -> FinetuneConfig:
    values = {
        "output_dir": str(folder),
        "backbone": BACKBONE,
        "text": WordText(),
        "image_size": 16,
        "random_shift_pixels": 1,
        "num_bins": 8,
        "chunk_size": 3,
        "training": Training(num_steps=num_steps, batch_size=16, learning_rate=4e-3, warmup_steps=5, tensorboard=False),
        "runtime": RUNTIME,
    }
    return FinetuneConfig(**(values | changes))


def act(folder, store, episode: int) -> np.ndarray:
    """The first action of a policy folder, alone in its place, for a frame of the store."""
    policy = ServedPolicy(folder, torch.device("cpu"))
    frame = int(store.episode_offsets[episode]) + 1
    observation = {"observation.image": np.array(store.frames[frame]), "task": store.instructions[episode]}
    if store.states is not None:
        observation["observation.state"] = store.states[frame]
    return policy.infer(observation)[0]


def test_two_robots_trained_together_each_act_in_their_own_space_and_units(tmp_path, demos):
    finetune.run(config(tmp_path / "both", num_steps=110, mixture=robots(demos), use_state=True))
    assert not (tmp_path / "both" / "config.json").exists() and not (tmp_path / "both" / "checkpoint").exists()
    trunks = []
    for name, data in zip(("plane", "arm"), demos, strict=True):
        alone = tmp_path / f"{name}-alone"
        (tmp_path / "both" / name).rename(alone)
        store = read_store(data)
        scale = store.actions.std(0)
        assert read_json(alone / "metrics.json")["num_frames"] == store.num_frames
        for episode in (0, 1):
            expected = store.actions[store.episode_offsets[episode] + 1]
            assert np.abs((act(alone, store, episode) - expected) / scale).max() < 0.6
        weights = load_file(alone / "model.safetensors")
        trunks.append({key: value for key, value in weights.items() if "trunk" in key})
        assert weights["model.state_token.projection.weight"].shape[1] == store.states.shape[1]
    assert all(torch.equal(trunks[0][key], trunks[1][key]) for key in trunks[0])


def test_a_killed_mixture_goes_on_to_the_same_bytes(tmp_path, demos, monkeypatch):
    whole = config(tmp_path / "whole", num_steps=6, mixture=robots(demos), action_head="flow")
    whole.training.checkpoint_every_steps = 3
    finetune.run(whole)
    killed, calls, mean_loss = replace(whole, output_dir=str(tmp_path / "killed")), [], finetune.mean_loss

    def until_killed(batches):
        calls.append(batches)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return mean_loss(batches)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "mean_loss", until_killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(killed)
    finetune.run(killed)
    for name in ("plane", "arm"):
        files = [tmp_path / run / name / "model.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("embodiment", ["", "plane"])
def test_a_mixture_of_one_gives_the_bytes_of_the_plain_run(tmp_path, demos, embodiment):
    plane = str(demos[0])
    options = {"action_head": "flow", "use_state": True, "state_dropout": 0.3}
    finetune.run(config(tmp_path / "plain", data=plane, **options))
    part = MixturePart(path=plane, weight=5.0, embodiment=embodiment)
    finetune.run(config(tmp_path / "mixture", mixture=[part], **options))
    for name in ("model.safetensors", "config.json", "policy_preprocessor.json", "metrics.json"):
        plain, mixture = tmp_path / "plain" / name, tmp_path / "mixture" / embodiment / name
        if name == "metrics.json":
            assert {**read_json(plain), "steps_per_s": 0} == {**read_json(mixture), "steps_per_s": 0}
        else:
            assert plain.read_bytes() == mixture.read_bytes()


def test_a_pretrained_head_goes_to_no_robot_of_several(tmp_path, demos):
    vla = tmp_path / "vla"
    common = {"backbone": BACKBONE, "text": WordText(), "image_size": 16, "chunk_size": 3, "runtime": RUNTIME}
    training = Training(num_steps=1, batch_size=8, tensorboard=False)
    pretrain.run(
        PretrainConfig(
            output_dir=str(vla),
            data=str(demos[0]),
            predict="action",
            holdout_fraction=0.25,
            training=training,
            **common,
        )
    )
    finetune.run(config(tmp_path / "both", mixture=robots(demos), pretrained=str(vla)))
    saved = [read_json(tmp_path / "both" / name / "metrics.json") for name in ("plane", "arm")]
    assert [(one["kept_action_head"], one["pretrained_on"]) for one in saved] == [(False, "action")] * 2


def test_pretraining_on_a_mixture_of_one_gives_the_weights_of_the_plain_run_and_of_two_learns(tmp_path, demos):
    stores = [write_store(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    labels = [str(write_labels(tmp_path / f"labels{i}", folder)) for i, folder in enumerate(stores)]
    parts = [MixturePart(path=str(path), labels=own) for path, own in zip(stores, labels, strict=True)]
    common = {"backbone": BACKBONE, "text": WordText(), "image_size": 16, "holdout_fraction": 0.25, "runtime": RUNTIME}
    common["random_shift_pixels"] = 1
    training = Training(num_steps=80, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False)

    def run(name: str, **changes) -> dict:
        return pretrain.run(
            PretrainConfig(output_dir=str(tmp_path / name), **(common | {"training": training} | changes))
        )

    short = replace(training, num_steps=2)
    run("plain", data=str(stores[0]), labels=labels[0], training=short)
    run("one", mixture=parts[:1], training=short)
    plain, one = (tmp_path / name / "model.safetensors" for name in ("plain", "one"))
    assert plain.read_bytes() == one.read_bytes()
    assert run("two", mixture=parts)["token_0_accuracy"] > 0.9  # the token that the instruction decides
    assert read_json(tmp_path / "two" / "metrics.json")["num_train_frames"] == 2 * 15 * 4
    with pytest.raises(ValueError, match=r"labels=.* beside a mixture: name them in it"):
        run("both", mixture=parts, labels=labels[0])
    with pytest.raises(ValueError, match=r"needs labels=<folder written by `lapa label`> of .*second"):
        run("none", mixture=[parts[0], replace(parts[1], labels=None)])
    with pytest.raises(ValueError, match="predict=action needs actions of one robot"):
        run("actions", mixture=[MixturePart(path=str(path)) for path in demos], predict="action")


def test_data_sets_of_one_robot_must_have_its_actions_and_state(tmp_path, demos):
    same = [replace(part, embodiment="arm") for part in robots(demos)]
    with pytest.raises(ValueError, match=r"embodiment 'arm' have actions of other sizes, .*plane': 2, .*arm': 7"):
        finetune.run(config(tmp_path / "a", mixture=same))
    other = write_store(tmp_path / "stateless", num_episodes=2)
    same = [MixturePart(path=str(demos[0])), MixturePart(path=str(other))]
    with pytest.raises(ValueError, match=r"have states of other sizes, .*plane': 3, .*stateless': 0"):
        finetune.run(config(tmp_path / "b", mixture=same, use_state=True))
