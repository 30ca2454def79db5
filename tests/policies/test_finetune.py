import numpy as np
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file

from lapa.checkpoint import read_json, write_tensors
from lapa.data import read_store, to_float
from lapa.latent_vla import ground, pretrain
from lapa.schema import FinetuneConfig, GroundConfig, PretrainConfig, Runtime, Training, WordText
from policies import finetune
from policies.lapa.modeling_lapa import LapaPolicy
from tests.lapa.latent_vla.conftest import write_labels, write_store
from tests.lapa.latent_vla.test_pretrain import BACKBONE

RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("demos") / "store")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, demos):
    """Folders of a trunk pretrained on latent actions, on true ones, and on true ones in bins."""
    folder = tmp_path_factory.mktemp("pretrained")
    labels = write_labels(folder / "labels", demos)
    for name, target, head in (
        ("latent", "latent", "chunk"),
        ("action", "action", "chunk"),
        ("bins", "action", "bins"),
    ):
        pretrain.run(
            PretrainConfig(
                output_dir=str(folder / name),
                data=str(demos),
                labels=str(labels),
                predict=target,
                backbone=BACKBONE,
                text=WordText(),
                image_size=16,
                chunk_size=3,
                action_head=head,
                num_bins=8,
                holdout_fraction=0.2,
                training=training(2),
                runtime=RUNTIME,
            )
        )
    return folder


def training(num_steps: int) -> Training:
    return Training(num_steps=num_steps, batch_size=16, learning_rate=3e-3, warmup_steps=5, tensorboard=False)


def config(folder, demos, num_steps=2, **changes) -> FinetuneConfig:
    values = {
        "output_dir": str(folder / "policy"),
        "data": str(demos),
        "backbone": BACKBONE,
        "text": WordText(),
        "image_size": 16,
        "random_shift_pixels": 1,
        "num_bins": 8,
        "chunk_size": 3,
        "training": training(num_steps),
        "runtime": RUNTIME,
    }
    return FinetuneConfig(**(values | changes))


def trunk_of(folder) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): value for name, value in weights.items() if "trunk." in name}


@pytest.mark.parametrize("action_head", ["chunk", "bins"])
def test_the_saved_policy_acts_as_the_instruction_says_in_units_of_the_data(tmp_path, demos, action_head):
    finetune.run(config(tmp_path, demos, num_steps=150, action_head=action_head))
    folder = tmp_path / "policy"
    policy = LapaPolicy.from_pretrained(folder)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    store = read_store(demos)
    frames = to_float(store.frames[store.episode_offsets[:2] + 1])
    batch = preprocessor({"observation.image": frames, "task": store.instructions[:2]})
    action = postprocessor(policy.select_action(batch))
    # The toy's three distinct actions end up on the edges of wide bins, so a midpoint is half of one.
    scale = 1.0 if action_head == "chunk" else 0.5
    assert torch.allclose(action, scale * torch.tensor([[-1.0, 0.5], [1.0, 0.5]]), atol=0.2)


@pytest.mark.parametrize("action_head", ["diffusion", "flow"])
def test_a_policy_that_samples_its_chunks_acts_as_the_instruction_says(tmp_path, demos, pretrained, action_head):
    # A trunk pretrained on actions has a linear head, which is of no use here.
    options = config(tmp_path, demos, num_steps=220, action_head=action_head, pretrained=str(pretrained / "action"))
    options.pretrained_learning_rate_ratio = 1.0
    finetune.run(options)
    folder = tmp_path / "policy"
    assert read_json(folder / "metrics.json")["kept_action_head"] is False
    policy = LapaPolicy.from_pretrained(folder)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    store = read_store(demos)
    frames = to_float(store.frames[store.episode_offsets[:2] + 1])
    batch = preprocessor({"observation.image": frames, "task": store.instructions[:2]})
    action = postprocessor(policy.select_action(batch))
    assert torch.allclose(action, torch.tensor([[-1.0, 0.5], [1.0, 0.5]]), atol=0.3)
    policy.reset()
    assert torch.equal(postprocessor(policy.select_action(batch)), action)
    chunks = [policy.predict_action_chunk(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(chunks[0], chunks[1]) and not torch.equal(chunks[0], chunks[2])


def test_a_policy_without_pretraining_may_start_grounded(tmp_path, demos, pretrained):
    still = training(1)
    still.learning_rate, still.weight_decay = 1e-12, 0.0
    grounding = str(tmp_path / "grounding")
    options = GroundConfig(
        output_dir=grounding, data=str(demos), text=WordText(), width=32, image_size=16, training=training(2)
    )
    ground.run(options)
    finetune.run(config(tmp_path, demos, grounding=grounding, training=still))
    own, learned = trunk_of(tmp_path / "policy"), load_file(f"{grounding}/model.safetensors")
    for name in ("text_encoder.embedding.weight", "image_tokenizer.stem.norm.weight"):
        torch.testing.assert_close(own[f"trunk.{name}"], learned[name.removeprefix("image_tokenizer.")])
    with pytest.raises(ValueError, match=r"set pretrain\.grounding instead"):
        finetune.run(config(tmp_path, demos, grounding=grounding, pretrained=str(pretrained / "latent")))


def test_the_pretrained_trunk_is_where_finetuning_starts(tmp_path, demos, pretrained):
    still = training(1)
    still.learning_rate = 0.0
    finetune.run(config(tmp_path, demos, pretrained=str(pretrained / "latent"), training=still))
    before, after = trunk_of(pretrained / "latent"), trunk_of(tmp_path / "policy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "policy" / "metrics.json")["kept_action_head"] is False


def test_a_trunk_pretrained_on_actions_keeps_head_and_statistics(tmp_path, demos, pretrained):
    finetune.run(config(tmp_path, demos, pretrained=str(pretrained / "action"), num_episodes=2))
    assert read_json(tmp_path / "policy" / "metrics.json")["kept_action_head"] is True
    (statistics,) = (tmp_path / "policy").glob("policy_postprocessor*.safetensors")
    saved = read_json(pretrained / "action" / "config.json")
    assert np.allclose(load_file(statistics)["action.mean"], saved["action_mean"])


def test_a_pretrained_head_of_bins_goes_on_as_ranks_among_the_demonstrations(tmp_path, demos, pretrained):
    """Demonstrations that move twice as far: the head is kept, the bins' edges are theirs."""
    far = write_store(tmp_path / "far")
    index = load_file(far / "index.safetensors")
    write_tensors(far / "index.safetensors", index | {"action": 2 * index["action"]})
    still = training(1)
    still.learning_rate, still.weight_decay = 1e-12, 0.0
    options = config(tmp_path, far, pretrained=str(pretrained / "bins"), action_head="bins", training=still)
    finetune.run(options)
    assert read_json(tmp_path / "policy" / "metrics.json")["kept_action_head"] is True
    before, after = load_file(pretrained / "bins/model.safetensors"), load_file(tmp_path / "policy/model.safetensors")
    torch.testing.assert_close(after["model.action_head.output.weight"], before["action_head.output.weight"])
    widths = [
        edges[:, -1] - edges[:, 0] for edges in (before["action_head.edges_AN"], after["model.action_head.edges_AN"])
    ]
    torch.testing.assert_close(widths[1], 2 * widths[0], rtol=0.1, atol=0.0)


def test_another_head_or_chunk_size_than_the_pretrained_one_starts_anew(tmp_path, demos, pretrained):
    bins = {"action_head": "bins"}
    for number, (name, changes) in enumerate(
        (("action", bins), ("bins", {}), ("action", {"chunk_size": 2}), ("bins", bins | {"num_bins": 4}))
    ):
        folder = tmp_path / str(number)
        finetune.run(config(folder, demos, pretrained=str(pretrained / name), **changes))
        assert read_json(folder / "policy" / "metrics.json")["kept_action_head"] is False


def test_scratch_differs_by_seed_and_repeats_by_it(tmp_path, demos):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        options = config(tmp_path / str(number), demos)
        options.training.seed = seed
        finetune.run(options)
        weights.append(load_file(tmp_path / str(number) / "policy" / "model.safetensors"))
    name = "model.trunk.readout"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])


def test_more_episodes_than_there_are_is_an_error(tmp_path, demos):
    with pytest.raises(ValueError, match=r"num_episodes is 99, .* has 20"):
        finetune.run(config(tmp_path, demos, num_episodes=99))


def test_a_folder_without_a_model_is_named(tmp_path, demos):
    with pytest.raises(ValueError, match="expected a folder written by `lapa pretrain`"):
        finetune.run(config(tmp_path, demos, pretrained=str(tmp_path)))


def test_pretrained_weights_learn_slower_than_the_new_head(tmp_path, demos, pretrained):
    finetune.run(config(tmp_path, demos, num_steps=3, pretrained=str(pretrained / "latent")))
    before, after = trunk_of(pretrained / "latent"), trunk_of(tmp_path / "policy")
    # AdamW moves a weight by at most about its rate a step: three warm-up steps at 0.05 x 3e-3.
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 3 * 0.05 * 3e-3
