"""The robot's state in the policy: read by every head and backbone, in the units of the data, and only where wanted."""

import json

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file

from lapa import schema
from lapa.backbones.base import PROPRIOCEPTION, ROBOT_ACTION, Layout
from lapa.checkpoint import write_tensors
from lapa.data import read_store, to_float
from lapa.latent_vla import pretrain
from lapa.latent_vla.heads import build_action_head
from lapa.latent_vla.model import StateToken, TrunkWithState, build_action_model, build_trunk
from lapa.schema import DenseBackbone, FinetuneConfig, PretrainConfig, Runtime, Training, WordText
from policies import finetune, hindsight
from policies.lapa.modeling_lapa import LapaPolicy
from policies.serving.served_policy import ServedPolicy
from tests.lapa.backbones import tiny_models
from tests.lapa.latent_vla.conftest import write_labels, write_store
from tests.policies.test_lapa_policy import IMAGE_KEY, STATISTICS, new_policy, observation, small_config

STATE = "observation.state"
SIZES = {"width": 32, "num_layers": 2, "num_heads": 2}
RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
STATE_FEATURES = {
    IMAGE_KEY: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    STATE: PolicyFeature(FeatureType.STATE, (3,)),
}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Demonstrations whose instruction and image tell nothing: the first number of the state says where to move."""
    folder = write_store(tmp_path_factory.mktemp("demos") / "store")
    store = read_store(folder)
    episode_of_frame = store.episode_of_frame()
    side = np.where(episode_of_frame % 2, 1.0, -1.0)
    states = np.stack([100 + 5 * side, np.random.default_rng(0).normal(size=store.num_frames), side * 0 + 7], axis=1)
    index = load_file(folder / "index.safetensors")
    write_tensors(folder / "index.safetensors", index | {"state": torch.from_numpy(states.astype(np.float32))})
    np.full(store.frames.shape, 60, np.uint8).tofile(folder / "frames.u8")
    meta = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(meta | {"instructions": ["go"] * store.num_episodes}))
    return folder


def config(folder, demos, num_steps=2, **changes) -> FinetuneConfig:
    values = {
        "output_dir": str(folder / "policy"),
        "data": str(demos),
        "backbone": DenseBackbone(width=32, num_layers=1, num_heads=2),
        "text": WordText(),
        "image_size": 16,
        "random_shift_pixels": 0,
        "chunk_size": 3,
        "use_state": True,
        "training": Training(num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False),
        "runtime": RUNTIME,
    }
    return FinetuneConfig(**(values | changes))


def test_a_finetuned_policy_acts_by_the_state_that_is_served_to_it(tmp_path, demos):
    options = config(tmp_path, demos, num_steps=150)
    options.training.learning_rate = 1e-2
    finetune.run(options)
    policy = ServedPolicy(tmp_path / "policy", torch.device("cpu"))
    assert policy.inputs[STATE] == (3,)
    image = np.full((16, 16, 3), 60, np.uint8)
    for side in (-1.0, 1.0):
        # The last number stood still in the data: a robot on which it moves must not be driven by it.
        state = np.array([100 + 5 * side, 0.0, 7.5], np.float32)
        actions = policy.infer({"observation.image": image, STATE: state, "task": "go"})
        assert actions[0] == pytest.approx([side, 0.5], abs=0.3)


@pytest.mark.parametrize("action_head", ["bins", "diffusion", "flow"])
def test_other_heads_are_finetuned_with_the_state_too(tmp_path, demos, action_head):
    finetune.run(config(tmp_path, demos, action_head=action_head, num_bins=4))
    policy = LapaPolicy.from_pretrained(tmp_path / "policy")
    token = policy.model.state_token
    assert token is not None and token.projection.weight.abs().max() > 0
    preprocessor, _ = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "policy"))
    store = read_store(demos)
    images = to_float(store.frames[:2])
    batch = preprocessor({"observation.image": images, "task": ["go", "go"], STATE: torch.tensor(store.states[[0, 6]])})
    assert batch[STATE][0, 0] == pytest.approx(-1, abs=1e-4) and batch[STATE][1, 0] == pytest.approx(1, abs=1e-4)
    assert policy.predict_action_chunk(batch).isfinite().all()


def test_a_trunk_pretrained_without_states_is_taken_whole_and_the_new_layer_learns_faster(tmp_path, demos):
    pretrain.run(
        PretrainConfig(
            output_dir=str(tmp_path / "vla"),
            data=str(demos),
            labels=str(write_labels(tmp_path / "labels", demos)),
            backbone=DenseBackbone(width=32, num_layers=1, num_heads=2),
            text=WordText(),
            image_size=16,
            holdout_fraction=0.2,
            training=Training(num_steps=2, batch_size=8, tensorboard=False),
            runtime=RUNTIME,
        )
    )
    finetune.run(config(tmp_path, demos, num_steps=3, pretrained=str(tmp_path / "vla")))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("vla", "policy"))
    moved = max(float((after[f"model.{name}"] - before[name]).abs().max()) for name in before if "trunk." in name)
    # AdamW moves a weight by at most about its rate a step: three warm-up steps, the trunk's at 0.05 of 3e-3.
    assert moved < 3 * 0.05 * 3e-3 < after["model.state_token.projection.weight"].abs().max()


BACKBONES = {name: schema.GROUPS["backbone"][name] for name in sorted(schema.GROUPS["backbone"])}


def model_of(backbone: str, action_head: str, tmp_path, with_state: bool = True) -> TrunkWithState:
    torch.manual_seed(0)
    text, image_tokenizer = WordText(), "keypoints"
    if backbone == "huggingface":
        pytest.importorskip("transformers")
        folder = tiny_models.write_model(tmp_path / f"model-{with_state}", "qwen2_5_vl")
        options = schema.HuggingFaceBackbone(path=str(folder))
        text, image_tokenizer = schema.HuggingFaceText(), "huggingface"
    else:
        options = BACKBONES[backbone](**SIZES)
    trunk = build_trunk(options, text, image_tokenizer, 16)
    head = build_action_head(action_head, 32, chunk_size=4, action_dim=2, num_bins=8, num_sampling_steps=4)
    return build_action_model(trunk, head, StateToken(3, 32) if with_state else None).eval()


def inputs(model: TrunkWithState):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    state = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    return images, model.trunk.encode_text(["go to the left", "go right"]), state


@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_every_backbone_the_state_is_seen_by_cached_decoding_as_in_training(backbone, tmp_path):
    """At first no state changes anything; then the chunk does, by the cache and by the whole sequence alike."""
    model = model_of(backbone, "flow", tmp_path)
    images, ids, state = inputs(model)
    with torch.no_grad():
        at_first = model.decode(images, ids, state_BP=state)
        torch.testing.assert_close(model.decode(images, ids, state_BP=-state), at_first)
        torch.nn.init.normal_(model.state_token.projection.weight)
        found = model.decode(images, ids, state_BP=state)
        assert (model.decode(images, ids, state_BP=-state) - found).abs().max() > 1e-3

        head, seen = model.action_head, []
        model.trunk.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))

        def predict(noised_BTA, time_B):
            opening, modalities = model.opening(2, state)
            tokens = torch.cat([opening, head.tokens(noised_BTA, time_B)], dim=1)
            block = torch.tensor([-1, -1, 1, 1, 1, 1])
            modality = torch.tensor(modalities + [ROBOT_ACTION] * 4)
            return head.read(model.trunk(images, ids, tokens, modality, block=block)[:, 2:])

        fixed = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
        expected = head.process.sample(predict, fixed, 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    layout: Layout = seen[0]
    assert layout.modality_ids_BS[0, -6:].tolist() == [PROPRIOCEPTION] + [ROBOT_ACTION] * 5


def test_the_trunks_output_is_little_changed_by_a_state_that_it_has_not_learned_yet(tmp_path):
    with_state, without = (model_of("dense", "chunk", tmp_path, used) for used in (True, False))
    images, ids, state = inputs(without)
    with torch.no_grad():
        change = with_state.hidden(images, ids, state) - without.hidden(images, ids)
    # Hidden states are normalised: another instruction changes them by about 1.
    assert change.square().mean().sqrt() < 0.25


def test_hidden_states_are_hidden_in_training_alone():
    token = StateToken(2, 4, dropout=0.5)
    torch.nn.init.ones_(token.projection.weight)
    readout, state = torch.arange(4.0), torch.ones(200, 2)
    is_hidden = (token(state, readout)[:, 0] == readout).all(1)
    assert 60 < is_hidden.sum() < 140
    assert not (token.eval()(state, readout)[:, 0] == readout).any()


def test_a_batch_without_the_state_or_with_another_one_is_refused():
    policy = new_policy(use_state=True, input_features=STATE_FEATURES)
    assert policy.select_action(observation() | {STATE: torch.zeros(2, 3)}).shape == (2, 2)
    policy.reset()
    with pytest.raises(ValueError, match=r"no 'observation.state'.*use_state=true"):
        policy.select_action(observation())
    with pytest.raises(ValueError, match=r"the state is \(2, 5\), this policy was trained with \(B, 3\)"):
        policy.select_action(observation() | {STATE: torch.zeros(2, 5)})


def test_data_features_and_statistics_without_a_state_are_refused(tmp_path, demos):
    with pytest.raises(
        ValueError, match=r"use_state needs observation.state among the inputs, got .*set use_state=false"
    ):
        new_policy(use_state=True)
    with pytest.raises(ValueError, match=r"observation.state statistics \['mean', 'std'\] are missing"):
        make_pre_post_processors(small_config(use_state=True, input_features=STATE_FEATURES), dataset_stats=STATISTICS)
    with pytest.raises(ValueError, match=r"has no observation.state: record"):
        finetune.run(config(tmp_path, write_store(tmp_path / "store", num_episodes=2)))
    with pytest.raises(ValueError, match=r"state_dropout is 1.0, expected a share"):
        finetune.run(config(tmp_path, demos, state_dropout=1.0))
    with pytest.raises(ValueError, match=r"finetune.use_state is true"):
        hindsight.check(schema.HindsightConfig(finetune=FinetuneConfig(use_state=True)))


def test_policies_saved_before_there_were_states_still_load(tmp_path):
    new_policy().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in saved.items() if name not in ("use_state", "state_dropout")})
    )
    assert LapaPolicy.from_pretrained(tmp_path).predict_action_chunk(observation()).shape == (2, 3, 2)
