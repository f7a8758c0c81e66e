"""Machine card, speed ceilings and memory of the machine that a benchmark runs on."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unpadded
from unpadded_kernels import linear

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers")
GPU_SETTINGS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"  # nvidia-smi fields


def card(checkout: Path | None = None) -> dict[str, Any]:
    """Return the machine and the package versions, stored with every result.

    checkout: a git repository whose commit is included.
    """
    found = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "unpadded": unpadded.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        settings = _output("nvidia-smi", f"--query-gpu={GPU_SETTINGS}", "--format=csv,noheader")
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, GPU_SETTINGS: settings}
    if checkout is not None:
        git = ("git", "-C", str(checkout))
        # Results and pages are written by the benchmarks themselves, one after the other.
        changed = _output(*git, "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs", ":!README.md")
        commit = _output(*git, "describe", "--always")
        found["commit"] = commit + ("-dirty" if changed else "") if commit else "unknown"
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, times: int = 20) -> float:
    """Return the highest flop/s of so many runs of a matmul.

    The shape is 8192 x 8192 x 8192 on CUDA and 2048 x 768 x 3072, that of an encoder layer, on a CPU.
    """
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * k * n / min(seconds(lambda: linear(x, weight, None), device, times))


def seconds(run: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Return the seconds of each run after one warm-up run, measured with events on CUDA."""
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
    """Peak bytes above those held at construction, of the GPU's memory or of the process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = process_memory("VmRSS") if _reset_peak() else None

    def increase(self) -> int | None:
        """Return the bytes; None where the operating system cannot reset its peak."""
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else process_memory("VmHWM")
        return max(0, peak - self.before)


def process_memory(field: str) -> int:
    """Return this process's resident bytes (VmRSS) or their peak (VmHWM).

    ru_maxrss is not used, since a child's starts at its parent's value.
    """
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, field
    return 1024 * int(found[1])


def _reset_peak() -> bool:
    """Return freed memory to the system and reset VmHWM; False where that is not supported."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _output(*command: str) -> str:
    """Return a program's output; empty if the program is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    text = file.read_text() if (file := Path("/proc/cpuinfo")).exists() else ""
    found = dict(re.findall(r"^(model name|cpu family)\s*: *(.*\S)", text, re.MULTILINE))
    name = found.get("model name", platform.processor()) + " with AMX" * ("amx_tile" in text)
    # in a virtual machine, the name is the same for all generations: family 25 is Zen 3 and 4, 26 is Zen 5
    return f"{name} (family {found['cpu family']})" if name.startswith("AMD") and "cpu family" in found else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
