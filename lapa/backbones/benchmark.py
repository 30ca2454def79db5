"""What a training step of every backbone costs beside the dense one's: `python -m lapa.backbones.benchmark`.

All have the same width, layers and heads, and a feed-forward width at which a forward pass has the active FLOPs of the
dense transformer. Every round makes one step (forward, backward, clipping, AdamW) with each of them, one after the
other, so that a busy machine slows all alike; a ratio is the median over rounds of the ratio within a round. On one
CPU thread, seconds are those that the processor spent. Memory is measured in a process of its own for each.

Two shapes: `pretrain`, the tokens of the tabletop pretraining, and `long`, patches of a larger image.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from lapa.backbones.base import (
    IMAGE,
    LATENT_ACTION,
    MODALITY_NAMES,
    NO_BLOCK,
    NUM_MODALITIES,
    TEXT,
    Backbone,
    Layout,
    build_backbone,
)
from lapa.backbones.dense import feed_forward_width
from lapa.checkpoint import write_json
from lapa.runtime import available_cores
from lapa.schema import GROUPS, DenseBackbone
from lapa.trainer import clip_gradients, parameter_groups

# Those that are made of our own blocks; others bring a size of their own, and weights to download.
NAMES = [name for name, node in GROUPS["backbone"].items() if issubclass(node, DenseBackbone)]
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A batch of sequences and the model that reads them; num_tokens: of each modality, in this order."""

    batch_size: int
    num_tokens: dict[int, int]
    width: int
    num_layers: int
    num_heads: int

    @property
    def modality_lengths(self) -> list[int]:
        return [self.num_tokens.get(modality, 0) for modality in range(NUM_MODALITIES)]


SHAPES = {
    # `lapa run experiment=tabletop`: words, keypoints, readout and a latent action of two codes.
    "pretrain": Shape(64, {TEXT: 10, IMAGE: 16, LATENT_ACTION: 2}, width=128, num_layers=4, num_heads=4),
    "long": Shape(16, {TEXT: 16, IMAGE: 236, LATENT_ACTION: 4}, width=256, num_layers=4, num_heads=4),
    "smoke": Shape(2, {TEXT: 2, IMAGE: 4, LATENT_ACTION: 2}, width=32, num_layers=2, num_heads=2),
}


def config_of(name: str, shape: Shape) -> DenseBackbone:
    """The backbone at the sizes of the shape, with the feed-forward at which a forward pass costs what dense costs.

    FLOPs grow evenly with the feed-forward width, which comes in multiples of 8: two widths tell which one fits.
    """
    config = GROUPS["backbone"][name](width=shape.width, num_layers=shape.num_layers, num_heads=shape.num_heads)
    dense = DenseBackbone(width=shape.width, num_layers=shape.num_layers, num_heads=shape.num_heads)

    def flops(config: DenseBackbone) -> int:
        with torch.device("meta"):
            return build_backbone(config).forward_flops(shape.modality_lengths)

    def resized(hidden: int) -> DenseBackbone:
        return replace(config, feed_forward_ratio=hidden / shape.width)

    hidden, goal = feed_forward_width(dense), flops(dense)
    first, second = flops(resized(hidden)), flops(resized(2 * hidden))
    steps = round(hidden / 8 * (goal - first) / (second - first))
    if hidden + 8 * steps < 8:
        raise ValueError(
            f"{name} costs more than dense at width {shape.width} whatever its feed-forward: {first} FLOPs"
        )
    return resized(hidden + 8 * steps)


class Work:
    """A training step of one backbone, ready to be called."""

    def __init__(self, name: str, shape: Shape, arguments: argparse.Namespace):
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        torch.manual_seed(0)
        self.model: Backbone = build_backbone(config_of(name, shape)).to(self.device).train()
        self.forward = torch.compile(self.model) if arguments.compile else self.model
        modality_ids_S = torch.tensor([m for m, count in shape.num_tokens.items() for _ in range(count)])
        modality_ids_BS = modality_ids_S.expand(shape.batch_size, -1).to(self.device)
        prefix_BS = torch.where(modality_ids_BS <= IMAGE, 0, NO_BLOCK)
        self.layout = Layout.of(modality_ids_BS, block_ids_BS=prefix_BS)
        self.tokens_BSD = torch.randn(*modality_ids_BS.shape, shape.width, device=self.device)
        groups = parameter_groups(self.model, weight_decay=0.01)
        for group in groups:
            group["lr"] = 1e-4 * group["learning_rate_ratio"]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)

    def step(self) -> None:
        """Forward, backward and update."""
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, self.dtype is not None):
            loss: Tensor = self.forward(self.tokens_BSD, self.layout).float().square().mean()
            auxiliary = self.model.auxiliary_loss()
        if auxiliary is not None:
            loss = loss + auxiliary
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: wall time, or time on the processor where there is one thread."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics that hold it with 95% confidence whatever the distribution."""
    ordered, middle = sorted(values), (len(values) - 1) / 2
    half = 0.98 * math.sqrt(len(values))  # 1.96 standard deviations of a binomial count at 1/2
    low, high = max(0, math.floor(middle - half)), min(len(values) - 1, math.ceil(middle + half))
    return median(ordered), ordered[low], ordered[high]


def measure(shape_name: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Numbers of every backbone at one shape, by name; the first is dense."""
    shape, device = SHAPES[shape_name], torch.device(arguments.device)
    works = {name: Work(name, shape, arguments) for name in arguments.backbones}
    rounds = []
    calls = tqdm(range(arguments.warmups + arguments.rounds), desc=shape_name, unit="round", mininterval=1.0)
    for index in calls:
        times = {name: seconds(work.step, device) for name, work in works.items()}
        if index >= arguments.warmups:
            rounds.append(times)
    found = {}
    for name, work in works.items():
        ratio, low, high = median_interval([times[name] / times["dense"] for times in rounds])
        found[name] = {
            "steps_per_s": 1 / median(times[name] for times in rounds),
            "times_dense": ratio,
            "times_dense_low": low,
            "times_dense_high": high,
            "forward_megaflops": work.model.forward_flops(shape.modality_lengths) / 1e6,
            "parameters": work.model.num_parameters(),
        }
        if arguments.memory:
            found[name]["memory_gb"] = peak_memory_gb(name, shape_name, arguments)
    return found


def peak_memory_gb(name: str, shape_name: str, arguments: argparse.Namespace) -> float:
    """What training adds to the memory of a process that does nothing else, in 1e9 bytes."""
    command = [sys.executable, "-m", "lapa.backbones.benchmark", *sys.argv[1:], "--measure-memory", name, shape_name]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def measure_memory(arguments: argparse.Namespace) -> None:
    """Two steps of one backbone (the first allocates the optimiser's state); prints the largest memory they took."""
    name, shape_name = arguments.measure_memory
    before = resident_bytes("VmRSS")
    work = Work(name, SHAPES[shape_name], arguments)
    for _ in range(2):
        work.step()
    if work.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(work.device) / 1e9)
    else:
        print((resident_bytes("VmHWM") - before) / 1e9)


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS, resident now, or VmHWM, at most so far."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError(f"memory on CPU is read from {status}, which this system lacks: add --no-memory")
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown, a row a backbone."""
    has_memory = any("memory_gb" in numbers for numbers in found.values())
    header = ["backbone", "steps/s", "times dense (95%)", "forward MFLOP a sequence", "parameters (M)"]
    header += ["memory (GB)"] if has_memory else []
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, numbers in found.items():
        interval = f"({numbers['times_dense_low']:.2f} to {numbers['times_dense_high']:.2f})"
        line = [name, f"{numbers['steps_per_s']:.2f}", f"{numbers['times_dense']:.2f} {interval}"]
        line += [f"{numbers['forward_megaflops']:.2f}", f"{numbers['parameters'] / 1e6:.2f}"]
        lines.append(line + ([f"{numbers['memory_gb']:.3f}"] if has_memory else []))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(shape: Shape) -> str:
    """A shape in one line."""
    tokens = ", ".join(f"{count} {MODALITY_NAMES[modality]}" for modality, count in shape.num_tokens.items())
    return (
        f"{shape.batch_size} sequences of {sum(shape.modality_lengths)} tokens ({tokens}), width {shape.width}, "
        f"{shape.num_layers} layers, {shape.num_heads} heads"
    )


def machine(arguments: argparse.Namespace) -> str:
    """What it ran on, in one line."""
    options = f"{arguments.dtype}{', compiled' if arguments.compile else ''}, torch {torch.__version__}"
    if arguments.device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(arguments.device)}, {options}"
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{processor()}, {torch.get_num_threads()} threads, {options}{load}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="The cost of a training step of every backbone beside the dense one.")
    result.add_argument("--backbones", nargs="+", default=NAMES, choices=NAMES, help="dense is always among them")
    result.add_argument("--shapes", nargs="+", default=["pretrain", "long"], choices=list(SHAPES))
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    result.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of autocast")
    result.add_argument("--threads", type=int, default=available_cores(), help="on CPU")
    result.add_argument("--rounds", type=int, default=25, help="timed steps of each")
    result.add_argument("--warmups", type=int, default=3, help="steps of each before them")
    result.add_argument("--compile", action="store_true", help="all through torch.compile (needs a C++ compiler)")
    result.add_argument("--no-memory", dest="memory", action="store_false", help="leave memory out")
    result.add_argument("--output", type=Path, help="also write all numbers to this JSON file")
    result.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    return result


def main(options: list[str] | None = None) -> None:
    arguments = parser().parse_args(options)
    arguments.backbones = ["dense", *(name for name in arguments.backbones if name != "dense")]
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        measure_memory(arguments)
        return
    print(f"Machine: {machine(arguments)}. {arguments.rounds} rounds after {arguments.warmups} to warm up.")
    found = {}
    for name in arguments.shapes:
        found[name] = measure(name, arguments)
        print(f"\n{name}: {describe(SHAPES[name])}\n\n{table(found[name])}", flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, {"machine": machine(arguments), "shapes": found})


if __name__ == "__main__":
    main()
