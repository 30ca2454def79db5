"""The released architecture against its plain reference, and the import of released weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lapa.checkpoint import save_model
from lapa.data import FramePairs, read_store, to_float
from lapa.quantizer import evaluate_quantizer, import_laq, label
from lapa.quantizer.base import build_quantizer, load_quantizer
from lapa.quantizer.label import load_labels
from lapa.quantizer.laq import LAQ, from_released
from lapa.quantizer.laq_reference import ReferenceLAQ
from lapa.runtime import setup
from lapa.schema import (
    EvaluateQuantizerConfig,
    FSQCodebook,
    ImportLAQConfig,
    LabelConfig,
    LAQQuantizer,
    Runtime,
    SharedNSVQCodebook,
    Training,
)
from lapa.trainer import fit

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)
TINY = {"patch_size": 4, "width": 24, "num_heads": 2, "head_width": 8, "latent_dim": 6}
TINY |= {"image_size": 32, "num_spatial_layers": 2, "num_temporal_layers": 1, "num_decoder_layers": 2}
SHALLOW = TINY | {"num_spatial_layers": 1, "num_decoder_layers": 1}
MIDDLE = {"patch_size": 8, "width": 96, "num_heads": 6, "head_width": 16, "latent_dim": 16}
MIDDLE |= {"image_size": 64, "num_spatial_layers": 3, "num_temporal_layers": 2, "num_decoder_layers": 3}


def random_reference(sizes: dict, seed: int, code_length: int = 4, codebook_size: int = 8) -> ReferenceLAQ:
    """With gains, shifts and scales away from 1 and 0, so that forgetting one of them shows."""
    torch.manual_seed(seed)
    reference = ReferenceLAQ(**sizes, code_length=code_length, codebook_size=codebook_size)
    for parameter in reference.parameters():
        spread = parameter.std() if parameter.numel() > 1 else parameter.new_tensor(0.0)
        parameter.data.add_(0.3 * (0.3 + spread) * torch.randn_like(parameter))
    return reference.eval()


def same_weights(reference: ReferenceLAQ, sizes: dict, code_length: int = 4, codebook_size: int = 8) -> LAQ:
    codebook = SharedNSVQCodebook(code_length=code_length, codebook_size=codebook_size)
    model = build_quantizer(LAQQuantizer(**sizes), codebook)
    model.load_state_dict(from_released(reference.state_dict()), strict=True)
    return model.eval()


def random_pairs(sizes: dict, count: int = 16) -> torch.Tensor:
    return torch.rand(count, 2, 3, sizes["image_size"], sizes["image_size"])


def save_released(path, sizes: dict = TINY, **changes) -> ReferenceLAQ:
    """Write random weights as the released file has them; `changes` replace tensors (None: leave out)."""
    reference = random_reference(sizes, seed=0)
    state = {f"module.{name}": tensor for name, tensor in (reference.state_dict() | changes).items()}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return reference


def test_full_size_has_the_names_and_shapes_of_the_released_file():
    with torch.device("meta"):
        released = ReferenceLAQ().state_dict()
        ours = LAQ(LAQQuantizer(), SharedNSVQCodebook()).state_dict()
    assert len(released) == 493 and sum(tensor.numel() for tensor in released.values()) == 343_864_688
    shapes = {name: tuple(tensor.shape) for name, tensor in from_released(released).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in ours.items()}
    expected = {
        "spatial_rel_pos_bias.net.0.0.weight": (1024, 2),
        "spatial_rel_pos_bias.net.2.weight": (16, 1024),
        "to_patch_emb_first_frame.1.weight": (3072,),
        "enc_temporal_transformer.layers.7.0.dsconv.weight": (1024, 1, 3, 3, 3),
        "enc_spatial_transformer.layers.0.1.null_kv": (16, 0, 64),
        "enc_spatial_transformer.layers.3.1.context_norm.beta": (1024,),
        "enc_spatial_transformer.layers.0.1.to_kv.weight": (2048, 1024),
        "dec_spatial_transformer.layers.0.2.null_kv": (16, 4, 64),
        "dec_spatial_transformer.layers.0.3.1.weight": (5460, 1024),
        "dec_spatial_transformer.layers.0.3.4.weight": (1024, 2730),
        "vq.codebooks": (8, 32),
        "vq.cnn_encoder.2.weight": (32, 32, 3, 3),
        "vq.project_out.weight": (1024, 32),
        "to_pixels_first_frame.0.weight": (3072, 1024),
    }
    assert {name: tuple(released[name].shape) for name in expected} == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sizes", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_codes_and_reconstructions_are_those_of_the_reference(sizes, seed):
    reference = random_reference(sizes, seed)
    model = same_weights(reference, sizes)
    frames = random_pairs(sizes)
    with torch.no_grad():
        codes, second = reference.infer(frames)
        own_codes, quantised = model.encode(frames)
        assert torch.equal(own_codes, codes) and codes.unique().numel() > 2
        torch.testing.assert_close(model.decode(frames[:, 0], own_codes), second, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(frames[:, 0], quantised), second, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("code_length", "grid"), [(1, 8), (2, 8), (16, 16), (64, 16)])
def test_other_numbers_of_tokens_are_those_of_the_reference(code_length, grid):
    sizes = TINY | {"image_size": 2 * grid, "patch_size": 2}
    reference = random_reference(sizes, 0, code_length)
    model = same_weights(reference, sizes, code_length)
    frames = random_pairs(sizes, 4)
    with torch.no_grad():
        codes, second = reference.infer(frames)
        assert torch.equal(model.encode(frames)[0], codes) and codes.shape == (4, code_length)
        torch.testing.assert_close(model.decode(frames[:, 0], codes), second, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_reference():
    reference = random_reference(TINY, 0)
    model = same_weights(reference, TINY)
    frames, weight = random_pairs(TINY, 4), torch.randn(4, 3, 32, 32)
    (reference.decode(frames[:, 0], reference.latents(frames)) * weight).sum().backward()
    (model.predict(frames[:, 0], model.infer(frames)) * weight).sum().backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient.numel())
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == {name for name, gradient in expected.items() if gradient.numel()}
    for name, gradient in own.items():
        torch.testing.assert_close(gradient / largest, expected[name] / largest, atol=2e-5, rtol=0, msg=name)


def test_noise_of_training_is_as_long_as_the_error_and_carries_gradients():
    reference = random_reference(TINY, 0)
    codebook = same_weights(reference, TINY).codebook.train()
    latents = torch.randn(8, 4, 6, requires_grad=True)
    quantised = codebook(latents)
    nearest = codebook.lookup(quantised.codes_BN)
    assert torch.equal(quantised.codes_BN, reference.vq.nearest(latents))
    torch.testing.assert_close((quantised.latents_BLD - latents).norm(dim=-1), (latents - nearest).norm(dim=-1))
    quantised.latents_BLD.square().sum().backward()
    assert latents.grad.abs().min() > 0 and codebook.codebooks.grad.abs().sum() > 0
    assert torch.equal(codebook.eval()(latents).latents_BLD, nearest)


def test_slips_of_the_released_code_are_kept_and_can_be_put_right():
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 6)
    other = latents.clone()
    other[:, 3] += 1
    tokens = torch.randn(2 * 64, 2, 24)
    changed = torch.cat([tokens[:, :1], torch.randn(2 * 64, 1, 24)], 1)
    for compat in (True, False):
        model = LAQ(LAQQuantizer(**TINY, compat=compat), SharedNSVQCodebook()).eval()
        moved = (model.vq.expand(latents) != model.vq.expand(other)).any(-1)[0]
        temporal = model.enc_temporal_transformer
        first_sees_second = not torch.equal(temporal(tokens)[:, 0], temporal(changed)[:, 0])
        assert (moved.tolist() == [False, False, False, True]) != compat
        assert first_sees_second == compat


def test_right_order_of_patches_and_frames_gives_what_a_volume_convolution_gives():
    torch.manual_seed(0)
    model = LAQ(LAQQuantizer(**TINY, compat=False), SharedNSVQCodebook())
    convolution = model.enc_temporal_transformer.layers[0]["0"]
    video = torch.randn(2, 24, 2, 8, 8)
    padded = torch.nn.functional.pad(video, (1, 1, 1, 1, 2, 0))
    expected = video + convolution.dsconv(padded)
    tokens = video.permute(0, 3, 4, 2, 1).reshape(2 * 64, 2, 24)
    out = convolution(tokens).reshape(2, 8, 8, 2, 24).permute(0, 4, 3, 1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compat", [True, False])
def test_learns_to_beat_the_copy_of_the_first_frame_with_any_codebook_and_saves(compat, tmp_path):
    torch.manual_seed(0)
    model = LAQ(LAQQuantizer(**SHALLOW, compat=compat), FSQCodebook(code_length=4, codebook_size=8)).train()
    frames = torch.full((6, 2, 3, 32, 32), 0.2)
    for index in range(6):
        frames[index, 0, :, 12:20, 12:20] = 0.9
        x, y = 8 + 8 * (index % 3), 8 * (index // 3)
        frames[index, 1, :, y : y + 8, x : x + 8] = 0.9
    first_loss = model.loss(frames)[0].item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss, _ = model.loss(frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first_loss > 4 and loss.item() < 0.8
    save_model(tmp_path, model.eval().state_dict(), model.description())
    assert torch.equal(load_quantizer(tmp_path).encode(frames)[0], model.encode(frames)[0])


def test_runs_under_autocast():
    model = same_weights(random_reference(TINY, 0), TINY)
    frames = random_pairs(TINY, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        codes, latents = model.encode(frames)
        second = model.decode(frames[:, 0], codes)
    assert latents.dtype == torch.float32 and second.isfinite().all()
    torch.testing.assert_close(second.float(), model.decode(frames[:, 0], codes), atol=0.1, rtol=0.1)


def test_trains_on_from_imported_weights_and_resumes(tmp_path):
    frames = random_pairs(SHALLOW, 4)
    initial = random_reference(SHALLOW, 0)

    def train(folder, num_steps: int) -> LAQ:
        model = same_weights(initial, SHALLOW)
        training = Training(num_steps=num_steps, batch_size=4, checkpoint_every_steps=2, warmup_steps=0)
        training = replace(training, final_learning_rate_ratio=1.0, tensorboard=False)
        torch.manual_seed(0)
        fit(model, lambda generator: frames, model.loss, training, setup(CPU), folder)
        return model

    whole = train(tmp_path / "whole", 5)
    train(tmp_path / "parts", 3)
    resumed = train(tmp_path / "parts", 5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    before = same_weights(initial, SHALLOW)
    unmoved = [name for name, p in whole.named_parameters() if torch.equal(p, before.get_parameter(name))]
    assert not unmoved


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"code_length is 3: model=laq has \[1, 2, 4, 16, 64, 256\]"):
        LAQ(LAQQuantizer(**TINY), SharedNSVQCodebook(code_length=3))
    with pytest.raises(ValueError, match=r"takes 8 patches along a side, as image_size=32 has"):
        LAQ(LAQQuantizer(**TINY | {"image_size": 64}), SharedNSVQCodebook())


def import_config(path, output_dir, **options) -> ImportLAQConfig:
    return ImportLAQConfig(**{"path": str(path), "output_dir": str(output_dir), "image_size": 32} | options)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_imported_weights_give_the_codes_of_the_reference(zipped, tmp_path, moving_discs):
    reference = save_released(tmp_path / "laq.pt")
    if not zipped:
        state = torch.load(tmp_path / "laq.pt", weights_only=True)
        torch.save(state, tmp_path / "laq.pt", _use_new_zipfile_serialization=False)
    result = import_laq.run(import_config(tmp_path / "laq.pt", tmp_path / "quantizer", frame_gap_s=0.2))
    assert result["num_elements"] == sum(tensor.numel() for tensor in reference.state_dict().values())
    assert (result["width"], result["num_layers"], result["code_length"], result["codebook_size"]) == (24, 5, 4, 8)
    config = json.loads((tmp_path / "quantizer" / "config.json").read_text())
    assert config["model"] == {"name": "laq", "compat": True} | TINY
    assert config["frame_gap_s"] == 0.2 and config["fps"] is None and config["holdout_episodes"] is None
    assert config["imported_from"]["file"] == "laq.pt" and len(config["imported_from"]["sha256"]) == 64

    store = read_store(moving_discs)
    frames = to_float(FramePairs(store, 2, np.arange(store.num_episodes)).frames(np.arange(24)))
    model = load_quantizer(tmp_path / "quantizer")
    with torch.no_grad():
        codes, second = reference.infer(frames)
        assert torch.equal(model.encode(frames)[0], codes)
        torch.testing.assert_close(model.decode(frames[:, 0], codes), second, atol=1e-5, rtol=0)


def test_imported_weights_are_evaluated_and_label(tmp_path, moving_discs):
    reference = save_released(tmp_path / "laq.pt")
    folder, evaluation, labels = (str(tmp_path / name) for name in ("quantizer", "evaluation", "labels"))
    import_laq.run(import_config(tmp_path / "laq.pt", folder, frame_gap_s=0.2))
    evaluate = EvaluateQuantizerConfig(folder, str(moving_discs), evaluation, num_pairs=12, runtime=CPU)
    assert "delta_psnr_db" in evaluate_quantizer.run(evaluate)
    config = LabelConfig(quantizer=folder, data=str(moving_discs), output_dir=labels, runtime=CPU)
    with pytest.raises(ValueError, match="run `lapa evaluate_quantizer"):
        label.run(config)
    label.run(replace(config, evaluation=evaluation))

    store = read_store(moving_discs)
    made = load_labels(labels, store)
    assert made.frame_gap_frames == 2 and (made.code_length, made.codebook_size) == (4, 8)
    frames = to_float(FramePairs(store, 2, np.arange(store.num_episodes)).frames(np.arange(24)))
    with torch.no_grad():
        codes = reference.label(frames).numpy()
    assert (made.latent_action[made.is_valid][:24] == codes).all()


class RunsCode:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').write('ran')",)


@pytest.mark.parametrize("hidden", [False, True], ids=["whole file", "beside tensors"])
def test_code_in_the_file_is_refused_and_not_run(hidden, tmp_path):
    marker = tmp_path / "marker"
    code = RunsCode(marker)
    torch.save({"module.vq.codebooks": torch.zeros(8, 6), "extra": code} if hidden else code, tmp_path / "laq.pt")
    with pytest.raises(ValueError, match="was not loaded, since it could run code"):
        import_laq.run(import_config(tmp_path / "laq.pt", tmp_path / "quantizer"))
    assert not marker.exists() and not (tmp_path / "quantizer").exists()
    torch.load(tmp_path / "laq.pt", weights_only=False)
    assert marker.exists(), "the file does hold code"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vq.project_in.bias": None}, r"1 missing: vq.project_in.bias \(6,\)"),
        ({"vq.discriminator": torch.zeros(2)}, r"1 unexpected: vq.discriminator \(2,\)"),
        ({"vq.project_in.bias": torch.zeros(7)}, r"vq.project_in.bias is \(7,\), expected \(6,\)"),
        ({"vq.project_in.bias": torch.zeros(6, dtype=torch.int64)}, r"is torch.int64, expected a float type"),
        ({"vq.codebooks": None}, r"is no released quantizer: it lacks vq.codebooks"),
        ({"steps": 3}, r"holds module.steps: int: expected a dict of tensors"),
    ],
)
def test_other_weights_are_refused_by_name(changes, message, tmp_path):
    save_released(tmp_path / "laq.pt", **changes)
    with pytest.raises(ValueError, match=message):
        import_laq.run(import_config(tmp_path / "laq.pt", tmp_path / "quantizer"))
    assert not (tmp_path / "quantizer").exists()


def test_a_layer_that_is_not_whole_is_refused(tmp_path):
    save_released(tmp_path / "laq.pt", **{"enc_temporal_transformer.layers.1.1.q_scale": torch.ones(8)})
    with pytest.raises(ValueError, match=r"15 missing: enc_temporal_transformer.layers.1.0.dsconv.weight .*; \.\.\."):
        import_laq.run(import_config(tmp_path / "laq.pt", tmp_path / "quantizer"))


def test_files_that_hold_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not a tensor")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"no file .*missing.pt: expected the released quantizer's laq_openx.pt"):
        import_laq.run(import_config(tmp_path / "missing.pt", tmp_path / "quantizer"))
    with pytest.raises(ValueError, match=r"text.pt"):
        import_laq.run(import_config(tmp_path / "text.pt", tmp_path / "quantizer"))
    with pytest.raises(ValueError, match=r"holds a list: expected a dict of tensors"):
        import_laq.run(import_config(tmp_path / "list.pt", tmp_path / "quantizer"))


def test_an_image_size_of_other_patches_is_refused(tmp_path):
    save_released(tmp_path / "laq.pt")
    with pytest.raises(ValueError, match=r"takes \[8, 16\] patches along a side, and image_size gives 64"):
        import_laq.run(import_config(tmp_path / "laq.pt", tmp_path / "quantizer", image_size=256))
