"""The study of experts by modality, in a few steps."""

import json
import math

import numpy as np
import pytest
import torch

from lapa.backbones.auxiliary_router import auxiliary_routers
from lapa.schema import CausalExpertsStudy, Runtime, StudyConfig, Training
from lapa.studies import causal_experts, study
from lapa.studies.causal_experts import SequenceModel, arms, flops_of, held_out_losses, parameters_of
from lapa.studies.dialects import MODALITIES, draw_sequences, make_world

SMALL = CausalExpertsStudy(
    width=16,
    num_layers=2,
    num_heads=2,
    num_held_out=16,
    second_phase_steps=2,
    curve_every_steps=2,
    training=Training(num_steps=6, batch_size=4, learning_rate=4e-3, warmup_steps=2, tensorboard=False),
)


def configs() -> dict:
    return {arm.name: arm.run.args[1] for arm in arms(SMALL)}


def test_controls_are_at_least_as_large_as_moma_and_hardly_larger():
    found = {name: chain[-1] for name, chain in configs().items()}
    moma = found["moma"]
    assert 1.0 <= flops_of(found["dense"]) / flops_of(moma) < 1.1
    assert 1.0 <= parameters_of(found["dense_wide"]) / parameters_of(moma) < 1.1
    assert flops_of(found["dense_wide"]) > 2 * flops_of(moma)
    assert flops_of(found["moma_depths"]) < 0.8 * flops_of(moma)
    assert all(config.mask == "causal" for config in found.values())


def test_the_whole_study_runs_and_tells_causal_from_leaking(tmp_path):
    config = StudyConfig(
        output_dir=str(tmp_path), study=SMALL, seeds=[0], runtime=Runtime(device="cpu", dtype="float32", num_threads=1)
    )
    headline = study.run(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == set(configs())
    assert headline["moma_causal_loss"] == results["moma"]["causal_loss"]["mean"]
    for name in ("moma", "moma_depths", "mixture_8", "moma_upcycled"):
        assert {"leaking_loss", "causal_loss_second_phase", "router_recall"} <= set(results[name])
        assert 0 <= results[name]["router_accuracy"]["mean"] <= 1
    for name in ("dense", "dense_wide", "one_expert_a_modality"):
        assert "leaking_loss" not in results[name]
    assert results["dense"]["share_of_dense_steps"]["mean"] <= 1.0
    assert results["dense"]["true_entropy"]["mean"] < results["dense"]["causal_loss"]["mean"]
    # The second part of an upcycled run is counted on top of the first.
    share = results["moma_upcycled"]["share_of_dense_steps"]["mean"]
    assert math.isnan(share) or share > 1 / 3
    assert not (tmp_path / "runs" / "moma-seed0" / "checkpoint").exists()


def test_losses_by_modality_make_up_the_whole():
    torch.manual_seed(0)
    model = SequenceModel(configs()["moma"][-1]).eval()
    ids_NS, _ = draw_sequences(make_world(0), 6, np.random.default_rng(0))
    numbers = held_out_losses(model, ids_NS, batch_size=4)
    predicted = MODALITIES[1:]
    parts = sum(predicted.count(m) * numbers[f"{name}_loss"] for m, name in causal_experts.NAMES.items())
    assert numbers["loss"] == pytest.approx(parts / len(predicted), rel=1e-4)


def test_routers_that_say_what_expert_choice_says_agree_fully():
    model = SequenceModel(configs()["moma"][-1]).eval()
    for router in auxiliary_routers(model):
        router.forward = lambda x_TD, router=router: router.observed[2].float() - 0.5
    ids_NS, _ = draw_sequences(make_world(0), 8, np.random.default_rng(0))
    numbers = causal_experts.router_numbers(model, ids_NS, batch_size=4)
    assert [numbers[f"router_{name}"] for name in ("accuracy", "recall", "load")] == [1.0, 1.0, 1.0]
    assert 0 < numbers["left_out"] == numbers["left_out_causal"] < 0.75
