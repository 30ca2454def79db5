"""Episodes of a square that moves left or right, as its instruction says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapa.backbones.base import IMAGE, ROBOT_ACTION, TEXT, build_backbone
from lapa.checkpoint import read_json, write_json, write_tensors
from lapa.runtime import setup
from lapa.schema import ModalitiesStudy, Runtime, StudyConfig, Training
from lapa.studies import study as harness
from lapa.studies.modalities import (
    END,
    FIRST_WORD,
    PADDING,
    TEXT_FIRST,
    TEXT_LAST,
    SequenceModel,
    action_bins,
    backbones,
    held_out_nats,
    kmeans,
    mean_nats,
    read_corpus,
)

NUM_EPISODES, LENGTH, SIZE = 10, 6, 16
NUM_TEXT = 1 + 4 + 1  # begin, words of the longer instruction, end


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> ModalitiesStudy:
    folder = tmp_path_factory.mktemp("data") / "squares"
    folder.mkdir()
    generator = np.random.default_rng(0)
    frames = np.full((NUM_EPISODES * LENGTH, SIZE, SIZE, 3), 50, np.uint8)
    actions = np.zeros((len(frames), 2), np.float32)
    for episode in range(NUM_EPISODES):
        step = -1 if episode % 2 else 1
        for time in range(LENGTH):
            x = 8 + step * time
            frames[episode * LENGTH + time, 4:8, x : x + 3] = generator.integers(200, 255, 3)
        actions[episode * LENGTH : (episode + 1) * LENGTH, 0] = step
    frames.tofile(folder / "frames.u8")
    offsets = torch.arange(NUM_EPISODES + 1) * LENGTH
    write_tensors(folder / "index.safetensors", {"episode_offsets": offsets, "action": torch.from_numpy(actions)})
    meta = {"version": 1, "num_frames": len(frames), "image_size": SIZE, "fps": 10.0, "skipped": []}
    texts = ["move left" if episode % 2 else "Move to the right" for episode in range(NUM_EPISODES)]
    write_json(folder / "store.json", meta | {"instructions": texts, "sources": ["toy"] * NUM_EPISODES})
    return ModalitiesStudy(
        data=str(folder),
        image_size=SIZE,
        patch_size=8,
        num_image_codes=8,
        num_action_bins=4,
        num_images=3,
        frame_gap=2,
        holdout_fraction=0.2,
        num_held_out=4,
        width=16,
        num_layers=1,
        num_heads=2,
        training=Training(num_steps=4, batch_size=4, warmup_steps=1, log_every_steps=2, tensorboard=False),
    )


def test_a_sequence_tells_the_episode_in_order(study):
    corpus = read_corpus(study)
    start = int(corpus.starts[0][0])
    tokens_BS, slots_BS = corpus.sequences(np.array([start, start]), np.array([True, False]))
    assert tokens_BS.shape == slots_BS.shape == (2, NUM_TEXT + 3 * 4 + 2 * 2 * 2)
    first, last = tokens_BS.tolist()
    seen = [
        *corpus.image_NP[start],
        *corpus.action_NA[start : start + 2].flatten(),
        *corpus.image_NP[start + 2],
        *corpus.action_NA[start + 2 : start + 4].flatten(),
        *corpus.image_NP[start + 4],
    ]
    assert first[NUM_TEXT:] == seen and last[1 : 1 + len(seen)] == seen
    text = [token for token in first[:NUM_TEXT] if token != PADDING]
    assert text[0] == TEXT_FIRST and text[-1] == END
    assert last[0] == TEXT_LAST and last[1 + len(seen) :][: len(text) - 1] == text[1:]
    # A token has the same slot wherever its part of the sequence stands.
    slots = [
        dict(zip(row.tolist(), places.tolist(), strict=True)) for row, places in zip(tokens_BS, slots_BS, strict=True)
    ]
    assert all(slots[0][word] == slots[1][word] for word in text[1:])
    assert set(corpus.modality_V[tokens_BS[0, NUM_TEXT:]].tolist()) == {IMAGE, ROBOT_ACTION}
    assert set(corpus.modality_V[tokens_BS[0, :NUM_TEXT]].tolist()) == {TEXT}


def test_held_out_episodes_are_not_trained_on_and_sequences_stay_within_an_episode(study):
    corpus = read_corpus(study)
    training, held_out = (set(corpus.episode_N[starts]) for starts in corpus.starts)
    assert len(training) == 8 and len(held_out) == 2 and not training & held_out
    for starts in corpus.starts:
        assert (corpus.episode_N[starts] == corpus.episode_N[starts + 4]).all()


def test_words_are_those_of_the_training_episodes(study):
    corpus = read_corpus(study)
    words = {token for row in corpus.text_last_EW for token in row if token >= FIRST_WORD}
    assert len(words) == 5  # move, left, to, the, right


def test_padding_is_neither_predicted_nor_looked_at(study):
    corpus = read_corpus(study)
    torch.manual_seed(0)
    model = SequenceModel(backbones(study)["mot"], corpus).eval()
    shorter = int(np.flatnonzero((corpus.text_first_EW[corpus.episode_N[corpus.starts[0]]] == PADDING).any(1))[0])
    tokens_BS, slots_BS = corpus.sequences(corpus.starts[0][[shorter]], np.array([True]))
    nats_BS, modality_BS = model.token_nats(tokens_BS, slots_BS)
    num_padding = int((tokens_BS == PADDING).sum())
    assert num_padding == 2
    assert (modality_BS[0, :num_padding] == -1).all() and (modality_BS[0, num_padding:] >= 0).all()
    alone_BS, _ = model.token_nats(tokens_BS[:, num_padding:], slots_BS[:, num_padding:])
    torch.testing.assert_close(nats_BS[:, num_padding:], alone_BS, atol=1e-5, rtol=1e-4)


def test_a_token_is_predicted_from_those_before_it(study):
    corpus = read_corpus(study)
    torch.manual_seed(0)
    model = SequenceModel(backbones(study)["mot"], corpus).eval()
    tokens_BS, slots_BS = corpus.sequences(corpus.starts[0][:1], np.array([False]))
    other_BS = tokens_BS.clone()
    other_BS[0, 9] = tokens_BS[0, 8]
    before, after = (model.token_nats(tokens, slots_BS)[0][0] for tokens in (tokens_BS, other_BS))
    torch.testing.assert_close(before[:8], after[:8])
    assert not torch.isclose(before[8:], after[8:]).any()


def test_losses_are_means_over_the_tokens_of_a_modality():
    nats_BS = torch.tensor([[1.0, 2.0, 6.0, 0.0]])
    numbers = mean_nats(nats_BS, torch.tensor([[TEXT, IMAGE, IMAGE, -1]]))
    assert (numbers["nats"], numbers["text_nats"], numbers["image_nats"]) == (3.0, 1.0, 4.0)


def test_bins_of_actions_have_equal_counts():
    actions_NA = np.random.default_rng(0).normal(size=(400, 2))
    bins_NA = action_bins(actions_NA, np.ones(400, bool), 8)
    assert np.bincount(bins_NA[:, 0]).tolist() == [50] * 8


def test_codes_are_the_centres_of_clusters():
    centres = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 9.0]])
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    codes = kmeans(points, 3, torch.Generator().manual_seed(1))
    assert torch.cdist(codes, centres).min(0).values.max() < 0.2


def test_arms_have_equal_flops_and_the_wide_one_the_parameters():
    sizes = ModalitiesStudy()
    models = {name: build_backbone(config) for name, config in backbones(sizes).items()}
    flops = {name: model.forward_flops([10, 48, 0, 0, 16]) for name, model in models.items()}
    assert len({flops[name] for name in flops if name != "dense_wide"}) == 1 and flops["dense_wide"] > flops["dense"]
    assert abs(models["dense_wide"].num_parameters() / models["mot"].num_parameters() - 1) < 0.05
    assert models["mot"].num_parameters() == 3 * models["dense"].num_parameters()


def test_the_study_runs_to_its_table(study, tmp_path, capsys):
    config = StudyConfig(
        output_dir=str(tmp_path), study=study, seeds=[0], arms=["dense", "mot"], runtime=Runtime(device="cpu")
    )
    headline = harness.run(config)
    results = read_json(tmp_path / "results.json")
    assert headline["mot_nats"] == results["mot"]["nats"]["mean"]
    assert results["dense"]["text_steps_to_match"]["mean"] <= 1
    assert {"image_steps_to_match", "action_nats", "forward_megaflops"} <= set(results["mot"])
    assert (tmp_path / "study.png").is_file() and "| mot |" in (tmp_path / "table.md").read_text()


def test_training_lowers_the_loss_of_every_modality(study):
    corpus = read_corpus(study)
    torch.manual_seed(0)
    model = SequenceModel(backbones(study)["mot"], corpus)
    rng = np.random.default_rng(0)
    held_out = corpus.sequences(corpus.starts[1], rng.random(len(corpus.starts[1])) < 0.5)
    compute = setup(Runtime(device="cpu", num_threads=1))
    before = held_out_nats(model, held_out, compute)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        starts = rng.choice(corpus.starts[0], 8)
        loss = mean_nats(*model.token_nats(*corpus.sequences(starts, rng.random(8) < 0.5)))["nats"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = held_out_nats(model, held_out, compute)
    assert all(after[name] < 0.7 * before[name] for name in before)


def test_data_without_long_enough_episodes_is_refused(study):
    with pytest.raises(ValueError, match=r"no episode of 13 frames.*lower study.frame_gap"):
        read_corpus(replace(study, frame_gap=6))
    with pytest.raises(ValueError, match=r"study.patch_size is 6"):
        read_corpus(replace(study, patch_size=6))
