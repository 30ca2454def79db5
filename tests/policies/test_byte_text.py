"""Text encoders without a tokenizer, through the whole pipeline."""

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.schema import BltText, ByteText, FinetuneConfig, PretrainConfig, Runtime, Training
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from tests.lapa.latent_vla.conftest import write_labels, write_store
from tests.lapa.latent_vla.test_pretrain import BACKBONE

SMALL = {"max_bytes": 24, "byte_width": 16, "num_byte_heads": 2}
TEXTS = {
    "bytes": ByteText(**SMALL),
    "blt": BltText(**SMALL, ngram_table_size=50, entropy_width=16, entropy_steps=20, mean_patch_bytes=3.0),
}
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("demos") / "store")


def training(num_steps: int) -> Training:
    return Training(num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False)


def finetune_options(folder, demos, num_steps: int, text, pretrained=None) -> FinetuneConfig:
    return FinetuneConfig(
        output_dir=str(folder / "policy"),
        data=str(demos),
        pretrained=pretrained,
        backbone=BACKBONE,
        text=text,
        image_size=16,
        random_shift_pixels=1,
        chunk_size=3,
        training=training(num_steps),
        runtime=RUNTIME,
    )


def actions(folder, demos) -> torch.Tensor:
    """What the saved policy does, in units of the data, told to go left and right."""
    policy = LapaPolicy.from_pretrained(folder)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    store = read_store(demos)
    frames = to_float(store.frames[store.episode_offsets[:2] + 1])
    batch = preprocessor({"observation.image": frames, "task": store.instructions[:2]})
    return postprocessor(policy.select_action(batch))


@pytest.mark.parametrize("name", TEXTS)
def test_pretrained_and_finetuned_the_policy_does_as_it_is_told(tmp_path, demos, name):
    pretrained = pretrain.run(
        PretrainConfig(
            output_dir=str(tmp_path / "pretrained"),
            data=str(demos),
            labels=str(write_labels(tmp_path / "labels", demos)),
            backbone=BACKBONE,
            text=TEXTS[name],
            image_size=16,
            random_shift_pixels=1,
            holdout_fraction=0.2,
            training=training(60),
            runtime=RUNTIME,
        )
    )
    assert pretrained["token_0_accuracy"] == 1.0
    finetune.run(finetune_options(tmp_path, demos, 60, TEXTS[name], pretrained=str(tmp_path / "pretrained")))
    # Patches, byte model and threshold among them, come from the policy's folder alone.
    (tmp_path / "pretrained").rename(tmp_path / "gone")
    found = actions(tmp_path / "policy", demos)
    assert found[0, 0] < -0.5 and found[1, 0] > 0.5


def test_a_policy_from_scratch_trains_its_byte_model_too(tmp_path, demos):
    finetune.run(finetune_options(tmp_path, demos, 2, TEXTS["blt"]))
    assert actions(tmp_path / "policy", demos).shape == (2, 2)
    encoder = LapaPolicy.from_pretrained(tmp_path / "policy").model.trunk.text_encoder
    assert torch.isfinite(encoder.theta)
