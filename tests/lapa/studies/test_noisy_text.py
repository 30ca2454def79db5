import numpy as np
import pytest
import torch

from lapa.checkpoint import read_json
from lapa.runtime import setup
from lapa.schema import NoisyTextStudy, Runtime, StudyConfig, Training
from lapa.studies import noisy_text, study
from lapa.studies.noisy_instructions import (
    ACTIONS,
    COLOURS,
    NO_TARGET,
    NOISES,
    OBJECTS,
    TARGETS,
    ant_speak,
    draw_instructions,
    drop,
    is_held_out,
    random_case,
    repeat,
    typos,
    upper_case,
)

RUNTIME = Runtime(device="cpu", dtype="float32", num_threads=1)
TEXT = "push the red moon to the blue cube, please " * 20


def small(**changes) -> NoisyTextStudy:
    training = Training(num_steps=2, batch_size=8, warmup_steps=1, tensorboard=False)
    values = {"num_train": 100, "num_test": 20, "width": 24, "byte_width": 16, "entropy_steps": 2}
    return NoisyTextStudy(**(values | {"num_layers": 1, "ngram_table_size": 20, "training": training} | changes))


class TestInstructions:
    def test_slots_are_what_the_words_say(self):
        texts, slots = draw_instructions(300, False, 0.1, np.random.default_rng(0))
        for text, (_, colour, thing, target) in zip(texts, slots, strict=True):
            assert COLOURS[colour] in text.lower() and OBJECTS[thing] in text.lower()
            assert TARGETS[target] == NO_TARGET or TARGETS[target] in text.lower()
            assert thing + 1 != target, "nothing is brought to itself"
        assert {ACTIONS[action] for action in slots[:, 0]} == set(ACTIONS)
        for column, values in zip(slots.T, (ACTIONS, COLOURS, OBJECTS, TARGETS), strict=True):
            assert len(set(column)) == len(values)

    def test_the_same_words_mean_something_else_in_another_order(self):
        texts, slots = draw_instructions(4000, False, 0.0, np.random.default_rng(0))
        found = {}
        for text, slot in zip(texts, slots, strict=True):
            found.setdefault(" ".join(sorted(text.lower().strip(".").split())), set()).add(tuple(slot))
        assert max(map(len, found.values())) > 1

    def test_testing_meets_combinations_that_training_does_not(self):
        rng = np.random.default_rng(0)
        combinations = [
            {tuple(slot[1:]) for slot in draw_instructions(2000, held_out, 0.1, rng)[1].tolist()}
            for held_out in (False, True)
        ]
        assert not combinations[0] & combinations[1]
        assert all(is_held_out(*combination) for combination in combinations[1])

    def test_some_are_in_capitals_and_the_seed_decides_all(self):
        texts, _ = draw_instructions(1000, False, 0.2, np.random.default_rng(0))
        assert 0.15 < np.mean([text.isupper() for text in texts]) < 0.25
        assert texts == draw_instructions(1000, False, 0.2, np.random.default_rng(0))[0]


class TestNoise:
    def test_ant_speak(self):
        assert ant_speak("go to it", np.random.default_rng(0)) == "G O T O I T"

    def test_a_tenth_is_dropped(self):
        assert 0.87 < len(drop(TEXT, np.random.default_rng(0))) / len(TEXT) < 0.93

    def test_case_is_random_and_nothing_else(self):
        noisy = random_case(TEXT, np.random.default_rng(0))
        assert noisy.lower() == TEXT.lower()
        assert 0.4 < sum(map(str.isupper, noisy)) / sum(map(str.isalpha, noisy)) < 0.6

    def test_a_fifth_is_repeated(self):
        noisy = repeat("abcdefghij" * 50, np.random.default_rng(0))
        assert 1.3 < len(noisy) / 500 < 1.5  # a fifth is two to four times as long
        assert "".join(c for i, c in enumerate(noisy) if i == 0 or noisy[i - 1] != c) == "abcdefghij" * 50

    def test_capitals(self):
        assert upper_case("Go on", np.random.default_rng(0)) == "GO ON"

    def test_typing_errors_keep_the_length_and_spoil_letters_alone(self):
        noisy = typos("abcdefgh, " * 50, np.random.default_rng(0))
        assert len(noisy) == 500
        assert 0.05 < np.mean([a != b for a, b in zip(noisy, "abcdefgh, " * 50, strict=True)]) < 0.25


def test_no_arm_is_cut_off_under_any_noise():
    rng = np.random.default_rng(0)
    texts, _ = draw_instructions(300, True, 0.1, rng)
    noisy = [spoil(text, rng) for spoil in NOISES.values() for text in texts]
    assert max(map(len, noisy)) <= noisy_text.MAX_BYTES
    assert max(len(text.split()) for text in noisy) <= noisy_text.MAX_WORDS


def test_words_with_capitals_are_other_words():
    torch.manual_seed(0)
    build = noisy_text.encoders(small())
    cased, plain = build["words_cased"](8), build["words"](8)
    assert not torch.equal(*cased.encode_text(["Go", "go"])) and torch.equal(*plain.encode_text(["Go", "go"]))
    assert torch.equal(cased.encode_text(["go to it"]), plain.encode_text(["go to it"]))


def test_byte_pairs_merge_what_is_common_and_know_every_byte():
    pytest.importorskip("tokenizers")
    encoder = noisy_text.encoders(small())["bpe"](8)
    encoder.fit(["push the moon"] * 50, seed=0)
    ids_BW = encoder.encode_text(["push the moon", "häßlich ☃"])
    # Each word of a text that comes often is a token; what was never met is told in bytes.
    assert encoder(ids_BW).is_token_BT.sum(1).tolist() == [3, len("häßlich ☃".encode())]


def test_arms_cost_as_much_as_plain_bytes_and_the_wide_one_has_as_many_parameters(tmp_path):
    options = small(width=32, num_layers=2, num_test=8)
    compute = setup(RUNTIME)
    found = {
        name: noisy_text.run_arm(options, name, 0, tmp_path / name, compute)
        for name in ("bytes", "words", "blt_entropy", "bytes_wide")
    }
    for name in ("words", "blt_entropy"):
        assert found[name]["mflops"] == pytest.approx(found["bytes"]["mflops"], rel=0.15)
    assert found["bytes_wide"]["parameters"] == pytest.approx(found["blt_entropy"]["parameters"], rel=0.15)
    assert found["bytes_wide"]["mflops"] > found["bytes"]["mflops"]
    assert found["words"]["tokens"] < found["blt_entropy"]["tokens"] < found["bytes"]["tokens"]


def test_the_study_runs_and_an_arm_learns(tmp_path):
    options = small(num_train=400, width=32)
    options.training = Training(num_steps=60, batch_size=32, learning_rate=5e-3, warmup_steps=5, tensorboard=False)
    study.run(StudyConfig(output_dir=str(tmp_path), study=options, arms=["words"], seeds=[0, 1], runtime=RUNTIME))
    found = read_json(tmp_path / "results.json")["words"]
    chance = np.mean([1 / len(values) for values in (ACTIONS, COLOURS, OBJECTS, TARGETS)])
    assert found["clean"]["mean"] > 0.5 > 2 * chance
    assert found["upper_case"]["values"] == found["clean"]["values"], "small letters alone are read"
    assert found["drop"]["mean"] < found["clean"]["mean"]
    assert (tmp_path / "table.md").read_text().startswith("| arm | noisy | clean |")
    assert (tmp_path / "study.png").stat().st_size > 1000
