"""What every bench shares: its arguments, and the card in its result (which machine, versions and commit)."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unpadded.cli.benchmark import machine

ROOT = Path(__file__).parents[1]


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


@contextlib.contextmanager
def reporting(out: Path | None) -> Iterator[dict[str, Any]]:
    """A result to fill, reported at the end even where the run is interrupted or fails halfway."""
    result: dict[str, Any] = {}
    try:
        yield result
    finally:
        report(result, out)


def card() -> dict[str, Any]:
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    return machine.card() | {"commit": commit or "unknown"}


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    return machine.memory("VmHWM")
