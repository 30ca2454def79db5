"""Data parallel training: the processes that `torchrun` starts share every batch.

    torchrun --nproc_per_node=2 -m lapa.cli train_quantizer ...

The result is that of one process with the same batch, up to rounding: every process draws the same batch indices
from (seed, step) and takes its own rows (`shard`), gradients are averaged (`average_gradients`), and whatever
looks at a batch as a whole, such as a codebook, sees the rows of all processes (`gather_rows`, `mean`). The first
process alone writes files. With one process each function here returns what it was given.
"""

import atexit
import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

# Long, because the others wait while the first process labels, evaluates or renders alone.
TIMEOUT = timedelta(days=2)


def start() -> None:
    """Join the processes that `torchrun` started, if it did: NCCL between GPUs, Gloo between CPUs."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def processes_on_this_machine() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def shard(batch_size: int) -> slice:
    """The rows of a batch of `batch_size` that are this process's; ValueError where they do not divide evenly."""
    if batch_size % world_size():
        raise ValueError(
            f"training.batch_size is {batch_size} for {world_size()} processes: expected a multiple of "
            f"{world_size()}, since it is the batch of all processes together"
        )
    rows = batch_size // world_size()
    return slice(rank() * rows, (rank() + 1) * rows)


def own_generator(generator: np.random.Generator) -> np.random.Generator:
    """For what is drawn a row, such as augmentations: another stream in every process."""
    return generator if world_size() == 1 else generator.spawn(world_size())[rank()]


def mean(value: Tensor) -> Tensor:
    """`value` averaged over the processes, without gradient: the denominator of a loss that is a ratio of means."""
    if world_size() == 1:
        return value.detach()
    return _averaged(value)


@torch.compiler.disable
def _averaged(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def mean_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Numbers to log, averaged over the processes."""
    if world_size() == 1:
        return numbers
    averaged = _averaged(torch.tensor(list(numbers.values()), dtype=torch.float64))
    return dict(zip(numbers, averaged.tolist(), strict=True))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes (W * B, ...) in their order; gradients go back to whose rows they are.

    Every process computes its own loss from the whole; the gradient of a row is the sum over the processes, as
    `average_gradients` expects.
    """
    if world_size() == 1:
        return rows
    return _gathered(rows)


@torch.compiler.disable
def _gathered(rows: Tensor) -> Tensor:
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[shard(len(total))]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # A parameter without gradient here may have one elsewhere: it counts as zero, and nowhere is it None then.
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    has_gradient = gradients[0].new_tensor([float(p.grad is not None) for p in trained])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), has_gradient])
    dist.all_reduce(flat)
    flat, has_gradient = flat[: -len(trained)] / world_size(), flat[-len(trained) :]
    parts = flat.split([p.numel() for p in trained])
    for parameter, part, exists in zip(trained, parts, has_gradient.tolist(), strict=True):
        if exists:
            parameter.grad = part.view_as(parameter)


@torch.no_grad()
def copy_main(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if world_size() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.numel():
            continue
        # Gloo knows no bool.
        dist.broadcast(tensor.data.view(torch.uint8) if tensor.dtype == torch.bool else tensor.data, 0)


def share(value: Any) -> Any:
    """The first process's `value`, in every process; it has to be JSON. Waits until all have come here."""
    if world_size() == 1:
        return value
    # JSON and not torch's own broadcast of objects, which unpickles.
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(encoded))
    dist.broadcast(length, 0)
    if not is_main():
        encoded = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(encoded, 0)
    return json.loads(bytes(encoded.tolist()))
