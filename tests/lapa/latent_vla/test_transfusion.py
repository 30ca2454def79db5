import dataclasses

import pytest
import torch

from lapa.backbones.base import LATENT_ACTION, NO_BLOCK, ROBOT_ACTION, Cache, Layout, attention_mask
from lapa.latent_vla.heads import DenoisingActionHead, build_action_head
from lapa.latent_vla.model import DENOISED_BLOCK, DenoisingActionModel, VisionLanguageTrunk, build_action_model
from lapa.latent_vla.transfusion import TransfusionModel, extend, run_in_order
from lapa.schema import DenseBackbone, FutureFrame, WordText
from lapa.text import encode_text

TEXTS = ["go to the red moon", "reach the blue cube", "touch the star", "go"]
FRAME = FutureFrame(weight=5.0, image_size=4, patch_size=2, num_sampling_steps=20)
heads = pytest.mark.parametrize("head_name", ["diffusion", "flow"])


def new_trunk(mask: str = "block_causal") -> VisionLanguageTrunk:
    torch.manual_seed(0)
    backbone = DenseBackbone(width=32, num_layers=2, num_heads=4, mask=mask)
    return VisionLanguageTrunk(backbone, WordText(max_words=6), "keypoints", 16)


def new_model(**changes) -> TransfusionModel:
    return TransfusionModel(new_trunk(), 3, 5, dataclasses.replace(FRAME, **changes))


def batch():
    generator = torch.Generator().manual_seed(1)
    images, future = torch.rand(2, 4, 3, 16, 16, generator=generator)
    return images, encode_text(TEXTS, 6), torch.randint(5, (4, 3), generator=generator), future


def chunks(of_batch):
    """The same with latent actions (B, 1, L), a chunk of one."""
    images, ids, latent, future = of_batch
    return images, ids, latent[:, None], future


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The mask


@pytest.mark.parametrize("frame_first", [False, True])
def test_the_mask_is_causal_and_both_ways_within_the_frame(frame_first):
    """Against a plain loop over the sequence that the backbone is given."""
    model = new_model(frame_first_share=float(frame_first), condition_dropout=0.0)
    seen: list[Layout] = []
    model.trunk.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    model.joint_loss(*chunks(batch()))
    (layout,) = seen
    num_prefix = layout.modality_ids_BS.shape[1] - 4 - 6
    frame = ["begin", "patch", "patch", "patch", "patch", "end"]
    latent = ["readout", "code", "code", "code"]
    kinds = ["prefix"] * num_prefix + (frame + latent if frame_first else latent + frame)
    mask = attention_mask(layout, layout, "block_causal")
    for row in range(4):
        is_token = layout.is_token_BS[row].tolist()
        for query in range(len(kinds)):
            for key in range(len(kinds)):
                together = kinds[query] == kinds[key] and kinds[key] in ("prefix", "patch")
                expected = query == key or (is_token[query] and is_token[key] and (key <= query or together))
                assert mask[row, query, key] == expected, (row, query, key)
    assert (layout.position_ids_BS.diff(dim=1)[:, num_prefix:] == 1).all()


def test_another_order_of_a_row_is_that_order_in_a_backbone_and_the_same_order_out():
    backbone = new_trunk().backbone
    tokens = torch.randn(2, 5, 32)
    layout = Layout.of(torch.tensor([[0, 0, 1, 1, 2]] * 2), torch.tensor([[-1, -1, 1, 1, -1]] * 2))
    order = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 3, 4, 1]])
    hidden = run_in_order(backbone, tokens, layout, order)
    torch.testing.assert_close(hidden[0], backbone(tokens[:1], layout[:1])[0])
    other = backbone(
        tokens[1:, order[1]], Layout.of(torch.tensor([[0, 1, 1, 2, 0]]), torch.tensor([[-1, 1, 1, -1, -1]]))
    )
    torch.testing.assert_close(hidden[1, order[1]], other[0])


# Frames


def test_a_frame_that_follows_does_not_change_what_is_said_of_the_latent_action():
    model = new_model(frame_first_share=0.0, condition_dropout=0.0).eval()
    images, ids, latent, future = batch()
    expected, _ = model.loss(images, ids, latent[:, None])
    for other in (future, 1 - future):
        loss, numbers = model.joint_loss(images, ids, latent[:, None], other)
        torch.testing.assert_close(loss - 5.0 * numbers["future_frame_loss"], expected)


def test_a_frame_that_comes_first_does():
    model = new_model(frame_first_share=1.0, condition_dropout=0.0).eval()
    images, ids, latent, future = batch()
    losses = [
        model.joint_loss(images, ids, latent[:, None], other, seeded())[1]["token_cross_entropy"]
        for other in (future, 1 - future)
    ]
    assert (losses[0] - losses[1]).abs() > 1e-4


def test_the_noise_cap_holds_where_the_frame_comes_first(monkeypatch):
    model, drawn = new_model(frame_first_share=0.5, frame_first_max_noise=0.25), []
    draw = model.frame.process.draw_times
    monkeypatch.setattr(model.frame.process, "draw_times", lambda *a: drawn.append((a[2], draw(*a))) or drawn[-1][1])
    for seed in range(20):
        model.joint_loss(*chunks(batch()), seeded(seed))
    most, time = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert set(most.tolist()) == {0.25, 1.0}
    assert (time <= most).all() and time[most == 1].max() > 0.9


def test_every_weight_is_trained():
    model = new_model(frame_first_share=0.5, condition_dropout=0.5)
    # The convolutions of a residual branch begin at zero, and what is before them gets its gradient one step later.
    for name, weight in model.named_parameters():
        if name.endswith(("second.weight", "second.1.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    for seed in range(8):
        model.joint_loss(*chunks(batch()), seeded(seed))[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_rows_without_condition_know_neither_instruction_nor_latent_action():
    model = new_model(frame_first_share=0.0, condition_dropout=1.0).eval()
    images, ids, latent, future = batch()
    # The first row always has its condition; only the others are looked at.
    found = []
    for other_ids, other in ((ids, latent), (ids.roll(1, 0), (latent + 1) % 5)):
        other_ids[0], other[0] = ids[0], latent[0]
        found.append(model.joint_loss(images, other_ids, other[:, None], future, seeded())[1]["future_frame_loss"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_denoising_with_the_cache_equals_the_whole_sequence_anew(patches):
    model = new_model(patches=patches).eval()
    images, ids, latent, _ = batch()
    backbone, frame = model.trunk.backbone, model.frame
    start, present = torch.randn(4, 3, 4, 4, generator=seeded()), model.frame.shrink(images)
    told = model.whole_latent(latent, torch.zeros(4, dtype=torch.bool))
    cache = Cache()
    model.trunk(images, ids, told, LATENT_ACTION, cache)
    clean = frame.append(backbone, cache, start, 6, DENOISED_BLOCK, present)

    prefix, prefix_layout = model.trunk.prefix(images, ids)
    before = prefix_layout.then(model.trunk.action_layout(prefix_layout, told, LATENT_ACTION))

    def whole(tokens_BPD):
        """Hidden states of the whole sequence: prefix, latent action, begin, patches, end."""
        tokens, modality_ids, block_ids = frame.enclose(tokens_BPD, DENOISED_BLOCK)
        after = Layout.of(modality_ids, block_ids, first_position=before.position_ids_BS[:, -1] + 1)
        return backbone(torch.cat([prefix, told, tokens], dim=1), before.then(after))

    def predict(noised, time_B):
        tokens, read = frame.embed(noised, time_B, present)
        return read(whole(tokens)[:, -5:-1])

    with torch.no_grad():
        torch.testing.assert_close(clean, frame.process.sample(predict, start, 6, 1.0), atol=1e-4, rtol=1e-4)
        # What follows sees the clean frame, at time 0, and the end token.
        following = torch.randn(4, 1, 32)
        hidden = extend(backbone, following, LATENT_ACTION, cache)
        tokens, modality_ids, block_ids = frame.enclose(frame.embed(clean, torch.zeros(4), present)[0], DENOISED_BLOCK)
        after = Layout.of(modality_ids, block_ids, first_position=before.position_ids_BS[:, -1] + 1)
        layout = before.then(after)
        layout = layout.then(model.trunk.action_layout(layout, following, LATENT_ACTION))
        expected = backbone(torch.cat([prefix, told, tokens, following], dim=1), layout)[:, -1:]
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


def test_guidance_moves_away_from_the_frame_without_condition():
    images, ids, latent, _ = batch()
    model = new_model().eval()
    plain = model.imagine(images, ids, latent)
    assert torch.equal(plain, model.imagine(images, ids, latent))
    model.future_frame = dataclasses.replace(model.future_frame, guidance=4.0)
    assert not torch.allclose(plain, model.imagine(images, ids, latent), atol=1e-3)
    model.future_frame = dataclasses.replace(model.future_frame, guidance=1.0 + 1e-6)
    torch.testing.assert_close(plain, model.imagine(images, ids, latent), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="needs a cache without the condition"):
        model.frame.append(model.trunk.backbone, Cache(), torch.randn(4, 3, 4, 4), 2, DENOISED_BLOCK, guidance=3.0)


@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_one_batch_is_learned_and_its_future_sampled_back(process):
    model = new_model(process=process, frame_first_share=0.2)
    images, ids, latent, _ = batch()
    future = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[..., None, None].expand(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    often = [part.repeat(8, *[1] * (part.ndim - 1)) for part in (images, ids, latent, future)]
    for step in range(70):
        loss, _ = model.joint_loss(*chunks(often), seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model.generate(images, ids), latent)
    # The mean of the four is off by 0.5.
    assert (model.imagine(images, ids, latent) - future[..., :4, :4]).abs().mean() < 0.15


def test_shares_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"condition_dropout is 1.5, expected a share"):
        new_model(condition_dropout=1.5)
    with pytest.raises(ValueError, match="frame_first_max_noise is 0, expected more than 0"):
        new_model(frame_first_max_noise=0)
    with pytest.raises(ValueError, match="48 numbers, which do not pass through tokens of width 32"):
        new_model(patch_size=4, predicts="papers")


# Action chunks


def action_model(head_name: str, num_sampling_steps: int = 10) -> DenoisingActionModel:
    trunk = new_trunk()
    model = build_action_model(trunk, build_action_head(head_name, 32, 4, 2, 8, num_sampling_steps))
    assert isinstance(model, DenoisingActionModel)
    return model


def test_the_chunk_sees_itself_both_ways_and_the_readout_does_not_see_it():
    model = action_model("flow")
    seen: list[Layout] = []
    model.trunk.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    is_pad = torch.zeros(4, 4, dtype=torch.bool)
    is_pad[0, 3] = True
    images, ids, *_ = batch()
    model.loss(images, ids, torch.randn(4, 4, 2), is_pad)
    layout = seen[0]
    assert layout.modality_ids_BS[0, -5:].tolist() == [ROBOT_ACTION] * 5
    assert layout.block_ids_BS[0, -5:].tolist() == [NO_BLOCK, *[DENOISED_BLOCK] * 4]
    mask = attention_mask(layout, layout, "block_causal")[:, -5:, -5:].int().tolist()
    assert mask[1] == [[1, 0, 0, 0, 0], *[[1, 1, 1, 1, 1]] * 4]
    assert mask[0] == [[1, 0, 0, 0, 0], *[[1, 1, 1, 1, 0]] * 3, [0, 0, 0, 0, 1]]


@heads
def test_padded_actions_change_no_loss(head_name):
    model, losses = action_model(head_name).eval(), []
    images, ids, *_ = batch()
    actions, is_pad = torch.randn(4, 4, 2), torch.zeros(4, 4, dtype=torch.bool)
    is_pad[1, 2:] = True
    for value in (0.0, 7.0):
        torch.manual_seed(0)
        losses.append(model.loss(images, ids, actions.masked_fill(is_pad[..., None], value), is_pad)[0])
    assert losses[0].shape == (4,)
    torch.testing.assert_close(losses[0], losses[1])


@heads
def test_a_chunk_denoised_with_the_cache_equals_the_whole_sequence_anew(head_name):
    model = action_model(head_name).eval()
    images, ids, *_ = batch()
    found = model.decode(images, ids, seeded())
    head, readout = model.action_head, model.trunk.readout.expand(4, 1, -1)

    def predict(noised, time_B):
        tokens = torch.cat([readout, head.tokens(noised, time_B)], dim=1)
        block = torch.tensor([NO_BLOCK] + [DENOISED_BLOCK] * 4)
        hidden = model.trunk(images, ids, tokens, ROBOT_ACTION, block=block)[:, 1:]
        return head.read(hidden)

    with torch.no_grad():
        expected = head.process.sample(predict, torch.randn(4, 4, 2, generator=seeded()), 10)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@heads
def test_chunks_depend_on_the_observation_alone_unless_a_generator_is_passed(head_name):
    model = action_model(head_name).eval()
    images, ids, *_ = batch()
    chunk = model.decode(images, ids)
    torch.testing.assert_close(model.decode(images[2:3], ids[2:3]), chunk[2:3], atol=1e-5, rtol=1e-4)
    assert torch.equal(model.decode(images, ids, seeded()), model.decode(images, ids, seeded()))
    assert not torch.allclose(model.decode(images, ids, seeded(1)), model.decode(images, ids, seeded(2)), atol=1e-2)


@heads
def test_two_ways_of_doing_it_are_sampled_and_not_their_mean(head_name):
    """One observation, two chunks: L1 or L2 regression would stop between them."""
    model = action_model(head_name, num_sampling_steps=20)
    images, ids = (part[:1].repeat(16, *[1] * (part.ndim - 1)) for part in batch()[:2])
    side = torch.tensor([-1.0, 1.0]).repeat(8)[:, None, None].expand(-1, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 100)
        torch.manual_seed(step)
        loss = model.loss(images, ids, side, torch.zeros(16, 4, dtype=torch.bool))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chunks = model.eval().decode(images.repeat(4, 1, 1, 1), ids.repeat(4, 1), seeded())
    assert (chunks.abs() - 1).abs().mean() < 0.25
    assert 6 < (chunks.mean((1, 2)) > 0).sum() < 58


@heads
def test_samples_stay_within_the_actions_that_were_seen(head_name):
    model = action_model(head_name).eval()
    model.action_head.fit_limits(torch.tensor([[0.1, -0.5], [-0.2, 0.3]]))
    images, ids, *_ = batch()
    assert (model.decode(images, ids).abs() <= torch.tensor([0.2, 0.5]) + 1e-6).all()


def test_impossible_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="num_sampling_steps is 0, expected at least 1"):
        DenoisingActionHead(32, 4, 2, "flow", 0)
