"""A tiny vision-language model of transformers through the main job: pretrain, finetune, act, without its folder."""

import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from lapa import application, schema
from lapa.checkpoint import read_json
from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.schema import FinetuneConfig, HuggingFaceBackbone, HuggingFaceText, PretrainConfig, Runtime, Training
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from tests.lapa.backbones import tiny_models
from tests.lapa.latent_vla.conftest import write_labels, write_store

pytest.importorskip("transformers")
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
PRESETS = ["smolvlm2", "qwen2_5_vl", "qwen3_vl", "paligemma2", "lapa_7b"]


def training(num_steps: int) -> Training:
    return Training(num_steps=num_steps, batch_size=8, learning_rate=5e-3, warmup_steps=5, tensorboard=False)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_pretrained_and_finetuned_it_acts_after_its_folder_is_gone(tmp_path, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    demos = write_store(tmp_path / "store")
    labels = write_labels(tmp_path / "labels", demos)
    folder = tiny_models.write_model(tmp_path / "model", "smolvlm")
    shared = {
        "data": str(demos),
        "backbone": HuggingFaceBackbone(path=str(folder), lora_rank=lora_rank, freeze_vision=False),
        "text": HuggingFaceText(),
        "image_size": 16,
        "image_tokenizer": "huggingface",
        "random_shift_pixels": 0,
        "chunk_size": 3,
        "runtime": RUNTIME,
    }
    pretrain.run(
        PretrainConfig(
            output_dir=str(tmp_path / "pretrained"),
            labels=str(labels),
            holdout_fraction=0.2,
            training=training(3),
            **shared,
        )
    )
    shutil.rmtree(folder)
    finetune.run(
        FinetuneConfig(
            output_dir=str(tmp_path / "policy"),
            pretrained=str(tmp_path / "pretrained"),
            pretrained_learning_rate_ratio=1.0,
            training=training(60),
            **shared,
        )
    )
    saved = read_json(tmp_path / "policy" / "config.json")
    assert saved["backbone"]["path"] is None and saved["backbone"]["model_config"]["model_type"] == "smolvlm"

    policy = LapaPolicy.from_pretrained(tmp_path / "policy")
    store = read_store(demos)
    frames = to_float(store.frames[store.episode_offsets[:2] + 1])
    batch = {"observation.image": frames, "task": store.instructions[:2]}
    action = policy.select_action(batch)
    assert action.shape == (2, 2) and action.isfinite().all()
    # The instruction says left for one and right for the other; the first action dimension says where it moves.
    assert action[0, 0] < 0 < action[1, 0]
    # Finetuned further: what a second process would load is complete.
    again = LapaPolicy.from_pretrained(tmp_path / "policy")
    assert torch.equal(again.select_action(batch), action)


def test_scratch_starts_from_the_folder_and_is_saved_without_it(tmp_path):
    demos = write_store(tmp_path / "store", num_episodes=4)
    folder = tiny_models.write_model(tmp_path / "model", "llama")
    finetune.run(
        FinetuneConfig(
            output_dir=str(tmp_path / "policy"),
            data=str(demos),
            backbone=HuggingFaceBackbone(path=str(folder), freeze_language=True),
            text=HuggingFaceText(),
            image_size=16,
            image_tokenizer="grid",
            training=training(2),
            runtime=RUNTIME,
        )
    )
    shutil.rmtree(folder)
    policy = LapaPolicy.from_pretrained(tmp_path / "policy")
    images = torch.from_numpy(np.zeros((1, 3, 16, 16), np.float32))
    assert policy.select_action({"observation.image": images, "task": "go left"}).isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete_and_chosen_by_name(preset):
    application.register_schema()
    with initialize_config_module("configs", version_base="1.3"):
        given = ["backbone.path=some/folder"] if preset == "lapa_7b" else []
        composed = compose(
            "pretrain", [f"backbone={preset}", "text=huggingface", "image_tokenizer=huggingface", *given, "data=d"]
        )
        run = compose("run", [f"backbone@pretrain.backbone={preset}", *(f"pretrain.{g}" for g in given)])
    for backbone in (composed.backbone, run.pretrain.backbone):
        built = schema.from_dict("backbone", dict(backbone))
        assert isinstance(built, HuggingFaceBackbone) and built.path and built.lora_rank
