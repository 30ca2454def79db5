"""Folders of safetensors and JSON, written atomically; nothing is ever unpickled.

A model folder holds `config.json` (what to build) and `model.safetensors` (its weights). A training
folder adds `checkpoint/`, the state that lets a killed run go on bit for bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Parse a JSON file; ValueError naming the file where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it was not written by this program") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def save_model(folder: Path, model_state: dict[str, Tensor], config: dict) -> None:
    """Write `model.safetensors`, then `config.json`, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / MODEL_FILE, model_state)
    write_json(folder / CONFIG_FILE, config)


def load_config(folder: str | Path, made_by: str) -> dict:
    """The configuration of a model folder; `made_by` names the stage that writes such folders."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"no {CONFIG_FILE} in {folder}: expected a folder written by `lapa {made_by}`")
    return read_json(path)


def load_weights(folder: str | Path, model: nn.Module, strict: bool = True) -> None:
    """Load `model.safetensors` into `model`; a mismatch is an error that lists what differs."""
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"no {MODEL_FILE} in {folder}: the training there has not finished; run it again")
    try:
        model.load_state_dict(load_file(path), strict=strict)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model that {CONFIG_FILE} describes: {error}") from None


def save_training_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None
) -> None:
    """Everything a resumed run needs after `step` finished steps: weights, optimiser, average, RNG."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, slots in state.items():
        for slot, value in slots.items():
            tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value)
    for name, tensor in (ema or {}).items():
        tensors[f"ema.{name}"] = tensor
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()

    target = folder / "checkpoint"
    temporary, previous = folder / ".checkpoint.tmp", folder / ".checkpoint.old"
    if previous.exists() and not target.exists():
        previous.rename(target)  # a kill came between the renames below: this is the only state there is
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / "state.safetensors", tensors)
    write_json(temporary / "step.json", {"step": step})
    if target.exists():
        target.replace(previous)
    temporary.replace(target)
    shutil.rmtree(previous, ignore_errors=True)


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None
) -> int:
    """Restore the newest state in `folder`; returns the number of finished steps, 0 if there is none."""
    # A kill between the two renames of a save leaves only the previous state, which is complete.
    source = next((folder / n for n in ("checkpoint", ".checkpoint.old") if (folder / n / "step.json").is_file()), None)
    if source is None:
        return 0
    tensors = load_file(source / "state.safetensors")
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except RuntimeError as error:
        raise ValueError(f"{source} is of another model; choose another output_dir or delete it: {error}") from None
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name in ema or {}:
        assert ema is not None
        ema[name].copy_(tensors[f"ema.{name}"])
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return read_json(source / "step.json")["step"]


def remove_training_state(folder: Path) -> None:
    """Delete the resume state of a finished run."""
    for name in ("checkpoint", ".checkpoint.old", ".checkpoint.tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
