import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapa import schema
from lapa.backbones.blt import ByteLatentTransformer, ByteStates, ngram_hashes
from lapa.backbones.byte_entropy import ByteModel
from lapa.backbones.patchers import BEGIN_ID, BYTE_OFFSET, encode_bytes, entropy_starts, space_starts, unpack
from lapa.backbones.text import TEXT_ENCODERS, build_text_encoder
from lapa.schema import BltText, ByteText, DenseBackbone
from lapa.text import PADDING_ID

TEXTS = ["push the red moon to the left", "go", "", "reach the blue cube"]
SMALL = {"max_bytes": 40, "byte_width": 16, "num_byte_heads": 2, "ngram_table_size": 50}
ENTROPY = {"entropy_width": 16, "entropy_steps": 2}
CONFIGS = {
    "bytes": ByteText(**SMALL),
    "bytes-ngrams": ByteText(**SMALL, max_ngram=5),
    "blt-entropy": BltText(**SMALL, **ENTROPY),
    "blt-monotonic": BltText(**SMALL, **ENTROPY, entropy_rule="monotonic", queries_per_patch=1),
    "blt-space": BltText(**SMALL, patcher="space"),
    "blt-static": BltText(**SMALL, patcher="static"),
}
every_encoder = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, seed: int = 0, fitted: bool = True, **changes):
    torch.manual_seed(seed)
    encoder = build_text_encoder(dataclasses.replace(CONFIGS[name], **changes), 24)
    if fitted:
        encoder.fit(TEXTS, seed=0)
    return encoder


def test_every_text_encoder_of_the_table_can_be_chosen():
    assert set(TEXT_ENCODERS) == set(schema.GROUPS["text"])


@every_encoder
def test_an_instruction_does_not_depend_on_its_batch(name):
    encoder = build(name).eval()
    together = encoder(encoder.encode_text([*TEXTS, "a longer one, BESIDE the others!"]))
    for row, text in enumerate(TEXTS):
        alone = encoder(encoder.encode_text([text]))
        length = int(alone.is_token_BT.sum())
        assert int(together.is_token_BT[row].sum()) == length
        torch.testing.assert_close(together.tokens_BTD[row, :length], alone.tokens_BTD[0, :length])
        torch.testing.assert_close(together.summary_BD[row], alone.summary_BD[0])


@every_encoder
def test_every_trained_parameter_gets_a_gradient(name):
    encoder = build(name)
    text = encoder(encoder.encode_text(TEXTS))
    mixed_TD = torch.randn(text.tokens_BTD.shape[1:])
    ((text.tokens_BTD * text.is_token_BT[..., None] * mixed_TD).sum() + text.summary_BD[:, 0].sum()).backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None for n, p in encoder.named_parameters() if n.startswith("byte_model"))


@every_encoder
def test_the_saved_state_is_all_that_another_machine_needs(name, tmp_path):
    encoder = build(name).eval()
    save_file(encoder.state_dict(), tmp_path / "text.safetensors")
    other = build(name, seed=1, fitted=False).eval()
    other.load_state_dict(load_file(tmp_path / "text.safetensors"))
    ids_BW = other.encode_text(TEXTS)
    assert torch.equal(ids_BW, encoder.encode_text(TEXTS))
    assert torch.equal(other(ids_BW).tokens_BTD, encoder(ids_BW).tokens_BTD)


def test_a_patch_is_a_token_and_sees_no_byte_of_the_patches_after_it():
    encoder = build("blt-space").eval()
    one = encoder(encoder.encode_text(["push the red moon"]))
    assert one.is_token_BT.sum() == 5  # the begin byte, and four words
    other = encoder(encoder.encode_text(["push the red cube"]))
    torch.testing.assert_close(one.tokens_BTD[:, :4], other.tokens_BTD[:, :4])
    assert not torch.allclose(one.tokens_BTD[:, 4], other.tokens_BTD[:, 4])


def test_a_patch_looks_at_its_own_bytes_alone():
    # Without layers over the bytes and without n-grams, nothing but the patch's own bytes can reach it.
    encoder = build("blt-space", num_byte_layers=0, max_ngram=0).eval()
    one = encoder(encoder.encode_text(["push the red moon"]))
    other = encoder(encoder.encode_text(["pull the big moon"]))
    is_same_T = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(one.tokens_BTD[:, is_same_T], other.tokens_BTD[:, is_same_T])
    assert not torch.isclose(one.tokens_BTD, other.tokens_BTD).all(-1)[0, ~is_same_T].any()


def test_case_is_seen_unless_told():
    assert not torch.equal(*build("bytes").encode_text(["Go", "go"]))
    assert torch.equal(*build("bytes", lower_case=True).encode_text(["Go", "go"]))


def test_what_does_not_fit_is_cut_and_counted():
    encoder = build("blt-entropy", max_bytes=4)
    assert encoder.encode_text(["abcdefgh"]).shape == (1, 5)
    assert encoder.count_longer(["abcd", "abcde", "äää"]) == 2


def test_theta_is_chosen_for_the_patch_size_of_the_texts():
    for mean_patch_bytes in (2.0, 5.0):
        encoder = build("blt-entropy", mean_patch_bytes=mean_patch_bytes)
        _, starts_BS = unpack(encoder.encode_text(TEXTS))
        num_patches = int(starts_BS.sum()) - len(TEXTS)
        assert num_patches == pytest.approx(sum(map(len, TEXTS)) / mean_patch_bytes, abs=1)


def test_a_byte_model_that_is_not_trained_is_an_error_with_the_fix():
    with pytest.raises(ValueError, match=r"not trained: `lapa pretrain` and `lapa finetune` train it.*patcher=space"):
        build("blt-entropy", fitted=False).encode_text(["go"])


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"text.patcher is 'bpe', expected one of entropy, space, static"):
        build("blt-space", patcher="bpe")
    with pytest.raises(ValueError, match="entropy_rule is 'local'"):
        build("blt-entropy", entropy_rule="local")
    with pytest.raises(ValueError, match="byte_width is 15, not a multiple"):
        build("bytes", byte_width=15)


def test_hashes_are_of_the_bytes_that_end_there_and_wrap_as_64_bit_integers():
    ids_BS = torch.tensor([[7, 9, 11, 200, 259, 4, 6, 8, 10]])
    for size in (3, 8):
        padded = [0] * (size - 1) + ids_BS[0].tolist()
        sums = [sum(v * 1_000_000_007**j for j, v in enumerate(padded[t : t + size])) for t in range(9)]
        wrapped = [(value + 2**63) % 2**64 - 2**63 for value in sums]
        assert ngram_hashes(ids_BS, size, 1009).tolist() == [[value % 1009 for value in wrapped]]


def test_ngrams_tell_apart_what_single_bytes_do_not():
    torch.manual_seed(0)
    states = ByteStates(ByteText(**SMALL | {"byte_width": 16}, num_byte_layers=0, max_ngram=3))
    one_SC, other_SC = states(encode_bytes(["abz", "bbz"], 3))
    assert torch.equal(one_SC[0], other_SC[0]) and not torch.allclose(one_SC[3], other_SC[3])


class TestLanguageModel:
    """The whole byte latent transformer, and the one of transformers with the same weights."""

    blt = BltText(byte_width=16, num_byte_layers=2, num_byte_heads=2, ngram_table_size=53, queries_per_patch=2)

    def new(self, width: int = 24, seed: int = 0) -> ByteLatentTransformer:
        torch.manual_seed(seed)
        backbone = DenseBackbone(
            width=width, num_layers=2, num_heads=2, mask="causal", query_key_norm=False, rotary_theta=5e5
        )
        return ByteLatentTransformer(self.blt, backbone, num_decoder_layers=2).eval()

    def test_a_byte_is_predicted_from_the_past_alone(self):
        model = self.new()
        ids_BS = encode_bytes(["push the red moon", "push the red cube"], 17)
        starts_BS = space_starts(ids_BS)
        first_BSV, second_BSV = model(ids_BS, starts_BS)
        # Both are the same up to the last word, whose first byte still is predicted from what came before.
        torch.testing.assert_close(first_BSV[:14], second_BSV[:14])
        assert not torch.allclose(first_BSV[14], second_BSV[14], atol=1e-3)

    def test_a_finished_patch_is_seen_by_what_predicts_the_next(self):
        model = self.new()
        ids_BS = encode_bytes(["push the red moon"], 17)
        whole_BS, cut_BS = space_starts(ids_BS), space_starts(ids_BS)
        cut_BS[0, 6] = False  # "push the " in one patch
        one_BSV, other_BSV = model(ids_BS, whole_BS), model(ids_BS, cut_BS)
        torch.testing.assert_close(one_BSV[:, :5], other_BSV[:, :5])
        assert not torch.allclose(one_BSV[:, 5], other_BSV[:, 5], atol=1e-3)

    def test_rows_and_padding_do_not_matter(self):
        model = self.new()
        ids_BS = encode_bytes(["push the red moon", "go"], 20)
        together_BSV = model(ids_BS, space_starts(ids_BS))
        alone_BS = encode_bytes(["go"], 2)
        torch.testing.assert_close(together_BSV[1:, :3], model(alone_BS, space_starts(alone_BS)))

    def test_one_text_can_be_learned_by_heart(self):
        model = self.new().train()
        ids_BS = encode_bytes(["push the red moon"], 17)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            logits_BSV = model(ids_BS, space_starts(ids_BS))
            loss = torch.nn.functional.cross_entropy(logits_BSV[0, :-1], ids_BS[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.1
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    @pytest.mark.parametrize("global_width", [24, 32])  # with a projection into the global model, and without
    def test_logits_are_those_of_transformers_with_the_same_weights(self, global_width):
        reference = reference_model(self.blt, global_width)
        model = self.new(global_width, seed=1)
        model.load_state_dict(from_reference(reference, global_width))
        ids_BS = random_text(rows=2, length=30)
        starts_BS = static_like(ids_BS)
        with torch.no_grad():
            expected_BSV = reference(ids_BS, patch_lengths=lengths(starts_BS), use_cache=False).logits
            torch.testing.assert_close(model(ids_BS, starts_BS), expected_BSV, atol=1e-4, rtol=1e-4)

    def test_entropies_patches_and_what_follows_are_those_of_transformers(self):
        reference = reference_model(self.blt, 24)
        patcher = reference.model.patcher
        byte_model = ByteModel(16, 2, 2, feed_forward_ratio=2.5).eval()
        byte_model.load_state_dict(
            {
                "embedding.weight": patcher.embed_tokens.weight,
                "head.weight": patcher.lm_head.weight,
                "transformer.norm.weight": patcher.norm.weight,
                **layers_from_reference(patcher.layers, "transformer."),
            }
        )
        model = self.new(24, seed=1)
        model.load_state_dict(from_reference(reference, 24))
        next_starts = []
        for length in (37, 38, 39, 40):
            ids_BS = random_text(rows=1, length=40)[:, :length]
            with torch.no_grad():
                expected_BS, _, _ = patcher(ids_BS)
                entropy_BS = byte_model.entropies(ids_BS)
                torch.testing.assert_close(entropy_BS, expected_BS, atol=1e-4, rtol=1e-4)
                # Between two of the entropies, so that rounding decides nothing.
                theta = float(expected_BS.sort().values[0, 20:22].mean())
                reference.config.patching_threshold = theta
                starts_BS, next_starts_B = entropy_starts(entropy_BS, theta, ids_BS), entropy_BS[:, -1] > theta
                logits_BSV = model(ids_BS, starts_BS, next_starts_B)
                torch.testing.assert_close(logits_BSV, reference(ids_BS, use_cache=False).logits, atol=1e-4, rtol=1e-4)
            next_starts.append(bool(next_starts_B))
        assert set(next_starts) == {True, False}


def random_text(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(256, (rows, length), generator=generator) + BYTE_OFFSET
    ids_BS[:, 0] = BEGIN_ID
    assert (ids_BS != PADDING_ID).all()
    return ids_BS


def static_like(ids_BS: torch.Tensor) -> torch.Tensor:
    """Patches of several lengths, as many in each row."""
    starts_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    starts_BS[0, [0, 1, 4, 5, 11, 20]] = True
    starts_BS[1, [0, 1, 2, 9, 17, 29]] = True
    return starts_BS


def lengths(starts_BS: torch.Tensor) -> torch.Tensor:
    """Patch lengths (B, P) of rows without padding."""
    ends = starts_BS.shape[1]
    return torch.stack([torch.cat([row.nonzero()[:, 0], torch.tensor([ends])]).diff() for row in starts_BS])


def reference_model(config: BltText, global_width: int):
    """A small random `blt` of transformers, of the sizes of `TestLanguageModel.new`."""
    transformers = pytest.importorskip("transformers")

    def sizes(width: int, num_layers: int) -> dict:
        return {
            "hidden_size": width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 8 * round(width * 2.67 / 8),
            "rms_norm_eps": torch.finfo(torch.float32).eps,
        }

    local = {"cross_attn_k": config.queries_per_patch, "hidden_size_global": global_width}
    torch.manual_seed(0)
    model = transformers.BltForCausalLM(
        transformers.BltConfig(
            cross_attn_k=config.queries_per_patch,
            encoder_hash_byte_group_vocab=config.ngram_table_size,
            patcher_config=sizes(16, 2),
            encoder_config=sizes(16, config.num_byte_layers) | local,
            decoder_config=sizes(16, 2) | local,
            global_config=sizes(global_width, 2),
        )
    )
    # Norms other than one, so that a norm in the wrong place shows.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection whose rotary positions turn neighbours, for one that turns the halves of a head."""
    rows = weight.unflatten(0, (heads, -1))
    return torch.cat([rows[:, ::2], rows[:, 1::2]], dim=1).flatten(0, 1)


def layers_from_reference(layers, prefix: str, heads: int = 2) -> dict[str, torch.Tensor]:
    found = {}
    for index, layer in enumerate(layers):
        attention, name = layer.self_attn, f"{prefix}blocks.{index}"
        turned = [halves_from_pairs(p.weight, heads) for p in (attention.q_proj, attention.k_proj)]
        found |= {
            f"{name}.attention.query_key_value.weight": torch.cat([*turned, attention.v_proj.weight]),
            f"{name}.attention.output.weight": attention.o_proj.weight,
            f"{name}.attention_norm.weight": layer.input_layernorm.weight,
            f"{name}.feed_forward_norm.weight": layer.post_attention_layernorm.weight,
            f"{name}.feed_forward.gate_up.weight": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            f"{name}.feed_forward.down.weight": layer.mlp.down_proj.weight,
        }
    return found


def cross_attention_from_reference(attention, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.query_norm.weight": attention.q_norm.weight,
        f"{name}.key_norm.weight": attention.k_norm.weight,
        f"{name}.query.weight": attention.q_proj.weight,
        f"{name}.key_value.weight": torch.cat([attention.k_proj.weight, attention.v_proj.weight]),
        f"{name}.output.weight": attention.o_proj.weight,
    }


def from_reference(reference, global_width: int) -> dict[str, torch.Tensor]:
    model = reference.model
    encoder, decoder, backbone = model.local_encoder, model.local_decoder, model.global_transformer
    found = {
        "byte_states.embedding.weight": encoder.embed_tokens.weight,
        "byte_states.ngram_embedding.weight": model.encoder_hash_tok_embedding.weight,
        "patch_encoder.queries.weight": encoder.patch_embedding_projection.weight,
        "from_backbone.weight": decoder.patch_embedding_projection.weight,
        "norm.weight": decoder.norm.weight,
        "head.weight": reference.lm_head.weight,
        **layers_from_reference(encoder.layers, "byte_states.layers."),
        **layers_from_reference(backbone.layers, "backbone."),
        **cross_attention_from_reference(encoder.cross_attn_layers[0], "patch_encoder.cross_attention"),
    }
    if global_width == 24:
        found["to_backbone.weight"] = backbone.token_embedding_projection.weight
    for index, layer in enumerate(decoder.layers):
        found |= layers_from_reference([layer], f"decoder_layers.{index}.")
        found |= cross_attention_from_reference(decoder.cross_attn_layers[index], f"cross_attentions.{index}")
    return found
