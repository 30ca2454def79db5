import dataclasses

import numpy as np
import pytest
import torch

from lapa.checkpoint import read_json
from lapa.schema import FactsStudy, Runtime, StudyConfig
from lapa.studies import facts, study
from lapa.studies.facts import (
    FIRST_RULE,
    FIRST_TASK,
    NUM_ATTRIBUTES,
    NUM_SYLLABLES,
    QUESTION_LENGTH,
    VOCABULARY,
    AttributeModel,
    MixtureTransformer,
    builders,
    draw_facts,
    draw_rules,
    forward_flops,
    slot_usage,
)

TINY = FactsStudy(
    num_facts=[20],
    width=16,
    num_layers=2,
    memory_layers=[0, 1],
    num_half_keys=8,
    key_width=8,
    num_steps=40,
    batch_size=32,
    rule_share=0.25,
    learning_rate=5e-3,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_facts_ask_different_questions_and_any_attribute():
    drawn = draw_facts(5000, rng())
    assert len({tuple(question) for question in drawn.questions.tolist()}) == 5000
    assert set(drawn.answers.tolist()) == set(range(NUM_ATTRIBUTES))
    assert drawn.questions[:, :2].max() == NUM_SYLLABLES - 1
    assert drawn.questions[:, 2].min() == FIRST_TASK and drawn.questions[:, 2].max() == FIRST_RULE - 1


def test_facts_cannot_be_guessed_from_a_part_of_the_question():
    drawn = draw_facts(16000, rng())
    for column in range(QUESTION_LENGTH):
        for token in np.unique(drawn.questions[:, column])[:5]:
            answers = drawn.answers[drawn.questions[:, column] == token]
            assert np.bincount(answers).max() / len(answers) < 0.15


def test_rules_are_told_by_the_tokens():
    for question, answer in zip(*dataclasses.astuple(draw_rules(200, False, rng())), strict=True):
        syllables = question[:2].tolist()
        assert answer == (max(syllables) if question[2] == FIRST_RULE else min(syllables))
        assert question[2] < VOCABULARY


def test_held_out_objects_are_in_no_training_question_and_their_syllables_are():
    trained, held_out = draw_rules(50000, False, rng()), draw_rules(5000, True, rng())
    assert not set(map(tuple, trained.questions[:, :2])) & set(map(tuple, held_out.questions[:, :2]))
    for column in range(2):
        assert set(trained.questions[:, column]) >= set(held_out.questions[:, column])


def test_more_facts_than_there_are_questions_are_refused():
    with pytest.raises(ValueError, match="num_facts"):
        draw_facts(10**6, rng())


def test_controls_have_the_flops_or_the_parameters_of_memory():
    built = {name: build() for name, build in builders(FactsStudy()).items()}
    flops = {name: forward_flops(backbone) for name, backbone in built.items()}
    parameters = {name: backbone.num_parameters() for name, backbone in built.items()}
    for name in ("dense", "mixture", "memory"):
        assert flops[name] == pytest.approx(flops["memory_plus"], rel=0.06)
    for name in ("dense_wide", "mixture", "memory"):
        assert parameters[name] == pytest.approx(parameters["memory_plus"], rel=0.12)
    assert parameters["dense"] < 0.5 * parameters["memory_plus"] and flops["dense_wide"] > 2 * flops["dense"]


def test_a_mixture_sends_each_token_to_its_likeliest_expert_and_is_counted_right():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    backbone = builders(TINY)["mixture"]()
    assert isinstance(backbone, MixtureTransformer)
    mixture = backbone.blocks[0].feed_forward
    x_BSD = torch.randn(3, 5, 16)
    expected = torch.empty_like(x_BSD)
    for b, s in np.ndindex(3, 5):
        probability_E = mixture.router(x_BSD[b, s]).softmax(-1)
        chosen = int(probability_E.argmax())
        expected[b, s] = probability_E[chosen] * mixture.experts[chosen](x_BSD[b, s], None)
    torch.testing.assert_close(mixture(x_BSD, None), expected)

    model = AttributeModel(backbone).eval()
    questions = torch.from_numpy(draw_facts(1, rng()).questions)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(questions)
    assert counter.get_total_flops() == forward_flops(backbone) + 2 * 16 * NUM_ATTRIBUTES


def test_slot_usage_of_an_even_and_of_a_stuck_memory():
    compute = study.setup(Runtime(device="cpu", dtype="float32", num_threads=1))
    torch.manual_seed(0)
    backbone = builders(TINY)["memory_plus"]()
    model = AttributeModel(backbone).eval()
    asked = draw_facts(300, rng())
    usage = slot_usage(model, backbone, asked, compute)
    assert usage["slots_used"] > 0.8 and 0 < usage["slot_kl_nats"] < 1.5
    for block in backbone.blocks:
        block.feed_forward.query.weight.data.zero_()
    stuck = slot_usage(model, backbone, asked, compute)
    assert stuck["slots_used"] < 0.5 and stuck["slot_kl_nats"] > usage["slot_kl_nats"]


def test_arms_learn_a_few_facts_and_the_table_says_so(tmp_path):
    config = StudyConfig(
        output_dir=str(tmp_path),
        study=TINY,
        arms=["dense", "mixture", "memory_plus"],
        seeds=[0],
        runtime=Runtime(device="cpu", dtype="float32", num_threads=1),
    )
    headline = study.run(config)
    results = read_json(tmp_path / "results.json")
    assert list(results) == ["dense", "mixture", "memory_plus"]
    assert all(headline[f"{arm}_recall"] > 3 / NUM_ATTRIBUTES for arm in results)
    assert "slots_used" in results["memory_plus"] and "slots_used" not in results["dense"]
    sizes = {column for column in facts.COLUMNS if column.startswith("recall_")}
    assert set(facts.COLUMNS) - sizes <= set(results["memory_plus"])
    assert (tmp_path / "study.png").stat().st_size > 1000
    assert not list(tmp_path.glob("runs/*/*/checkpoint"))
