import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapa.checkpoint import load_training_state, write_tensors
from lapa.data import FramePairs, FrameStore, read_store, split_episodes
from lapa.quantizer import train_quantizer
from lapa.quantizer.base import build_quantizer, load_quantizer
from lapa.quantizer.targets.base import PairBatch, pixel_error
from lapa.quantizer.targets.batches import PairSampler
from lapa.quantizer.targets.feature_sources import build_features
from lapa.quantizer.targets.latent_consistency import shift
from lapa.quantizer.targets.objective import TrainingObjective, build_objective
from lapa.runtime import setup
from lapa.schema import (
    ConvolutionalQuantizer,
    FeatureTarget,
    FSQCodebook,
    GroundingHead,
    LanguageConditioning,
    LatentConsistencyTarget,
    MotionPixelTarget,
    PairData,
    PerceptualTarget,
    PixelTarget,
    ProprioceptionHead,
    Runtime,
    Training,
    TrainQuantizerConfig,
)
from lapa.trainer import fit

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)
TARGETS = {
    "pixels": PixelTarget(),
    "motion_pixels": MotionPixelTarget(),
    "perceptual": PerceptualTarget(),
    "features": FeatureTarget(width=16),
    "latent_consistency": LatentConsistencyTarget(width=16),
}
OPTIONS = {
    "language": {"language": LanguageConditioning(share_of_steps=0.4)},
    "proprioception": {"proprioception": ProprioceptionHead(weight=0.5, hidden_width=16)},
    "grounding": {"grounding": GroundingHead(share_of_episodes=0.4, share_of_batch=0.5)},
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
latent_targets = pytest.mark.parametrize(
    "target", [TARGETS["features"], TARGETS["latent_consistency"]], ids=["features", "latent_consistency"]
)
every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def configuration(output_dir: Path | str = "unused", data: Path | str = "unused", **changes) -> TrainQuantizerConfig:
    return (
        TrainQuantizerConfig(
            output_dir=str(output_dir),
            data=PairData(path=str(data), frame_gap_s=0.2, holdout_fraction=0.25),
            model=ConvolutionalQuantizer(image_size=32, width=8, latent_dim=8, num_keypoints=8),
            codebook=FSQCodebook(code_length=2, codebook_size=4),
            num_eval_pairs=32,
            training=Training(
                num_steps=10,
                batch_size=8,
                warmup_steps=2,
                checkpoint_every_steps=4,
                log_every_steps=1,
                tensorboard=False,
            ),
            runtime=CPU,
        )
        if not changes
        else replace(configuration(output_dir, data), **changes)
    )


@pytest.fixture(scope="module")
def store(moving_discs) -> FrameStore:
    """The discs, with an instruction an episode and their position as the state."""
    store = read_store(moving_discs)
    position = np.cumsum(store.actions, 0).astype(np.float32)
    return replace(store, states=position, instructions=[f"move disc {i}" for i in range(store.num_episodes)])


@pytest.fixture(scope="module")
def stated_discs(moving_discs, tmp_path_factory) -> Path:
    """The folder of the discs, with their position as the state."""
    folder = tmp_path_factory.mktemp("data") / "stated"
    folder.mkdir()
    for name in ("frames.u8", "store.json"):
        (folder / name).symlink_to(moving_discs / name)
    index = load_file(moving_discs / "index.safetensors")
    write_tensors(folder / "index.safetensors", index | {"state": index["action"].cumsum(0)})
    return folder


def objective_of(config: TrainQuantizerConfig, store: FrameStore) -> tuple[TrainingObjective, PairSampler]:
    torch.manual_seed(0)
    quantizer = build_quantizer(config.model, config.codebook)
    train, _ = split_episodes(store, config.data.holdout_fraction, 0)
    sampler = PairSampler(FramePairs(store, 2, train), config, torch.device("cpu"))
    return build_objective(config, quantizer, sampler).train(), sampler


def away_from_zero(objective: TrainingObjective) -> None:
    """Forward models start from the copy of the first frame: one step away from it, every weight counts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def gradient_of(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@every_target
def test_loss_is_finite_and_reaches_the_inverse_and_the_forward_model(target, store):
    objective, sampler = objective_of(configuration(target=target), store)
    away_from_zero(objective)
    loss, numbers = objective(sampler(np.random.default_rng(0)))
    assert loss.ndim == 0 and loss.isfinite() and all(torch.as_tensor(value).isfinite() for value in numbers.values())
    loss.backward()
    assert gradient_of(objective.quantizer.inverse_model) > 0 and gradient_of(objective.quantizer.forward_model) > 0


@every_option
def test_options_add_to_the_loss_and_reach_the_inverse_model(option, store):
    objective, sampler = objective_of(configuration(**option), store)
    away_from_zero(objective)
    if objective.language is not None:
        objective.language.steps_seen.fill_(100)
    loss, numbers = objective(sampler(np.random.default_rng(0)))
    loss.backward()
    assert loss.isfinite() and gradient_of(objective.quantizer.inverse_model) > 0
    for name in ("proprioception", "grounding"):
        assert (f"{name}_error" in numbers) == (name in option)
        if name in option:
            assert gradient_of(getattr(objective, name)) > 0


@latent_targets
def test_pixels_train_the_forward_model_but_not_the_latent_action(target, store):
    batch_loss = {}
    for weight in (0.0, 0.5, 1.0):
        objective, sampler = objective_of(configuration(target=replace(target, pixel_weight=weight)), store)
        away_from_zero(objective)
        for parameter in objective.target.parameters():
            parameter.data.zero_()  # nothing is left to learn from but pixels
        loss, _ = objective(sampler(np.random.default_rng(0)))
        loss.backward()
        assert gradient_of(objective.quantizer.forward_model) > 0
        batch_loss[weight] = gradient_of(objective.quantizer.inverse_model)
    assert batch_loss[0.0] == 0
    assert batch_loss[0.5] == pytest.approx(0.5 * batch_loss[1.0], rel=1e-3) and batch_loss[1.0] > 0


@every_target
def test_the_quantizer_starts_the_same_whatever_the_target(target, store):
    plain, _ = objective_of(configuration(), store)
    other, _ = objective_of(configuration(target=target, **OPTIONS["language"], **OPTIONS["grounding"]), store)
    for (name, one), two in zip(
        plain.quantizer.state_dict().items(), other.quantizer.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


FITTED = {"pixels": 0.35, "motion_pixels": 0.35, "perceptual": 0.5, "features": 0.5, "latent_consistency": 0.5}


@pytest.mark.parametrize("name", FITTED)
def test_overfits_one_batch(name, store):
    """The loss of a batch falls below this share of where it began."""
    target = TARGETS[name]
    if name == "latent_consistency":
        target = replace(target, ema_decay=0.9)
    objective, sampler = objective_of(configuration(target=target), store)
    batch = sampler(np.random.default_rng(0))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(100):
        loss, numbers = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < FITTED[name] * losses[0]
    if name == "latent_consistency":
        assert numbers["feature_error"] < 0.6 and numbers["feature_std"] > 0.3 and numbers["change_std"] > 0.1


def test_overfits_one_batch_with_every_option(store):
    config = configuration(**OPTIONS["language"], **OPTIONS["proprioception"], **OPTIONS["grounding"])
    config = replace(config, training=replace(config.training, num_steps=150))
    objective, sampler = objective_of(config, store)
    batch = sampler(np.random.default_rng(0))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=4e-3)
    for _ in range(config.training.num_steps):
        loss, numbers = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels = loss.item() - 0.5 * float(numbers["proprioception_error"]) - float(numbers["grounding_error"])
    assert pixels < 0.5
    assert numbers["proprioception_error"] < 0.4 and numbers["grounding_error"] < 0.4


def test_pixel_error_is_one_for_the_copy_and_counts_motion_more():
    first = torch.zeros(2, 3, 8, 8)
    second = first.clone()
    second[:, :, :2] = 0.5
    frames = torch.stack([first, second], 1)
    assert pixel_error(first, frames).item() == pytest.approx(1)
    background_wrong = second.clone()
    background_wrong[:, :, 4:] = 0.1
    assert pixel_error(background_wrong, frames, 4.0) < pixel_error(background_wrong, frames)


def test_perceptual_error_prefers_a_sharp_prediction(store):
    objective, sampler = objective_of(configuration(target=TARGETS["perceptual"]), store)
    batch = sampler(np.random.default_rng(0))
    second = batch.frames_B2CHW[:, 1]
    blurred = torch.nn.functional.avg_pool2d(second, 3, 1, 1)
    scale = (blurred - second).square().mean().sqrt()
    brighter = second + scale  # as wrong in pixels, and sharp
    latents = torch.zeros(8, 2, 8)
    assert pixel_error(brighter, batch.frames_B2CHW).item() == pytest.approx(
        pixel_error(blurred, batch.frames_B2CHW).item(), rel=1e-3
    )
    losses = [objective.target(batch, latents, image)[0] for image in (second, brighter, blurred)]
    assert losses[0] < 1e-4 and losses[1] < losses[2]


def test_shift_moves_both_frames_alike():
    frames = torch.zeros(2, 2, 3, 16, 16)
    frames[0, :, :, 8, 5] = 1
    moved = shift(frames, torch.tensor([[2, -3], [0, 0]]))
    assert moved.shape == frames.shape and torch.equal(moved[1], frames[1])
    assert (moved[0, :, :, 5, 7] == 1).all() and moved[0].sum() == frames[0].sum()


def test_the_inverse_model_looks_farther_but_never_past_the_episode(store):
    target = LatentConsistencyTarget(max_gap_ratio=2.0)
    _, sampler = objective_of(configuration(target=target), store)
    batch = sampler(np.random.default_rng(0))
    frames = torch.from_numpy(np.array(store.frames)).movedim(-1, 1) / 255
    episode = store.episode_of_frame()

    def place(images):
        return [int((frames - image).abs().amax((1, 2, 3)).argmin()) for image in images]

    first, second, further = place(batch.frames_B2CHW[:, 0]), place(batch.frames_B2CHW[:, 1]), place(batch.further_BCHW)
    ahead = np.array(further) - np.array(first)
    assert (np.array(second) - np.array(first) == 2).all()
    assert ahead.min() >= 2 and ahead.max() <= 4 and len(set(ahead)) > 1
    assert (episode[first] == episode[further]).all()


def test_the_average_follows_the_encoder_and_takes_no_gradient(store):
    objective, sampler = objective_of(
        configuration(target=replace(TARGETS["latent_consistency"], ema_decay=0.5)), store
    )
    encoder, average = objective.target.encoder.stem.weight, objective.target.average.stem.weight
    encoder.data.add_(1)
    before = average.clone()
    objective(sampler(np.random.default_rng(0)))[0].backward()
    torch.testing.assert_close(average, (before + encoder) / 2)
    assert average.grad is None and encoder.grad is not None
    objective.eval()
    objective(sampler(np.random.default_rng(0)))
    torch.testing.assert_close(average, (before + encoder) / 2)


def test_grounding_sees_the_actions_of_its_episodes_alone(store):
    grounding = GroundingHead(share_of_episodes=0.3, share_of_batch=0.25)
    config = configuration(grounding=grounding)
    train, held_out = split_episodes(store, 0.25, 0)
    seen = {}
    for name, poisoned in (("clean", []), ("held out", held_out)):
        actions = store.actions.copy()
        actions[np.isin(store.episode_of_frame(), poisoned)] = np.nan
        _, sampler = objective_of(config, replace(store, actions=actions))
        labelled = np.unique(store.episode_of_frame()[sampler.pairs.first_frames[sampler.labelled_pairs]])
        assert len(labelled) == round(0.3 * len(train)) and set(labelled) <= set(train)
        batches = [sampler(np.random.default_rng(step)) for step in range(5)]
        seen[name] = torch.cat([batch.actions_BA for batch in batches])
        assert all(batch.has_action_B.sum() >= 2 for batch in batches)
        assert len(sampler.labelled_places) == round(0.25 * config.training.batch_size)
        assert all((batch.actions_BA[~batch.has_action_B] == 0).all() for batch in batches)
        seen[f"{name} statistics"] = torch.cat(sampler.action_statistics())
    assert torch.equal(seen["clean"], seen["held out"])
    assert torch.equal(seen["clean statistics"], seen["held out statistics"])


def test_language_goes_after_its_share_of_the_steps(store):
    """First the task-irrelevant codes learn, beside the instruction; then they are frozen, and ours learn."""
    objective, sampler = objective_of(configuration(**OPTIONS["language"]), store)
    away_from_zero(objective)
    trained = []
    for step in range(10):
        objective.zero_grad()
        loss, _ = objective(sampler(np.random.default_rng(step)))
        loss.backward()
        irrelevant, own = objective.language.inverse.inverse_model, objective.quantizer.inverse_model
        trained.append((gradient_of(irrelevant) > 0, gradient_of(objective.language.words) > 0, gradient_of(own) > 0))
    assert trained == [(True, True, False)] * 4 + [(False, False, True)] * 6


def test_decoding_holds_task_irrelevant_codes_at_their_mean(store, tmp_path):
    from lapa.checkpoint import save_model

    objective, sampler = objective_of(configuration(**OPTIONS["language"]), store)
    away_from_zero(objective)
    for step in range(10):
        objective(sampler(np.random.default_rng(step)))
    objective.finish()
    quantizer = objective.quantizer.eval()
    frames = sampler(np.random.default_rng(0)).frames_B2CHW
    with torch.no_grad():
        codes, latents = quantizer.encode(frames)
        decoded = quantizer.decode(frames[:, 0], codes)
        torch.testing.assert_close(decoded, quantizer.predict(frames[:, 0], latents + objective.language.mean_LD))
        assert not torch.equal(decoded, quantizer.predict(frames[:, 0], latents))
    save_model(tmp_path, quantizer.state_dict(), quantizer.description())
    with torch.no_grad():
        assert torch.equal(load_quantizer(tmp_path).decode(frames[:, 0], codes), decoded)


def small_vision_model(name: str, folder: Path) -> Path:
    """A tiny random DINOv2 or DINOv3, saved as transformers saves them."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    torch.manual_seed(0)
    if name == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, **sizes))
    elif name == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(patch_size=14, num_register_tokens=3, **sizes)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.DINOv3ViTConfig(patch_size=14, num_register_tokens=4, intermediate_size=32, **sizes)
        model = transformers.DINOv3ViTModel(config)
    model.save_pretrained(folder)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    processor["crop_size"] = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3"])
def test_pretrained_features_are_the_patch_tokens(name, tmp_path, store):
    folder = small_vision_model(name, tmp_path)
    target = FeatureTarget(source="transformers", model=str(folder), width=16)
    source = build_features(target)
    images = torch.rand(2, 3, 28, 28)
    features = source(images)
    assert features.shape == (2, 16, 2, 2) and not features.requires_grad
    assert source(torch.rand(1, 3, 64, 64)).shape == (1, 16, 2, 2)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    tokens = source.network(pixel_values=normalised).last_hidden_state[:, -4:]
    torch.testing.assert_close(features.flatten(2).mT, tokens)

    objective, sampler = objective_of(configuration(target=replace(target, input_size=56)), store)
    loss, _ = objective(sampler(np.random.default_rng(0)))
    loss.backward()
    assert loss.isfinite()
    # A frozen network is no part of the state that a checkpoint carries.
    assert sum(tensor.numel() for tensor in objective.target.state_dict().values()) < 30_000


def test_random_convolutions_depend_on_their_seed_alone():
    images = torch.rand(2, 3, 32, 32)
    one, same, other = (build_features(FeatureTarget(seed=seed))(images) for seed in (0, 0, 1))
    assert one.shape == (2, 96, 8, 8) and torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (FeatureTarget(source="dino"), "expected one of"),
        (FeatureTarget(source="transformers"), "needs target.model"),
        (FeatureTarget(source="transformers", model="/nowhere"), "no image model with safetensors"),
        (FeatureTarget(source="timm", model="vit_small_patch14_dinov2"), "pip install timm|needs target.weights"),
        (MotionPixelTarget(motion_weight=0.0), "target=pixels"),
        (LatentConsistencyTarget(ema_decay=1.0), "ema_decay"),
        (LatentConsistencyTarget(max_gap_ratio=0.5), "max_gap_ratio"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_impossible_targets_are_refused(target, message, store):
    with pytest.raises(ValueError, match=message):
        objective_of(configuration(target=target), store)


def test_a_model_folder_without_safetensors_is_refused(tmp_path):
    folder = small_vision_model("dinov2", tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no image model with safetensors"):
        build_features(FeatureTarget(source="transformers", model=str(folder)))


@pytest.mark.parametrize(
    ("option", "missing", "message"),
    [
        ("language", {"instructions": [""] * 12}, "has no instructions"),
        ("proprioception", {"states": None}, "has no states"),
        ("grounding", {"actions": None}, "has no actions"),
    ],
)
def test_options_say_what_the_data_lack(option, missing, message, store):
    with pytest.raises(ValueError, match=message):
        objective_of(configuration(**OPTIONS[option]), replace(store, **missing))


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_language_leaves_steps_for_both_parts(share, store):
    with pytest.raises(ValueError, match="leaves steps for both parts"):
        objective_of(configuration(language=LanguageConditioning(share_of_steps=share)), store)


def test_training_killed_and_resumed_ends_with_the_same_bytes(store, tmp_path):
    """With everything that keeps a state: an average encoder, running means and the steps of the first part."""
    config = configuration(target=TARGETS["latent_consistency"], **OPTIONS["language"], **OPTIONS["grounding"])
    compute = setup(CPU)

    class Killed(Exception):
        pass

    def train(folder: Path, kill_after: int | None) -> dict[str, torch.Tensor]:
        objective, sampler = objective_of(config, store)
        steps = 0

        def loss_function(batch: PairBatch):
            nonlocal steps
            steps += 1
            if steps == kill_after:
                raise Killed
            return objective(batch)

        fit(objective, sampler, loss_function, config.training, compute, folder)
        return objective.state_dict()

    straight = train(tmp_path / "straight", None)
    with pytest.raises(Killed):
        train(tmp_path / "killed", 7)
    objective, _ = objective_of(config, store)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    assert load_training_state(tmp_path / "killed", objective, optimizer, None) == 4
    resumed = train(tmp_path / "killed", None)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_the_stage_runs_to_its_gate(stated_discs, tmp_path):
    config = configuration(tmp_path, stated_discs, target=TARGETS["features"], **OPTIONS["language"])
    result = train_quantizer.run(config)
    assert np.isfinite(result["linear_probe_r2"]) and np.isfinite(result["delta_psnr_db"])


@pytest.mark.parametrize("name", [*TARGETS, *OPTIONS])
def test_the_stage_saves_the_quantizer_alone(name, stated_discs, tmp_path, monkeypatch):
    monkeypatch.setattr(train_quantizer, "measure", lambda *_: {})  # most of the time of so short a training
    changes = OPTIONS[name] if name in OPTIONS else {"target": TARGETS[name]}
    train_quantizer.run(configuration(tmp_path, stated_discs, **changes))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["target"]["name"] == (name if name in TARGETS else "pixels")
    assert config["has_context"] == (name == "language")
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert all(key.split(".")[0] in ("inverse_model", "forward_model", "codebook", "context_LD") for key in saved)
    assert not load_quantizer(tmp_path).training
