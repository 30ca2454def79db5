"""Device, autocast type, compilation and threads, from one small configuration."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lapa.distributed import processes_on_this_machine
from lapa.schema import Runtime


@dataclass(frozen=True)
class Compute:
    """Where a stage computes: `device`, and the autocast type or None for plain float32."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    compile: bool

    def autocast(self):
        """The context in which forward passes run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def maybe_compile(self, module):
        """`torch.compile(module)` where the configuration asks for it."""
        return torch.compile(module) if self.compile else module


def cpu_has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return (
        "AVX512" in capabilities.upper()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16"))
    )


def _cpu_flags() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def available_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def setup(config: Runtime) -> Compute:
    """Resolve a runtime configuration on this machine and set the thread count.

    Raises ValueError where the device or the type is not to be had.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"runtime.device is {config.device!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device is cuda, but torch sees no CUDA device: set runtime.device=cpu")
    torch.set_num_threads(config.num_threads or max(1, available_cores() // processes_on_this_machine()))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

    if config.dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_fast_bfloat16()
        autocast_dtype = torch.bfloat16 if fast else None
    elif config.dtype in ("float32", "bfloat16"):
        autocast_dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
    else:
        raise ValueError(f"runtime.dtype is {config.dtype!r}: expected auto, float32 or bfloat16")
    return Compute(device, autocast_dtype, config.compile)
