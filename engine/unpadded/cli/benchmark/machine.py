"""What is measured on: the machine's name, its ceilings, and the memory that a pass takes."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unpadded
from unpadded_kernels import linear

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "fastembed", "infinity-emb")
SETTINGS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"  # of nvidia-smi


def card() -> dict[str, Any]:
    """Which machine and which versions: what every result carries."""
    found = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "unpadded": unpadded.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", f"--query-gpu={SETTINGS}", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError as error:
            said = str(error)
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, SETTINGS: said}
    return found


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of a product: 8192 x 8192 x 8192 on CUDA, 2048 x 768 x 3072 (a layer's) on a CPU; the best of many."""
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * k * n / min(seconds(lambda: linear(x, weight, None), device, 50 if device.type == "cuda" else 20))


def copy_rate(device: torch.device) -> float:
    """bytes/s read and written by a copy of 2 GiB on CUDA, 256 MiB on a CPU; the median of many."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), device, 10))


def seconds(run: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Seconds of each run, by CUDA events where there is CUDA."""
    run()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            run()
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


class PeakMemory:
    """Bytes that a pass takes at most over what was held before it: of the GPU's memory, or of the process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = memory("VmRSS") if _forget_peak() else None

    def grown(self) -> int | None:
        """Since the start; None where the system does not say."""
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else memory("VmHWM")
        return max(0, peak - self.before)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, what it holds; VmHWM, its peak (ru_maxrss of a child starts at its parent's)."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, field
    return 1024 * int(found[1])


def _forget_peak() -> bool:
    """Give freed memory back and start VmHWM anew; False where the system does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
