"""Every backbone that needs no download, alone and combined, from labels to a policy that does as it is told."""

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

from lapa import schema
from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.schema import BltText, FinetuneConfig, MoTBackbone, PretrainConfig, Runtime, Training, WordText
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from tests.lapa.latent_vla.conftest import write_labels, write_store

RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
SIZES = {"width": 32, "num_layers": 2, "num_heads": 2}
BLT = BltText(max_bytes=24, byte_width=16, num_byte_heads=2, ngram_table_size=50, patcher="space")
NAMES = sorted(set(schema.GROUPS["backbone"]) - {"huggingface"})


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("demos") / "store")


def training(num_steps: int) -> Training:
    return Training(num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False)


def error_of_the_policy(tmp_path, demos, backbone, text, action_head="chunk") -> torch.Tensor:
    """Pretrain, finetune, load as LeRobot does, act on two instructions; the error as a share of how they differ."""
    common = {"data": str(demos), "backbone": backbone, "text": text, "image_size": 16, "chunk_size": 3}
    pretrain.run(
        PretrainConfig(
            output_dir=str(tmp_path / "vla"),
            labels=str(write_labels(tmp_path / "labels", demos)),
            holdout_fraction=0.2,
            training=training(20),
            runtime=RUNTIME,
            **common,
        )
    )
    finetune.run(
        FinetuneConfig(
            output_dir=str(tmp_path / "policy"),
            pretrained=str(tmp_path / "vla"),
            pretrained_learning_rate_ratio=1.0,
            random_shift_pixels=0,
            action_head=action_head,
            training=training(120),
            runtime=RUNTIME,
            **common,
        )
    )
    policy = LapaPolicy.from_pretrained(tmp_path / "policy")
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "policy"))
    store = read_store(demos)
    frames = to_float(store.frames[store.episode_offsets[:2] + 1])
    batch = preprocessor({"observation.image": frames, "task": store.instructions[:2]})
    actions = postprocessor(policy.select_action(batch))
    expected = torch.from_numpy(store.actions[store.episode_offsets[:2] + 1])
    return (actions - expected).abs().max() / (expected[0] - expected[1]).abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_of_every_backbone_does_as_it_is_told(name, demos, tmp_path):
    assert error_of_the_policy(tmp_path, demos, schema.GROUPS["backbone"][name](**SIZES), WordText()) < 0.3


def test_backbone_text_encoder_and_denoised_head_combine(demos, tmp_path):
    assert error_of_the_policy(tmp_path, demos, MoTBackbone(**SIZES), BLT, action_head="flow") < 0.3
