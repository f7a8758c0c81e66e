"""What every bench shares: its arguments, and the card in its result (which machine, versions and commit)."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print a result, with the card, as the last line; write it where asked."""
    line = json.dumps({"machine": card(), **result})
    if out:
        out.write_text(line + "\n")
    print(line)


def card() -> dict[str, Any]:
    root = Path(__file__).parent
    commit = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    found = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        found["driver, clocks, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def peak_memory() -> int:
    """Peak resident bytes of this process. ru_maxrss would not do: a child starts from its parent's peak."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


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
