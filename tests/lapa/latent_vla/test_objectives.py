import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import write_json, write_tensors
from lapa.data import read_store
from lapa.latent_vla import pretrain
from lapa.latent_vla.inputs import Inputs
from lapa.latent_vla.model import VisionLanguageTrunk
from lapa.latent_vla.objectives import action_labels, build_objective, frames_ahead, latent_chunks
from lapa.mixture import open_mixture
from lapa.quantizer.label import load_labels
from lapa.schema import FutureFrame, MixturePart
from tests.lapa.latent_vla.conftest import write_store
from tests.lapa.latent_vla.test_pretrain import config


def test_chunks_of_latent_actions_end_with_the_episode(toy_store, toy_labels):
    store = read_store(toy_store)
    labels = load_labels(toy_labels, store)
    ahead = frames_ahead(labels, store)
    assert ahead[:6].tolist() == [2, 3, 4, 5, 4, 5]
    chunks = latent_chunks(labels, ahead, 3)
    code = labels.latent_action
    assert chunks[0].tolist() == [code[0].tolist(), code[2].tolist(), [-1, -1]]  # frame 4 has no partner, so no label
    assert chunks[2].tolist() == [code[2].tolist(), [-1, -1], [-1, -1]]
    assert (chunks[[4, 5]] == -1).all()
    assert np.array_equal(latent_chunks(labels, ahead, 1)[labels.is_valid, 0], code[labels.is_valid])
    with pytest.raises(ValueError, match="latent_chunk_size is 0, expected at least 1"):
        latent_chunks(labels, ahead, 0)


def test_the_future_frame_is_the_quantizers_and_shifted_with_the_present_one(tmp_path, toy_store, toy_labels):
    store = read_store(toy_store)
    labels = load_labels(toy_labels, store)
    cfg = config(tmp_path, toy_store, toy_labels, future_frame=FutureFrame(weight=1.0, image_size=8, patch_size=2))
    trunk = VisionLanguageTrunk(cfg.backbone, cfg.text, cfg.image_tokenizer, cfg.image_size)
    everywhere = np.ones(store.num_frames, bool)
    mixture = open_mixture(cfg.data, [], cfg.image_size, None)
    objective = build_objective(cfg, mixture, trunk, everywhere, torch.device("cpu"))
    frames = np.flatnonzero(labels.is_valid)
    assert np.array_equal(objective.future_N[frames], frames + labels.frame_gap_frames)
    inputs = Inputs(store, trunk.encode_text(store.instructions), torch.device("cpu"), [objective.future_N])
    images, _, _ = inputs.read(frames, 1, np.random.default_rng(0))
    assert images.shape[1] == 6
    # The square moves along its row, one pixel a step: two frames later it stands two columns further, however both
    # are shifted.
    columns = [(part[:, 0] > 0.5).any(1).float().argmax(1) for part in images.split(3, dim=1)]
    rows = [(part[:, 0] > 0.5).any(2).float().argmax(1) for part in images.split(3, dim=1)]
    assert torch.equal((columns[1] - columns[0]).abs(), torch.full((len(frames),), 2))
    assert torch.equal(rows[0], rows[1])


def test_pseudo_actions_of_one_data_set_stand_beside_true_ones_of_another(tmp_path, toy_store):
    store = read_store(toy_store)
    other = write_store(tmp_path / "other", num_episodes=store.num_episodes, seed=1)
    labels = tmp_path / "labels"
    labels.mkdir()
    tensors = {"action": torch.full(store.actions.shape, 7.0), "is_known": torch.ones(store.num_frames, dtype=bool)}
    write_tensors(labels / "actions.safetensors", tensors)
    write_json(labels / "actions.json", {"store_fingerprint": store.fingerprint, "num_frames": store.num_frames})
    parts = [MixturePart(path=str(toy_store), labels=str(labels)), MixturePart(path=str(other))]
    cfg = dataclasses.replace(config(tmp_path, toy_store, predict="action"), data=None, mixture=parts)
    actions, is_known = action_labels(cfg, open_mixture(None, parts, 16, None))
    assert is_known.all() and (actions[: store.num_frames] == 7).all()
    assert np.array_equal(actions[store.num_frames :], read_store(other).actions)
    with pytest.raises(ValueError, match="action_labels=somewhere beside a mixture: name them in it"):
        pretrain.run(dataclasses.replace(cfg, action_labels="somewhere"))
    index = load_file(other / "index.safetensors")
    write_tensors(other / "index.safetensors", {name: value for name, value in index.items() if name != "action"})
    with pytest.raises(ValueError, match="other has no actions: give it labels="):
        pretrain.run(cfg)
