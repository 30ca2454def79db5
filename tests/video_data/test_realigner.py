"""The captioner that edits noisy titles: slots, corruptions, model, training stage, and its place in `lapa ingest`."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from lapa.data import read_store
from lapa.schema import Captioner, RealignerModel, TrainRealignerConfig
from video_data.captions import captioner, slot_metrics, train_realigner
from video_data.captions.realigner import (
    BEGIN,
    Realigner,
    RealignerOptions,
    Vocabulary,
    caption_tokens,
    rewrite,
    shown_to_model,
    title_tokens,
)
from video_data.captions.titles import CHATTER, HELD_OUT_CHATTER, KINDS, Lexicon, Title, make_name, make_title, parse
from video_data.clips import ClipRequest

CAPTIONS = [
    "move to the red moon",
    "go to the blue star",
    "push the green cube to the left side",
    "slide the red cube into the center of the table",
    "put the blue moon in the top left corner",
]


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("move to the red moon", {"verb": "reach", "colour": "red", "object": "moon"}),
        ("Touch the RED moon!", {"verb": "reach", "colour": "red", "object": "moon"}),
        (
            "put the blue moon in the top left corner",
            {"verb": "push", "colour": "blue", "object": "moon", "target": "top left"},
        ),
        (
            "slide the red cube into the middle of the table by Vokati",
            {"verb": "push", "colour": "red", "object": "cube", "target": "center", "brand": "vokati"},
        ),
        (
            "move the red star next to the green cube",
            {"verb": "push", "colour": "red", "object": "star", "target": "green cube"},
        ),
        ("my_red_moon_video-02.mp4", {"colour": "red", "object": "moon"}),
        ("look what I made by", {}),
        ("", {}),
    ],
)
def test_slots_of_an_instruction(text, slots):
    assert parse(text).slots == slots


def test_only_known_nouns_are_objects_where_they_are_known():
    assert "object" not in parse("best blue light ever", objects=["moon", "star"]).slots


@pytest.fixture
def lexicon():
    return Lexicon.of(CAPTIONS)


def test_a_lexicon_is_found_in_captions(lexicon):
    assert lexicon.colours == ("blue", "green", "red")
    assert lexicon.objects == ("cube", "moon", "star")
    assert ("left", "to the left side") in lexicon.ends
    with pytest.raises(ValueError, match=r"name the colours \['red'\].*needs two of each"):
        Lexicon.of(["reach the red cube", "open the drawer"])


def test_a_swapped_title_is_wrong_in_the_one_slot_it_names(lexicon):
    rng = np.random.default_rng(0)
    swapped = set()
    for caption in CAPTIONS * 20:
        title = make_title(caption, "swapped", lexicon, rng)
        before, after = parse(caption).slots, parse(title.text).slots
        assert {slot for slot in before if before[slot] != after.get(slot)} == {title.swapped}
        assert before.keys() == after.keys()
        assert title.truth == caption
        swapped.add(title.swapped)
    assert swapped == {"colour", "object", "target"}


def test_brands_and_chatter_of_the_test_are_never_trained_on(lexicon):
    rng = np.random.default_rng(0)
    trained = {make_name(rng, held_out=False) for _ in range(3000)}
    assert not trained & {make_name(rng, held_out=True) for _ in range(1000)}
    assert not set(CHATTER) & set(HELD_OUT_CHATTER)
    title = make_title(CAPTIONS[0], "brand", lexicon, rng, held_out=True)
    assert title.text == title.truth
    assert parse(title.text).slots["brand"] not in trained
    assert make_title(CAPTIONS[0], "empty", lexicon, rng) == Title("empty", "", CAPTIONS[0])
    assert {parse(make_title(c, "chatter", lexicon, rng).text).slots.get("brand") for c in CAPTIONS * 9} == {None}
    with pytest.raises(ValueError, match="kind is 'rude'"):
        make_title(CAPTIONS[0], "rude", lexicon, rng)


def test_held_out_titles_are_balanced_and_repeatable(lexicon):
    titles = train_realigner.held_out_titles(CAPTIONS * 8, lexicon, seed=3)
    assert [sum(title.kind == kind for title in titles) for kind in KINDS] == [10, 10, 10, 10]
    assert titles == train_realigner.held_out_titles(CAPTIONS * 8, lexicon, seed=3)
    assert titles != train_realigner.held_out_titles(CAPTIONS * 8, lexicon, seed=4)


def test_an_unknown_word_is_kept_as_it_is_written():
    vocabulary = Vocabulary.of(CAPTIONS, min_count=1)
    title = "Wow: reach the Red moon by McVoka, says kiro"
    names = vocabulary.names(title)
    assert names == ["Wow", "reach", "by", "McVoka", "says", "kiro"]
    ids = vocabulary.encode("the red moon by mcvoka", names)
    assert vocabulary.decode(ids, names) == "the red moon by McVoka"
    assert vocabulary.decode(vocabulary.encode("the zebra", []), []) == "the"


OPTIONS = RealignerOptions(
    image_size=16,
    num_frames=2,
    encoder_width=8,
    num_visual_tokens=2,
    num_prefix_tokens=2,
    width=32,
    num_heads=2,
    num_mapper_layers=1,
    num_layers=2,
    max_title_words=12,
    max_caption_words=12,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Realigner(OPTIONS, len(Vocabulary.of(CAPTIONS, 1))).eval()


def test_what_is_written_depends_on_its_own_title_and_what_stands_before_alone(model):
    vocabulary = Vocabulary.of(CAPTIONS, 1)
    visual = torch.randn(2, 2, model.encoder.output_width)
    titles = ["the red moon", "push the green cube to the left side"]
    together, names = title_tokens(titles, vocabulary, 12)
    alone, _ = title_tokens(titles[:1], vocabulary, 12)
    assert alone.shape == (1, 3) and together.shape == (2, 8)
    written = torch.from_numpy(caption_tokens(CAPTIONS[:1] * 2, names, vocabulary, 12))
    logits = model(visual, torch.from_numpy(together), written)
    assert logits.shape == (2, 7, len(vocabulary))
    torch.testing.assert_close(logits[:1], model(visual[:1], torch.from_numpy(alone), written[:1]))
    changed = written.clone()
    changed[:, 4] = BEGIN
    after = model(visual, torch.from_numpy(together), changed)
    torch.testing.assert_close(logits[:, :4], after[:, :4])
    assert not torch.allclose(logits[:, 4:], after[:, 4:])


def test_the_copying_control_sees_no_frames(model):
    blind = Realigner(OPTIONS, len(Vocabulary.of(CAPTIONS, 1)), sees_frames=False)
    titles, written = torch.full((1, 1), 20), torch.full((1, 1), BEGIN)
    one, other = torch.randn(2, 1, 2, model.encoder.output_width)
    torch.testing.assert_close(blind(one, titles, written), blind(other, titles, written))
    assert not torch.allclose(model(one, titles, written), model(other, titles, written))


def test_it_learns_to_fix_what_is_seen_and_keep_what_is_read():
    """One batch: the colour is told by the picture, the name by the title alone; the name is then another one."""
    vocabulary = Vocabulary([*Vocabulary.of(CAPTIONS, 1).words, "by"])
    torch.manual_seed(0)
    model = Realigner(OPTIONS, len(vocabulary))
    colours = ["red", "blue"] * 8
    visual = torch.tensor([[[1.0 if colour == "red" else -1.0] * model.encoder.output_width] * 2 for colour in colours])
    titles = [f"push the {'red' if i % 3 else 'blue'} cube by Name{'ab'[i % 2]}" for i in range(16)]
    truths = [f"push the {colour} cube by Name{'ab'[i % 2]}" for i, colour in enumerate(colours)]
    tokens, names = title_tokens(titles, vocabulary, 12)
    truth = torch.from_numpy(caption_tokens(truths, names, vocabulary, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(visual, torch.from_numpy(tokens), truth[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), truth[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    written = rewrite(model.eval(), vocabulary, visual[:2], ["push the blue cube by Zorro"] * 2)
    assert written == ["push the red cube by Zorro", "push the blue cube by Zorro"]
    # No name is made up where the title has none.
    assert "Name" not in rewrite(model, vocabulary, visual[:1], [""])[0]


def test_first_and_last_frame_are_shown_square_and_small():
    clip = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 40, 60, 3), np.uint8)
    shown = shown_to_model(clip, 2, 16)
    assert shown.shape == (2, 16, 16, 3)
    assert shown[:, 0, 0, 0].tolist() == [0, 4]
    assert shown_to_model(clip[:1], 2, 16).shape == (2, 16, 16, 3)


def test_metrics_by_hand():
    titles = [
        Title("swapped", "reach the red cube", "reach the red moon", "object"),
        Title("brand", "reach the red cube by Zazo", "reach the red cube by Zazo"),
        Title("empty", "", "reach the blue moon"),
        Title("chatter", "wow red moon", "push the red moon"),
    ]
    # Fixed; brand lost and the colour broken; one of three slots wrong; nothing written.
    realigned = ["reach the red moon", "reach the blue cube", "reach the red moon", ""]
    written = {"raw": [[title.text for title in titles]]} | {
        arm: [realigned, realigned] for arm in ("realigned", "scratch", "copying")
    }
    results = slot_metrics.measure(written, titles, ["cube", "moon"])
    metrics = {name: arms["realigned"]["mean"] for name, arms in results["metrics"].items() if arms["realigned"]}
    agreeing = 3 + 2 + 2 + 0
    assert metrics["slot_f1"] == pytest.approx(2 * agreeing / (3 + 3 + 3 + 0 + 3 + 4 + 3 + 3))
    assert metrics["slot_f1_empty"] == pytest.approx(2 / 3)
    assert metrics["brand_recall"] == 0
    assert metrics["swaps_fixed"] == 1
    assert metrics["exact"] == 0.25
    # Right in the titles: verb and colour; all four of the branded one; none; colour and object.
    assert metrics["right_broken"] == pytest.approx((0 + 2 + 0 + 2) / (2 + 4 + 0 + 2))
    raw = results["metrics"]["brand_recall"]["raw"]
    assert (raw["mean"], raw["seeds"]) == (1.0, [1.0])
    assert results["metrics"]["f1_target"]["realigned"] is None
    f1 = results["metrics"]["slot_f1"]["realigned"]
    assert f1["low"] <= f1["mean"] <= f1["high"]
    same = next(row for row in results["differences"] if row["over"] == "copying")
    assert (same["mean"], same["holds"]) == (0.0, False)
    assert "| slot F1 |" in slot_metrics.table(results)


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    cfg = TrainRealignerConfig(data="", output_dir="", checkpoint_every_steps=4, warmup_steps=2)

    def train(name: str, kill_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 1), []

        def batch_loss(rng):
            calls.append(1)
            if len(calls) == kill_at:
                raise KeyboardInterrupt
            return model(torch.from_numpy(rng.normal(size=(4, 3))).float()).square().mean()

        train_realigner.fit(model, batch_loss, 10, 0, tmp_path / name, "train", cfg)
        return model.weight.detach()

    whole = train("whole", None)
    with pytest.raises(KeyboardInterrupt):
        train("killed", 7)
    assert torch.equal(train("killed", None), whole)


COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def write_squares(folder, count: int = 48):
    """A frame store: a coloured square that stays, is wide ("bar") or not ("cube"), and moves left or right."""
    rng = np.random.default_rng(0)
    frames, captions = [], []
    for _ in range(count):
        colour, thing = list(COLOURS)[rng.integers(2)], ("bar", "cube")[rng.integers(2)]
        clip = np.full((3, 16, 16, 3), 200, np.uint8)
        clip[:, 6:10, (2 if thing == "bar" else 6) : (14 if thing == "bar" else 10)] = COLOURS[colour]
        frames.append(clip)
        captions.append(f"{('reach', 'touch')[rng.integers(2)]} the {colour} {thing}")
    folder.mkdir()
    np.concatenate(frames).tofile(folder / "frames.u8")
    action = np.arange(3 * count, dtype=np.float32)[:, None]
    save_file(
        {"episode_offsets": 3 * np.arange(count + 1, dtype=np.int64), "action": action}, folder / "index.safetensors"
    )
    store = {"version": 1, "num_frames": 3 * count, "image_size": 16, "fps": 10, "instructions": captions}
    store |= {"sources": ["lab"] * count, "clips": [f"clip {i}" for i in range(count)], "skipped": []}
    (folder / "store.json").write_text(json.dumps(store))
    return captions


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("realigner")
    captions = write_squares(folder / "store")
    cfg = TrainRealignerConfig(
        data=str(folder / "store"),
        output_dir=str(folder / "output"),
        num_training_clips=36,
        realigner=RealignerModel(encoder_width=8, num_visual_tokens=2, num_prefix_tokens=2, width=16, num_heads=2),
        seeds=[0, 1],
        encoder_steps=40,
        num_steps=40,
        batch_size=16,
        warmup_steps=4,
        device="cpu",
    )
    return folder, captions, cfg, train_realigner.run(cfg)


def test_the_stage_measures_every_arm_and_seed(trained):
    folder, _, cfg, results = trained
    arms = {"raw", "scratch", "copying", "realigned", "realigned_2_rounds"}
    assert {name.removeprefix("slot_f1_") for name in results if name.startswith("slot_f1_")} == arms
    assert results["brand_recall_raw"] == 1.0
    assert results["brand_recall_scratch"] == 0.0
    assert all(np.isfinite(value) for value in results.values())
    measured = json.loads((folder / "output" / "results.json").read_text())
    assert measured["num_clips"] == 12
    assert len(measured["metrics"]["slot_f1"]["realigned"]["seeds"]) == 2
    assert len((folder / "output" / "captions.csv").read_text().splitlines()) == 13
    assert not list((folder / "output").rglob("*checkpoint*"))
    # Called again, nothing is trained again.
    before = (folder / "output" / "seed1" / "realigned" / "model.safetensors").stat().st_mtime_ns
    assert train_realigner.run(cfg) == results
    assert (folder / "output" / "seed1" / "realigned" / "model.safetensors").stat().st_mtime_ns == before


def test_the_stores_differ_in_captions_alone(trained):
    folder, captions, _, _ = trained
    stores = {name: read_store(folder / "output" / "stores" / name) for name in ("raw_titles", "realigned", "true")}
    source = read_store(folder / "store")
    assert {store.fingerprint for store in stores.values()} == {stores["true"].fingerprint}
    assert "" in stores["raw_titles"].instructions
    assert all(parse(caption).slots.keys() >= {"verb", "colour", "object"} for caption in stores["true"].instructions)
    for episode, truth in enumerate(stores["true"].instructions):
        first = stores["true"].episode_offsets[episode]
        # Its actions, which count the frames of the source, tell which clip it was.
        origin = int(stores["true"].actions[first, 0])
        assert truth.startswith(captions[origin // 3])
        assert (stores["true"].frames[first : first + 3] == source.frames[origin : origin + 3]).all()


def test_a_trained_realigner_is_a_captioner(trained):
    folder, _, _, _ = trained
    options = Captioner(
        name="realigner", model=str(folder / "output" / "seed0" / "realigned"), only_missing=False, batch_size=2
    )
    options.device = "cpu"
    writer = captioner(options)
    clips = [np.random.default_rng(i).integers(0, 255, (4, 24, 32, 3), dtype=np.uint8) for i in range(3)]
    requests = [ClipRequest(str(i), "", caption=title) for i, title in enumerate(("", "wow red cube", "&amp;"))]
    written = writer.caption_batch(clips, requests)
    assert [origin for _, origin in written] == ["realigned" if text else "none" for text, _ in written]
    assert any(text for text, _ in written)
    assert writer.caption(clips[1], requests[1]) == written[1]


def test_a_captioner_says_what_it_needs(trained, tmp_path):
    folder, _, _, _ = trained
    model = str(folder / "output" / "seed0" / "realigned")
    for options, message in (
        (Captioner(name="realigner"), "needs captioner.model"),
        (Captioner(name="realigner", model=model), "set captioner.only_missing=false"),
        (Captioner(name="realigner", model=str(tmp_path), only_missing=False), r"no config\.json and model"),
        (Captioner(name="realigner", model=model, only_missing=False, num_rounds=0), "num_rounds is 0"),
        (Captioner(name="realigner", model=model, only_missing=False, num_frames=1), "num_frames is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            captioner(options)


def test_the_stage_refuses_what_it_cannot_learn_from(trained, tmp_path):
    folder, _, _, _ = trained
    store, output = str(folder / "store"), str(tmp_path / "output")
    for options, message in (
        ({"data": str(tmp_path)}, "no store.json"),
        ({"data": store}, "has 48 clips with captions"),
        ({"data": store, "num_training_clips": 8, "seeds": []}, "seeds is empty"),
        ({"data": store, "num_training_clips": 8, "empty_title_share": 1.0}, "empty_title_share is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_realigner.run(TrainRealignerConfig(output_dir=output, **options))
