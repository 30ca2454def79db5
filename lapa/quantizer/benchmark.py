"""Speed and memory of training and labelling, against the released quantizer: `python -m lapa.quantizer.benchmark`.

    reference      the released architecture spelled out (`laq_reference.py`), float32, unfused Adam, as released
    laq            the same maths with the same random weights, our implementation
    transformer    our own architecture at the same widths, layers, heads, patches and tokens

Every round times each of them once, one after the other, so that a busy machine slows all alike; a ratio is the
median over rounds of the ratio within a round. Memory is measured in a process of its own for each.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lapa.quantizer.base import LatentActionQuantizer, build_quantizer
from lapa.quantizer.laq import from_released
from lapa.quantizer.laq_reference import ReferenceLAQ
from lapa.quantizer.transformer import TransformerLAQ
from lapa.runtime import available_cores
from lapa.schema import LAQQuantizer, NSVQCodebook, SharedNSVQCodebook, TransformerQuantizer

REFERENCE = "reference"
FRAME_GAP = 4  # frames between the two of a pair when a clip is labelled
LAYERS = ("num_spatial_layers", "num_temporal_layers", "num_decoder_layers")


@dataclass(frozen=True)
class Entry:
    """One row of the table: an implementation and the type it computes in."""

    name: str
    dtype: torch.dtype | None  # of autocast; None: float32
    compile: bool = False

    def __str__(self) -> str:
        dtype = "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{self.name} {dtype}" + (" compiled" if self.compile else "")


def entries(compiled: bool) -> list[Entry]:
    """The rows of the table, the reference first."""
    rows = [Entry(REFERENCE, None)]
    for name in ("laq", "transformer"):
        rows += [Entry(name, None), Entry(name, torch.bfloat16)]
    return rows + ([Entry("transformer", None, True), Entry("transformer", torch.bfloat16, True)] if compiled else [])


def build(name: str, arguments: argparse.Namespace) -> ReferenceLAQ | LatentActionQuantizer:
    """A model with random weights; `laq` has those of the reference."""
    torch.manual_seed(0)
    sizes = {"image_size": arguments.image_size, "patch_size": arguments.patch_size, "width": arguments.width}
    sizes |= {"num_heads": arguments.heads} | dict.fromkeys(LAYERS, arguments.layers)
    if name == "transformer":
        return build_quantizer(TransformerQuantizer(**sizes), NSVQCodebook())
    sizes["head_width"] = arguments.width // arguments.heads
    reference = ReferenceLAQ(**sizes)
    if name == REFERENCE:
        return reference
    model = build_quantizer(LAQQuantizer(**sizes), SharedNSVQCodebook())
    model.load_state_dict(from_released(reference.state_dict()))
    return model


class Work:
    """One entry's training step and its labelling of a clip, ready to be called."""

    def __init__(self, entry: Entry, arguments: argparse.Namespace):
        self.entry, self.device = entry, torch.device(arguments.device)
        self.model = build(entry.name, arguments).to(self.device)
        size, batch = arguments.image_size, arguments.batch_size
        generator = torch.Generator().manual_seed(0)
        self.clip_FCHW = torch.rand(batch + FRAME_GAP, 3, size, size, generator=generator).to(self.device)
        first_B = torch.arange(batch, device=self.device)
        self.pairs_B2 = torch.stack([first_B, first_B + FRAME_GAP], 1)
        self.frames_B2CHW = self.clip_FCHW[self.pairs_B2]
        # As released: Adam without decay, and clipping at 0.5. Ours is the trainer's.
        optimizer = torch.optim.Adam if entry.name == REFERENCE else partial(torch.optim.AdamW, fused=True)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99))
        loss: Callable = self.model.forward if isinstance(self.model, ReferenceLAQ) else self.model.loss
        self.loss = torch.compile(loss) if entry.compile else loss
        self.encode = torch.compile(self._encode) if entry.compile else self._encode

    def train(self) -> None:
        """One step on a batch of pairs."""
        self.model.train()
        with self._autocast():
            loss = self.loss(self.frames_B2CHW)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()

    def label(self) -> Tensor:
        """Codes of all pairs of a clip."""
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            return self.encode()

    def _encode(self) -> Tensor:
        if isinstance(self.model, TransformerLAQ):
            return self.model.encode_clip(self.clip_FCHW, self.pairs_B2)[0]
        if isinstance(self.model, ReferenceLAQ):
            return self.model.label(self.frames_B2CHW)
        return self.model.encode(self.frames_B2CHW)[0]

    def _autocast(self):
        return torch.autocast(self.device.type, self.entry.dtype or torch.bfloat16, self.entry.dtype is not None)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleaved(
    works: list[Callable[[], object]], device: torch.device, num_rounds: int, num_warmups: int
) -> list[list[float]]:
    """Wall times [round][work]: every round calls each of the works once, in turn."""
    calls = tqdm(range(num_warmups + num_rounds), desc="benchmark", unit="round", mininterval=1.0)
    return [[seconds(work, device) for work in works] for _ in calls][num_warmups:]


def ratios_to_first(rounds: list[list[float]], index: int) -> list[float]:
    """How many times as fast as the first work the work `index` was, sorted, one number a round."""
    return sorted(times[0] / times[index] for times in rounds)


def gflop_per_pair(work: Work) -> tuple[float, float]:
    """Matrix products and convolutions of a training step's forward pass and of labelling, in GFLOP a pair."""
    counted = []
    for call in (partial(work.loss, work.frames_B2CHW), work.label):
        # The counter does not know the fused attention of CPUs; the plain one has the same products.
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        counted.append(counter.get_total_flops() / len(work.pairs_B2) / 1e9)
    return counted[0], counted[1]


def peak_memory_gb(entry: Entry, work: str, arguments: argparse.Namespace) -> float:
    """Largest memory of a process that does nothing else: resident on CPU, allocated on a GPU. In 1e9 bytes."""
    command = [sys.executable, "-m", "lapa.quantizer.benchmark", *sys.argv[1:]]
    row = entries(arguments.compile).index(entry)
    output = subprocess.run(
        [*command, "--measure-memory", work, str(row)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def measure_memory(arguments: argparse.Namespace) -> None:
    """Do one work of one entry and print the largest memory of this process."""
    name, row = arguments.measure_memory
    work = Work(entries(arguments.compile)[int(row)], arguments)
    for _ in range(2):  # the first training step allocates the optimiser's state
        getattr(work, name)()
    if work.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(work.device) / 1e9)
    else:
        print(peak_resident_bytes() / 1e9)


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would go back to the process that started this one, which is larger.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(arguments: argparse.Namespace) -> str:
    """What it ran on, in one line."""
    if arguments.device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(arguments.device)}, torch {torch.__version__}"
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}{load}"


def report(arguments: argparse.Namespace) -> str:
    """Measure every entry; the table and what it was measured with, as Markdown."""
    lines = [f"Machine: {machine(arguments)}.", describe(arguments), ""]
    works = [Work(entry, arguments) for entry in entries(arguments.compile)]
    device, batch = torch.device(arguments.device), arguments.batch_size
    # The first call compiles or picks kernels, the second still fills caches.
    measured = {
        name: interleaved([getattr(work, name) for work in works], device, arguments.rounds, arguments.warmups)
        for name in ("train", "label")
    }
    rows = []
    flops_of = {name: gflop_per_pair(Work(Entry(name, None), arguments)) for name in {w.entry.name for w in works}}
    for index, work in enumerate(works):
        row = [str(work.entry), f"{sum(p.numel() for p in work.model.parameters()) / 1e6:.2f}"]
        for name, gflop in zip(measured, flops_of[work.entry.name], strict=True):
            pairs_per_s = batch / median(times[index] for times in measured[name])
            ratios = ratios_to_first(measured[name], index)
            row += [f"{gflop:.2f}", f"{pairs_per_s:.1f}"]
            row += [f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
            row += [f"{peak_memory_gb(work.entry, name, arguments):.2f}"] if arguments.memory else []
        rows.append(tuple(row))
    columns = ["quantizer", "parameters (M)"]
    for name in measured:
        columns += [f"{name}: forward GFLOP a pair", f"{name}: pairs/s", "times the reference (least to most)"]
        columns += ["memory (GB)"] if arguments.memory else []
    return "\n".join([*lines, table(tuple(columns), rows)])


def describe(arguments: argparse.Namespace) -> str:
    """What was run, in one line."""
    size, patch = arguments.image_size, arguments.patch_size
    return (
        f"Batch of {arguments.batch_size} pairs, {size} px in 3 channels, patch {patch} ({size // patch} x "
        f"{size // patch}), width {arguments.width}, {arguments.heads} heads, {arguments.layers} spatial, temporal and "
        f"decoder layers each, 4 tokens of 8 codes; {arguments.rounds} rounds after {arguments.warmups} to warm up."
    )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Speed and memory of quantizers against the released one.")
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    result.add_argument("--threads", type=int, default=available_cores(), help="of a process, on CPU")
    result.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    result.add_argument("--warmups", type=int, default=2, help="calls of each before them")
    result.add_argument("--batch-size", type=int, default=32, help="pairs")
    result.add_argument("--image-size", type=int, default=64, help="pixels; 8 patches along a side are needed")
    result.add_argument("--patch-size", type=int, default=8, help="pixels")
    result.add_argument("--width", type=int, default=256)
    result.add_argument("--heads", type=int, default=8)
    result.add_argument("--layers", type=int, default=4, help="of each of the three kinds")
    result.add_argument("--compile", action="store_true", help="also ours through torch.compile (needs a C++ compiler)")
    result.add_argument("--no-memory", dest="memory", action="store_false", help="leave memory out")
    result.add_argument("--quick", action="store_true", help="a small model, 2 rounds, no memory: does it run at all")
    result.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    return result


def main(options: list[str] | None = None) -> None:
    arguments = parser().parse_args(options)
    if arguments.quick:
        arguments.rounds, arguments.warmups, arguments.batch_size, arguments.memory = 2, 1, 4, False
        arguments.width, arguments.heads, arguments.layers = 64, 2, 1
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        measure_memory(arguments)
    else:
        print(report(arguments))


if __name__ == "__main__":
    main()
