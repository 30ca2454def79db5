"""The benchmark asks every policy for new chunks, equally often, and compares rounds with themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from policies.benchmark import (
    LEROBOT_POLICIES,
    Runner,
    eager_runner,
    measure,
    random_observation,
    random_policy,
    summary,
    table,
)
from policies.serving.served_policy import ServedPolicy


def counting_runner(calls: list[str], name: str) -> Runner:
    return Runner(
        lambda: calls.append(f"reset {name}"),
        lambda observation: calls.append(name),
        {"observation.state": (2,)},
        4,
        10,
    )


def test_policies_take_turns_and_begin_a_chunk_each_round():
    calls: list[str] = []
    seconds = measure({name: counting_runner(calls, name) for name in "ab"}, num_rounds=3, num_steps=2)
    assert calls == ["reset a", "a", "a", "reset b", "b", "b"] * 4
    assert all(values.shape == (3, 2) and (values > 0).all() for values in seconds.values())


def test_ratios_are_of_the_same_round():
    seconds = {"a": np.array([[1.0, 0.1], [3.0, 0.1]]), "b": np.array([[2.0, 0.1], [np.nan, np.nan]])}
    found = summary(seconds, "a")
    assert found["b"]["times_the_first"] == 2.0 and found["a"]["chunk_p50_ms"] == 2000
    text = table({name: row | {"num_parameters": 1e6, "chunk_size": 4} for name, row in found.items()})
    assert text.splitlines()[-1].endswith("| 2.00 |")


@pytest.mark.parametrize("name", ["lapa", "act", "diffusion"])
def test_a_policy_gives_actions_of_as_many_steps_as_asked(name, tmp_path):
    if name == "diffusion":
        pytest.importorskip("diffusers")
    small = {"lapa": {}, "act": {"dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "chunk_size": 8}}
    small["act"]["n_action_steps"] = 8
    small["diffusion"] = {"down_dims": (16, 32), "n_groups": 4, "num_train_timesteps": 2}
    options = small[name] | (LEROBOT_POLICIES[name][1](Path(tmp_path), 64) if name != "lapa" else {})
    folder = random_policy(name, 64, options, tmp_path / name)
    served, generator = ServedPolicy(folder, torch.device("cpu")), np.random.default_rng(0)
    runner = eager_runner(served, num_steps=2)
    runner.reset()
    actions = [np.asarray(runner.step(random_observation(runner.inputs, generator))) for _ in range(3)]
    assert all(action.shape == (1, 2) and np.isfinite(action).all() for action in actions)
    assert runner.num_parameters > 1000 and runner.chunk_size == {"lapa": 4, "act": 8, "diffusion": 32}[name]
