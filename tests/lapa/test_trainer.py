import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lapa.checkpoint import MODEL_FILE, save_model
from lapa.runtime import setup
from lapa.schema import Runtime, Training
from lapa.trainer import (
    clip_gradients,
    finish,
    fit,
    learning_rate_factor,
    parameter_groups,
    read_log,
    update_average,
)

CPU = Runtime(device="cpu", dtype="float32", num_threads=1)


def train(folder: Path, pause_s: float = 0.0) -> None:
    """Sixty steps of a model whose weights depend on the random state (dropout) and on buffers (batch norm)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def make_batch(generator: np.random.Generator):
        time.sleep(pause_s)
        return torch.from_numpy(generator.normal(size=(8, 4)).astype(np.float32))

    def loss_function(x):
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    training = Training(
        num_steps=60, checkpoint_every_steps=7, log_every_steps=5, ema_decay=0.9, warmup_steps=5, tensorboard=False
    )
    fit(model, make_batch, loss_function, training, setup(CPU), folder)
    save_model(folder, model.state_dict(), {})
    finish(folder)


def test_a_run_killed_at_a_checkpoint_and_resumed_ends_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)

    process = subprocess.Popen([sys.executable, __file__, str(killed)])
    step_file = killed / "checkpoint" / "step.json"
    deadline = time.monotonic() + 120
    while not step_file.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < json.loads(step_file.read_text())["step"] < 60 and not (killed / MODEL_FILE).exists()

    train(killed)
    assert (killed / MODEL_FILE).read_bytes() == (whole / MODEL_FILE).read_bytes()
    assert not (killed / "checkpoint").exists()

    def without_speed(folder):
        return [{k: v for k, v in row.items() if k != "steps_per_s"} for row in read_log(folder / "log.jsonl")]

    assert without_speed(killed) == without_speed(whole)


def toy(tmp_path, target=0.0, **training):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    compute = setup(CPU)

    def make_batch(generator: np.random.Generator):
        return torch.from_numpy(generator.normal(size=(16, 2)).astype(np.float32))

    def loss_function(x):
        return (model(x) - x.sum(1, keepdim=True) + target).square().mean(), {"mean": x.mean()}

    options = {"num_steps": 150, "learning_rate": 0.05, "tensorboard": False, "warmup_steps": 5} | training
    return model, fit(model, make_batch, loss_function, Training(**options), compute, tmp_path)


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    _, numbers = toy(tmp_path)
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert numbers["loss"] < 0.01 < rows[0]["loss"]
    assert rows[-1]["step"] == 150 and {"mean", "learning_rate", "gradient_norm"} <= rows[-1].keys()


def test_the_moving_average_ends_near_the_weights(tmp_path):
    model, _ = toy(tmp_path, ema_decay=0.9)
    torch.testing.assert_close(model.weight, torch.ones(1, 2), atol=0.1, rtol=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"nan at step 0.*learning_rate"):
        toy(tmp_path, target=float("nan"))


def test_learning_rate_warms_up_and_decays():
    training = Training(num_steps=100, warmup_steps=10, final_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(step, training) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=0.01) and factors[10:] == sorted(factors[10:], reverse=True)


def test_the_average_follows_floats_and_copies_counters():
    model = nn.BatchNorm1d(2)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(8, 2))
    update_average(average, model, decay=0.5, step=100)
    assert average["num_batches_tracked"] == 1
    torch.testing.assert_close(average["running_mean"], model.running_mean / 2)


if __name__ == "__main__":  # the process that the first test kills
    train(Path(sys.argv[1]), pause_s=0.1)


def test_parameters_with_a_warm_up_of_their_own_stand_still_at_first(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = [layer.weight.detach().clone() for layer in model]

    def loss(_):
        return model(torch.ones(4, 2)).square().mean(), {}

    def step(num_steps, folder):
        training = Training(num_steps=num_steps, warmup_steps=0, final_learning_rate_ratio=1.0, tensorboard=False)
        fit(model, lambda rng: None, loss, training, setup(CPU), folder, warmup_steps={"0.": 100})

    step(1, tmp_path / "one")
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[1].weight, before[1])
    step(3, tmp_path / "three")
    assert not torch.equal(model[0].weight, before[0])
    assert (model[0].weight - before[0]).abs().max() < 0.1 * (model[1].weight - before[1]).abs().max()
    with pytest.raises(ValueError, match="no trained parameter is called 2"):
        parameter_groups(model, 0.0, warmup_steps={"2.": 1})


def test_parameters_with_a_rate_of_their_own_are_grouped_and_clipped_apart():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight.learning_rate_ratio = 10.0
    groups = parameter_groups(model, 0.1, {"1.": 0.5})
    assert [(g["learning_rate_ratio"], g["clipped_apart"]) for g in groups] == [(5.0, True), (1.0, False)]
    optimizer = torch.optim.AdamW(groups)
    model[0].weight.grad, model[1].weight.grad = torch.full((2, 2), 0.1), torch.full((2, 2), 50.0)
    assert clip_gradients(optimizer, 1.0) == pytest.approx(0.2)
    assert model[0].weight.grad.norm() == pytest.approx(0.2)
    assert model[1].weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
