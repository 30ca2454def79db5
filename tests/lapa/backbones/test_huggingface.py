"""Models of transformers taken apart and put together again, against transformers' own forward passes."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapa import schema
from lapa.backbones.base import IMAGE, LATENT_ACTION, NO_BLOCK, ROBOT_ACTION, TEXT, Cache, Layout, build_backbone
from lapa.backbones.huggingface import add_lora, grid_positions, refuse_disobedience
from lapa.latent_vla.llama import PROMPT, SUFFIX, LatentLlama
from lapa.latent_vla.model import build_trunk
from lapa.schema import DenseBackbone, HuggingFaceBackbone, HuggingFaceText, WordText
from lapa.trainer import parameter_groups
from tests.lapa.backbones import tiny_models
from tests.lapa.latent_vla import test_import_lapa as released_lapa

transformers = pytest.importorskip("transformers")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the package peft")

VISION_LANGUAGE = ["smolvlm", "qwen2_5_vl", "qwen3_vl", "paligemma", "paligemma2"]
MASK = {"paligemma": "block_causal", "paligemma2": "block_causal"}
INPUT_SIZE = {"qwen2_5_vl": 16, "qwen3_vl": 16}
IMAGE_SIZE = 16
TEXTS = ["go to the left", "go right"]
every_model = pytest.mark.parametrize("kind", VISION_LANGUAGE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_models.write_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


def options(kind: str, folder: Path, **changes) -> HuggingFaceBackbone:
    values = {"path": str(folder), "mask": MASK.get(kind, "causal"), "image_input_size": INPUT_SIZE.get(kind, 0)}
    return HuggingFaceBackbone(**(values | changes))


def new_trunk(kind: str, folder: Path, image_tokenizer: str | None = None, **changes):
    torch.manual_seed(0)
    if image_tokenizer is None:
        image_tokenizer = "grid" if kind == "llama" else "huggingface"
    return build_trunk(options(kind, folder, **changes), HuggingFaceText(), image_tokenizer, IMAGE_SIZE).eval()


def images(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def hidden_of_prefix(trunk, texts=TEXTS, batch_images=None) -> torch.Tensor:
    batch_images = images(len(texts)) if batch_images is None else batch_images
    return trunk.backbone(*trunk.prefix(batch_images, trunk.encode_text(texts)))


def own_hidden(kind: str, folder: Path, trunk, text: str, image: torch.Tensor) -> torch.Tensor:
    """What transformers' own model makes of the same prompt, in ids, and of the image, through its own input format."""
    config = transformers.AutoConfig.from_pretrained(folder)
    attention = "eager" if kind == "paligemma2" else "sdpa"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention).eval()
    prompt = trunk.text_encoder.prompt.replace("{instruction}", text)
    before, behind = (
        trunk.text_encoder.tokenizer.encode(part, add_special_tokens=False).ids for part in prompt.split("{image}")
    )
    num_image = trunk.image_tokenizer.encode(image)[0].shape[1]
    ids = torch.tensor([before + [config.image_token_id] * num_image + behind])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = trunk.image_tokenizer.preprocess(image)
    if kind.startswith("qwen"):
        statistics = json.loads((folder / "preprocessor_config.json").read_text())
        vision = config.vision_config
        sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        processor = transformers.Qwen2VLImageProcessor(do_resize=False, do_rescale=False, **sizes, **statistics)
        processed = processor(image[0], return_tensors="pt")
        inputs |= {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    elif kind == "smolvlm":
        inputs["pixel_values"] = pixels[:, None]
    else:
        inputs["pixel_values"] = pixels
        inputs["token_type_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state


@every_model
def test_a_prompt_with_an_image_gives_the_hidden_states_of_the_model_itself(kind, folders):
    trunk = new_trunk(kind, folders(kind))
    for text, image in zip(TEXTS, images().split(1), strict=True):
        ours = hidden_of_prefix(trunk, [text], image)
        torch.testing.assert_close(ours, own_hidden(kind, folders(kind), trunk, text, image), atol=2e-5, rtol=1e-4)


def test_a_language_model_gives_its_own_hidden_states(folders):
    trunk = new_trunk("llama", folders("llama"))
    ids = torch.tensor([[3, 13, 14, 15]])
    tokens_BSD = trunk.text_encoder.embedding(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders("llama")).eval()
    ours = trunk.backbone(tokens_BSD, Layout.of(torch.full_like(ids, TEXT)))
    torch.testing.assert_close(ours, model.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["llama", *VISION_LANGUAGE])
def test_rows_padding_and_decoding_with_a_cache_change_nothing(kind, folders):
    trunk = new_trunk(kind, folders(kind))
    ids_BW = trunk.encode_text(TEXTS)
    action_BLD = torch.randn(2, 3, trunk.width, generator=torch.Generator().manual_seed(1))
    whole_BLD = trunk(images(), ids_BW, action_BLD, LATENT_ACTION)
    alone_BLD = trunk(images()[1:], ids_BW[1:], action_BLD[1:], LATENT_ACTION)
    torch.testing.assert_close(whole_BLD[1:], alone_BLD, atol=2e-5, rtol=1e-4)
    cache = Cache()
    parts = [trunk(images(), ids_BW, action_BLD[:, :1], LATENT_ACTION, cache)]
    length = cache.length
    for _ in range(2):
        cache.truncate(length)
        rest = [trunk.extend(action_BLD[:, i : i + 1], LATENT_ACTION, cache) for i in (1, 2)]
        torch.testing.assert_close(torch.cat(parts + rest, dim=1), whole_BLD, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", *VISION_LANGUAGE])
def test_the_mask_decides_who_looks_at_whom(kind, folders):
    changed = {}
    for mask in ("causal", "block_causal"):
        trunk = new_trunk(kind, folders(kind), mask=mask)
        before, after = (hidden_of_prefix(trunk, [text]) for text in ("go to the left", "go to the right"))
        changed[mask] = (before - after).abs().amax(-1)[0] > 1e-5
    # The word is one of the last tokens: causally, what came before it does not know.
    assert not changed["causal"][: changed["causal"].nonzero().min()].any() and not changed["causal"][0]
    assert changed["block_causal"].all()


@every_model
def test_a_denoised_block_sees_itself_both_ways_and_not_the_other_way_round(kind, folders):
    trunk = new_trunk(kind, folders(kind), mask="block_causal")
    ids_BW = trunk.encode_text(TEXTS)
    action_BLD = torch.randn(2, 3, trunk.width, generator=torch.Generator().manual_seed(1))
    other_BLD = action_BLD.clone()
    other_BLD[:, 2] += 1
    for block, sees_ahead in ((1, True), (NO_BLOCK, False)):
        before, after = (trunk(images(), ids_BW, x, ROBOT_ACTION, block=block) for x in (action_BLD, other_BLD))
        assert torch.allclose(before[:, :2], after[:, :2], atol=1e-5) is not sees_ahead


@every_model
def test_image_and_instruction_reach_the_readout(kind, folders):
    trunk = new_trunk(kind, folders(kind))

    def readout(seed: int, text: str) -> torch.Tensor:
        return trunk(images(1, seed), trunk.encode_text([text]), trunk.readout.expand(1, 1, -1), LATENT_ACTION)

    base = readout(0, "go left")
    assert not torch.allclose(base, readout(1, "go left"), atol=1e-4)
    assert not torch.allclose(base, readout(0, "go right"), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", *VISION_LANGUAGE])
def test_flops_are_those_that_a_profiler_counts(kind, folders):
    model = build_backbone(options(kind, folders(kind))).eval()
    layout = Layout.of(torch.tensor([[TEXT] * 4 + [IMAGE] * 5 + [LATENT_ACTION] * 2]))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 11, tiny_models.WIDTH), layout)
    assert model.forward_flops([4, 5, 2, 0, 0]) == counter.get_total_flops()


def test_positions_of_two_images_are_those_of_qwen(folders):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders("qwen2_5_vl")).model
    is_image = torch.tensor([[0, 0] + [1] * 4 + [0] + [1] * 4 + [0, 0]])
    grids = torch.tensor([[1, 4, 4], [1, 4, 4]])
    expected, _ = model.get_rope_index(torch.zeros_like(is_image), is_image, image_grid_thw=grids)
    layout = Layout.of(torch.where(is_image == 1, IMAGE, TEXT))
    assert torch.equal(grid_positions(layout, layout, (2, 2)), expected)
    assert torch.equal(grid_positions(layout[:, 8:], layout, (2, 2)), expected[..., 8:])


def test_the_saved_configuration_and_weights_need_no_folder(folders, tmp_path):
    for kind in ("smolvlm", "qwen3_vl", "llama"):
        folder = shutil.copytree(folders(kind), tmp_path / kind)
        trunk = new_trunk(kind, folder)
        text = dataclasses.asdict(HuggingFaceText(tokenizer=str(folder)))
        saved = json.loads(json.dumps(dataclasses.asdict(trunk.backbone.config)))
        assert str(tmp_path) not in json.dumps(saved)
        save_file(trunk.state_dict(), tmp_path / "model.safetensors")
        shutil.rmtree(folder)
        rebuilt = build_trunk(
            schema.from_dict("backbone", saved),
            schema.from_dict("text", text),
            "grid" if kind == "llama" else "huggingface",
            IMAGE_SIZE,
        ).eval()
        with pytest.raises(ValueError, match="there is no tokenizer yet"):
            rebuilt.encode_text(TEXTS)
        rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(rebuilt.encode_text(TEXTS), trunk.encode_text(TEXTS))
        assert torch.equal(hidden_of_prefix(rebuilt), hidden_of_prefix(trunk))


def test_random_weights_of_the_same_architecture_can_be_chosen(folders):
    trunk, trained = (new_trunk("smolvlm", folders("smolvlm"), weights=kind) for kind in ("random", "pretrained"))
    names = [name for name, p in trunk.named_parameters() if p.ndim > 1 and "position" not in name]
    other = dict(trained.named_parameters())
    assert not any(torch.equal(dict(trunk.named_parameters())[name], other[name]) for name in names)


def test_parts_are_frozen_as_chosen(folders):
    def trained(**changes) -> set[str]:
        trunk = new_trunk("smolvlm", folders("smolvlm"), **changes)
        names = {name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
        # A frozen part must not break training.
        loss = trunk(images(), trunk.encode_text(TEXTS), trunk.readout.expand(2, 1, -1), LATENT_ACTION).sum()
        loss.backward()
        assert all(p.grad is None for p in trunk.parameters() if not p.requires_grad)
        assert trunk.readout.grad.abs().sum() > 0
        return names

    assert trained() == {"backbone", "readout"}
    assert trained(freeze_language=True) == {"readout"}
    whole = trained(freeze_embeddings=False, freeze_vision=False)
    assert whole == {"backbone", "readout", "text_encoder", "image_tokenizer"}


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl"])
def test_recomputed_activations_give_the_same_gradients(kind, folders):
    gradients = []
    for recompute in (False, True):
        trunk = new_trunk(kind, folders(kind), checkpoint_activations=recompute, freeze_vision=False).train()
        trunk(
            images(), trunk.encode_text(TEXTS), trunk.readout.expand(2, 1, -1), LATENT_ACTION
        ).square().sum().backward()
        gradients.append({name: p.grad for name, p in trunk.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        trunk(images(), trunk.encode_text(TEXTS), trunk.readout.expand(2, 1, -1), LATENT_ACTION, Cache())


def test_bfloat16_weights_give_nearly_the_same_and_float32_out(folders):
    trunk, exact = (new_trunk("smolvlm", folders("smolvlm"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in trunk.backbone.parameters()} == {torch.bfloat16}
    hidden, expected = hidden_of_prefix(trunk), hidden_of_prefix(exact)
    assert hidden.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(hidden.flatten(), expected.flatten(), dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert hidden_of_prefix(exact).isfinite().all()


def test_the_models_own_weights_can_learn_slower(folders):
    trunk = new_trunk("smolvlm", folders("smolvlm"), learning_rate_ratio=0.1)
    ratios = {id(p): group["learning_rate_ratio"] for group in parameter_groups(trunk, 0.0) for p in group["params"]}
    assert ratios[id(trunk.readout)] == 1.0
    assert {ratios[id(p)] for p in trunk.backbone.parameters()} == {0.1}


@pytest.mark.parametrize("rotary_dtype", ["float32", "bfloat16"])
def test_the_imported_lapa_is_a_backbone_with_its_own_prompt_and_rounded_positions(tmp_path, rotary_dtype):
    pytest.importorskip("msgpack")
    weights = released_lapa.parameters()
    # As many words as the tokenizer has.
    shape = (len(tiny_models.VOCABULARY), released_lapa.WIDTH)
    generator = torch.Generator().manual_seed(7)
    weights["transformer/wte/embedding"] = torch.randn(shape, generator=generator)
    weights["lm_head/kernel"] = torch.randn(shape[::-1], generator=generator)
    folder = released_lapa.convert(tmp_path, weights, rotary_dtype=rotary_dtype)
    tiny_models.write_tokenizer(folder)
    trunk = new_trunk("llama", folder)
    assert trunk.text_encoder.prompt.split("{image}") == [PROMPT, SUFFIX]
    assert trunk.backbone.config.rotary_dtype == rotary_dtype

    tokens_BSD, layout = trunk.prefix(images(), trunk.encode_text(TEXTS))
    lapa = LatentLlama.from_folder(folder, torch.float32)
    expected_BSD, _ = lapa.hidden(tokens_BSD, layout.is_token_BS)
    ours_BSD = trunk.backbone(tokens_BSD, layout)
    torch.testing.assert_close(ours_BSD[layout.is_token_BS], expected_BSD[layout.is_token_BS], atol=2e-5, rtol=1e-4)
    rebuilt = build_trunk(trunk.backbone.config, HuggingFaceText(), "grid", IMAGE_SIZE).eval()
    rebuilt.load_state_dict(trunk.state_dict())
    assert torch.equal(rebuilt.backbone(tokens_BSD, layout), ours_BSD)


class TestLora:
    @needs_peft
    def test_only_adapters_learn_and_they_begin_as_nothing(self, folders):
        plain = new_trunk("smolvlm", folders("smolvlm"))
        trunk = new_trunk("smolvlm", folders("smolvlm"), lora_rank=2)
        assert torch.equal(hidden_of_prefix(trunk), hidden_of_prefix(plain))
        trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
        adapters = trained - {"readout"}
        assert adapters and all("lora_" in name for name in adapters)
        # Two layers, seven linear layers each, two matrices an adapter.
        assert len(adapters) == 2 * 7 * 2
        optimizer = torch.optim.AdamW([p for p in trunk.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            hidden = trunk(images(), trunk.encode_text(TEXTS), trunk.readout.expand(2, 1, -1), LATENT_ACTION)
            hidden.mul(torch.randn(trunk.width)).sum().backward()
            optimizer.step()
        parameters = dict(trunk.named_parameters())
        assert all(parameters[name].grad.abs().sum() > 0 for name in trained)
        assert all(p.grad is None for name, p in parameters.items() if name not in trained)
        assert not torch.allclose(hidden_of_prefix(trunk), hidden_of_prefix(plain), atol=1e-3)

    @needs_peft
    def test_adapters_are_saved_with_the_weights_they_belong_to(self, folders, tmp_path):
        trunk = new_trunk("llama", folders("llama"), lora_rank=2, lora_targets="q_proj|v_proj", dtype="bfloat16")
        for name, parameter in trunk.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        assert {p.dtype for name, p in trunk.named_parameters() if "lora_" in name} == {torch.float32}
        save_file(trunk.state_dict(), tmp_path / "model.safetensors")
        rebuilt = build_trunk(trunk.backbone.config, HuggingFaceText(), "grid", IMAGE_SIZE).eval()
        rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(hidden_of_prefix(rebuilt), hidden_of_prefix(trunk))

    @needs_peft
    def test_flops_count_the_adapters(self, folders):
        model = build_backbone(options("llama", folders("llama"), lora_rank=2)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 6, tiny_models.WIDTH), Layout.of(torch.zeros(1, 6)))
        assert model.forward_flops([6, 0, 0, 0, 0]) == counter.get_total_flops()

    def test_without_peft_the_install_command_is_told(self, folders, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match="pip install"):
            add_lora(torch.nn.Linear(2, 2), HuggingFaceBackbone(lora_rank=2))


class TestInstructions:
    def test_long_ones_lose_their_last_words_and_the_prompt_stays(self, folders):
        folder = folders("smolvlm")
        encoder = build_trunk(
            options("smolvlm", folder), HuggingFaceText(max_tokens=7), "huggingface", IMAGE_SIZE
        ).text_encoder
        assert encoder.count_longer(["go", "go to", "go to the left"]) == 1
        ids = encoder.encode_text(["go to the left"])
        assert torch.equal(ids, encoder.encode_text(["go to the"]))
        behind = [tiny_models.VOCABULARY[i - 1] for i in ids[0, 7:] if i]
        assert behind == ["<fake_token_around_image>", "go", "to", "the", "<end_of_utterance>", "Assistant", ":"]

    def test_a_prompt_that_does_not_fit_is_refused(self, folders):
        trunk = build_trunk(
            options("smolvlm", folders("smolvlm")), HuggingFaceText(max_tokens=3), "huggingface", IMAGE_SIZE
        )
        with pytest.raises(ValueError, match=r"text\.max_tokens is 3, the prompt alone takes"):
            trunk.encode_text(["go"])

    def test_the_instruction_may_stand_before_the_image(self, folders):
        prompt = "reach {instruction} {image} ."
        trunk = new_trunk("smolvlm", folders("smolvlm"), prompt=prompt)
        _, layout = trunk.prefix(images(), trunk.encode_text(TEXTS))
        kinds = [row[row_is].tolist() for row, row_is in zip(layout.modality_ids_BS, layout.is_token_BS, strict=True)]
        assert kinds == [[TEXT] * 5 + [IMAGE] * 4 + [TEXT], [TEXT] * 3 + [IMAGE] * 4 + [TEXT]]
        alone = hidden_of_prefix(trunk, TEXTS[1:], images()[1:])
        together = hidden_of_prefix(trunk)[1:, layout.is_token_BS[1]]
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)

    def test_prompts_without_their_two_places_are_refused(self, folders):
        with pytest.raises(ValueError, match=r"expected \{image\} and \{instruction\} once each"):
            new_trunk("smolvlm", folders("smolvlm"), prompt="go {image}")

    def test_words_of_our_own_and_keypoints_go_with_any_language_model(self, folders):
        torch.manual_seed(0)
        trunk = build_trunk(options("llama", folders("llama")), WordText(), "keypoints", IMAGE_SIZE).eval()
        hidden = trunk(images(), trunk.encode_text(TEXTS), trunk.readout.expand(2, 1, -1), LATENT_ACTION)
        assert hidden.shape == (2, 1, tiny_models.WIDTH)


def test_images_are_resized_and_normalised_as_the_model_was_trained(folders):
    tokenizer = new_trunk("smolvlm", folders("smolvlm")).image_tokenizer
    pixels = tokenizer.preprocess(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), 0.5))
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.0, 0.4, 1.0]), atol=1e-5)


def test_features_for_deeper_layers_are_not_given_to_other_images(folders):
    trunk = new_trunk("qwen3_vl", folders("qwen3_vl"))
    tokens_BSD, layout = trunk.prefix(images(), trunk.encode_text(TEXTS))
    trunk.prefix(images(seed=1), trunk.encode_text(TEXTS))
    with pytest.raises(ValueError, match="call prefix again"):
        trunk.backbone(tokens_BSD, layout)


def test_tokens_beyond_a_sliding_window_are_refused(folders):
    model = build_backbone(options("paligemma2", folders("paligemma2")))
    with pytest.raises(ValueError, match="trained to look 48 back"):
        model(torch.randn(1, 49, tiny_models.WIDTH), Layout.of(torch.zeros(1, 49)))


def test_a_model_that_does_not_obey_its_mask_is_refused(folders):
    model = build_backbone(options("llama", folders("llama"))).language_model
    forward = model.forward
    model.forward = lambda attention_mask, **inputs: forward(attention_mask=None, **inputs)
    with pytest.raises(ValueError, match="does not look where its attention mask says"):
        refuse_disobedience(model, tiny_models.WIDTH)


class TestRefusals:
    def build(self, kind: str, folder: Path, **changes):
        return new_trunk(kind, folder, **changes)

    def edited(self, folders, tmp_path, kind: str = "llama", **values) -> Path:
        folder = shutil.copytree(folders(kind), tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    def test_code_in_the_folder(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ValueError, match=r"code of its own \(auto_map\)"):
            self.build("llama", folder)

    def test_code_in_a_saved_configuration(self):
        config = {**tiny_models.LLAMA, "auto_map": {"AutoConfig": "a--b.C"}}
        with pytest.raises(ValueError, match="auto_map"):
            build_backbone(HuggingFaceBackbone(model_config=config))
        nested = {"model_type": "smolvlm", "text_config": config}
        with pytest.raises(ValueError, match="auto_map"):
            build_backbone(HuggingFaceBackbone(model_config=nested))

    def test_a_kernel_from_the_hub_is_not_asked_for(self):
        config = {
            **tiny_models.LLAMA,
            "_attn_implementation": "someone/kernel",
            "attn_implementation": "someone/kernel",
        }
        model = build_backbone(HuggingFaceBackbone(model_config=config))
        assert model.text_config._attn_implementation == "sdpa"
        assert "someone/kernel" not in json.dumps(model.config.model_config)

    def test_a_model_of_another_kind(self, tmp_path):
        for config, message in (
            ({"model_type": "vit"}, "is a model of type 'vit': expected an image-text-to-text model"),
            ({"model_type": "t5"}, "expected an image-text-to-text model"),
            ({"model_type": "nonsense"}, "model_type 'nonsense', which transformers"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match=message):
                build_backbone(HuggingFaceBackbone(path=str(tmp_path)))

    def test_a_name_that_is_not_at_hand(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for path in ("nobody/no-such-model", str(tmp_path / "missing")):
            with pytest.raises(ValueError, match="neither a folder nor a model that was downloaded before"):
                build_backbone(HuggingFaceBackbone(path=path))
        with pytest.raises(ValueError, match=r"no config\.json"):
            build_backbone(HuggingFaceBackbone(path=str(tmp_path)))
        with pytest.raises(ValueError, match=r"needs backbone\.path"):
            build_backbone(HuggingFaceBackbone())

    def test_weights_that_would_have_to_be_unpickled(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="no weights in safetensors"):
            self.build("llama", folder)

    def test_weights_that_are_missing_or_quantised(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path)
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
            self.build("llama", folder)
        shutil.rmtree(folder)
        folder = self.edited(folders, tmp_path, quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(ValueError, match="take the unquantised model"):
            self.build("llama", folder)

    def test_tokenizers_that_do_not_fit(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path, kind="smolvlm")
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["extra"] = 999
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ValueError, match="tokenizer of another model"):
            self.build("smolvlm", folder)
        del tokenizer["model"]["vocab"]["extra"], tokenizer["model"]["vocab"]["<global-img>"]
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<global-img>"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ValueError, match=r"the tokenizer lacks \['<global-img>'\]"):
            self.build("smolvlm", folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"no tokenizer\.json in"):
            self.build("smolvlm", folder)

    def test_images_whose_normalisation_is_not_told(self, folders, tmp_path):
        folder = self.edited(folders, tmp_path, kind="smolvlm")
        (folder / "preprocessor_config.json").rename(folder / "other.json")
        with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
            self.build("smolvlm", folder)
        statistics = json.loads((folder / "other.json").read_text())
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": statistics}))
        assert self.build("smolvlm", folder).image_tokenizer.mean_C11[1] == pytest.approx(0.4)

    def test_parts_without_their_model(self, folders):
        with pytest.raises(ValueError, match="needs a model with a vision tower"):
            self.build("llama", folders("llama"), image_tokenizer="huggingface")
        with pytest.raises(ValueError, match=r"also wants \['image_sizes'\]"):
            self.build("mistral3", folders("mistral3"))
        with pytest.raises(ValueError, match="it needs backbone=huggingface"):
            build_trunk(DenseBackbone(), HuggingFaceText(), "keypoints", IMAGE_SIZE)
        with pytest.raises(ValueError, match="it needs backbone=huggingface"):
            build_trunk(DenseBackbone(), WordText(), "huggingface", IMAGE_SIZE)

    def test_models_whose_operations_are_not_known(self):
        experts = {**tiny_models.LLAMA, "model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1}
        gpt2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 32, "n_layer": 1, "n_head": 2}
        for config in (experts, gpt2):
            with pytest.raises(ValueError, match="the operations of"):
                build_backbone(HuggingFaceBackbone(model_config=config)).forward_flops([1, 0, 0, 0, 0])

    def test_options_that_do_not_exist(self, folders):
        for changes, message in (
            ({"dtype": "float8"}, r"backbone\.dtype is 'float8'"),
            ({"weights": "none"}, r"backbone\.weights is 'none'"),
            ({"lora_rank": -1}, r"backbone\.lora_rank is -1"),
            ({"mask": "diagonal"}, "expected causal, bidirectional or block_causal"),
        ):
            with pytest.raises(ValueError, match=message):
                hidden_of_prefix(self.build("smolvlm", folders("smolvlm"), **changes))
        with pytest.raises(ValueError, match="expected a multiple of 8"):
            self.build("qwen2_5_vl", folders("qwen2_5_vl"), image_input_size=20)
