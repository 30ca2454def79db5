"""One training loop for every stage: AdamW, warm-up and cosine decay, clipping, average, resume.

A batch is a function of (seed, step) alone, so the position in the data needs no state, and a run that
was killed and resumed ends with the same weights, bit for bit on CPU. Processes that `torchrun` starts
share every batch (`lapa/distributed.py`).
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lapa import distributed
from lapa.checkpoint import load_training_state, remove_training_state, save_training_state
from lapa.runtime import Compute
from lapa.schema import Training

LossFunction = Callable[[Any], tuple[Tensor, Mapping[str, float | Tensor]]]


def learning_rate_factor(step: int, training: Training) -> float:
    """Linear warm-up, then cosine decay to `final_learning_rate_ratio`."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    floor = training.final_learning_rate_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rate_ratios: dict[str, float] | None = None,
    warmup_steps: dict[str, int] | None = None,
) -> list[dict]:
    """Decay matrices and kernels, not biases, gains or other vectors.

    learning_rate_ratios: prefixes of parameter names that learn slower (or faster) than the rest, by this
    factor; each group says its own under `learning_rate_ratio`. ValueError for a prefix that nothing has.

    warmup_steps: the same for parameters whose rate rises from zero over so many steps, whatever else it is multiplied
    by; under `warmup_steps`.

    A model may set `learning_rate_ratio` on a parameter, by which its rate is multiplied too; such parameters
    are clipped apart from the rest (the values of memory layers).
    """
    groups: dict[tuple[bool, float, bool, int], list[nn.Parameter]] = {}
    ratios, warmups = learning_rate_ratios or {}, warmup_steps or {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for prefix in ratios | warmups:
        if not any(name.startswith(prefix) for name, _ in named):
            raise ValueError(f"no trained parameter is called {prefix}*: known are {[name for name, _ in named]}")
    for name, parameter in named:
        ratio = next((ratio for prefix, ratio in ratios.items() if name.startswith(prefix)), 1.0)
        own = getattr(parameter, "learning_rate_ratio", None)
        warmup = next((steps for prefix, steps in warmups.items() if name.startswith(prefix)), 0)
        key = (parameter.ndim >= 2, ratio * (1.0 if own is None else own), own is not None, warmup)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "learning_rate_ratio": ratio,
            "clipped_apart": apart,
            "warmup_steps": warmup,
        }
        for (decays, ratio, apart, warmup), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def fit(
    model: nn.Module,
    make_batch: Callable[[np.random.Generator], Any],
    loss_function: LossFunction,
    training: Training,
    compute: Compute,
    output_dir: Path,
    description: str = "train",
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every_steps: int = 0,
    learning_rate_ratios: dict[str, float] | None = None,
    warmup_steps: dict[str, int] | None = None,
) -> dict[str, float]:
    """Train `model` in place, resuming from `output_dir` if a state lies there.

    Args:
        make_batch: batch for a generator seeded by (seed, step); on the device already or not, as the loss likes.
            In data parallel training, the rows `distributed.shard(training.batch_size)` of it.
        loss_function: batch -> (scalar loss, numbers to log); called under autocast.
        evaluate: numbers on held-out data, logged every `evaluate_every_steps` and not used for anything else; every
            process calls it, so that their random states stay the same.
        learning_rate_ratios, warmup_steps: see `parameter_groups`.

    Returns the last logged numbers. With `ema_decay`, the model ends as the moving average of its weights.
    """
    for name in ("num_steps", "batch_size", "log_every_steps", "checkpoint_every_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"training.{name} is {getattr(training, name)}, expected at least 1")
    distributed.shard(training.batch_size)  # refuses one that does not divide evenly
    model.to(compute.device).train()
    distributed.copy_main(model)
    writes = distributed.is_main()
    fused = compute.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay, learning_rate_ratios, warmup_steps),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        fused=fused,
    )
    ema: dict[str, Tensor] | None = None
    if training.ema_decay > 0:
        ema = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(training.seed)
    first_step = load_training_state(output_dir, model, optimizer, ema)

    numbers: dict[str, float] = {}
    with RunLog(output_dir, first_step, training.tensorboard) if writes else contextlib.nullcontext() as log:
        progress = tqdm(
            range(first_step, training.num_steps),
            desc=description,
            initial=first_step,
            total=training.num_steps,
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not writes,
        )
        window_start, window_step = time.perf_counter(), first_step
        for step in progress:
            factor = learning_rate_factor(step, training)
            for group in optimizer.param_groups:
                risen = min(1.0, step / group["warmup_steps"]) if group["warmup_steps"] else 1.0
                group["lr"] = training.learning_rate * factor * risen * group["learning_rate_ratio"]
            batch = make_batch(np.random.default_rng([training.seed, step]))
            with compute.autocast():
                loss, to_log = loss_function(batch)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at step {step}: "
                    "lower training.learning_rate or set runtime.dtype=float32"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.average_gradients(model.parameters())
            gradient_norm = clip_gradients(optimizer, training.grad_clip)
            optimizer.step()
            if ema is not None:
                update_average(ema, model, training.ema_decay, step)

            done = step + 1
            if done % training.log_every_steps == 0 or done == training.num_steps:
                now = time.perf_counter()
                numbers = distributed.mean_numbers({"loss": loss.item(), **{k: float(v) for k, v in to_log.items()}})
                numbers["gradient_norm"] = float(gradient_norm)
                numbers["learning_rate"] = training.learning_rate * factor
                numbers["steps_per_s"] = (done - window_step) / (now - window_start)
                window_start, window_step = now, done
                if evaluate is not None and evaluate_every_steps and done % evaluate_every_steps == 0:
                    model.eval()
                    numbers |= evaluate()
                    model.train()
                if log is not None:
                    log.write(done, numbers)
                progress.set_postfix(loss=f"{numbers['loss']:.4f}")
            if done % training.checkpoint_every_steps == 0 and done < training.num_steps:
                # What is saved is what all go on with: buffers that follow a process's own rows differ by now.
                distributed.copy_main(model)
                if writes:
                    save_training_state(output_dir, done, model, optimizer, ema)
    if ema is not None:
        model.load_state_dict(ema)
    model.eval()
    return numbers


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip all gradients by their norm, those of groups that are clipped apart by their own; the former is returned."""
    together: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        if group["clipped_apart"]:
            nn.utils.clip_grad_norm_(group["params"], max_norm)
        else:
            together += group["params"]
    return nn.utils.clip_grad_norm_(together, max_norm)


def finish(output_dir: Path) -> None:
    """Drop the resume state; call it once the stage has written its result."""
    remove_training_state(output_dir)


@torch.no_grad()
def update_average(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average with a warm-up, so that the first random weights fade."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            ema[name].lerp_(tensor, 1 - decay)
        else:
            ema[name].copy_(tensor)


class RunLog:
    """`log.jsonl`, one line a log step, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, first_step: int, tensorboard: bool):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        # Lines past the resumed step come from the part of the killed run that is computed again.
        kept = [row for row in read_log(path) if row["step"] <= first_step] if first_step else []
        self.file = path.open("w", encoding="utf-8")
        for row in kept:
            self.file.write(json.dumps(row) + "\n")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in numbers.items()}}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def read_log(path: Path) -> Iterator[dict]:
    """The rows of a `log.jsonl`; a half-written last line is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
