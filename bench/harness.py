"""Command-line arguments and JSON results, the same for every benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unpadded.cli.benchmark import machine

ROOT = Path(__file__).parents[1]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows `doc` as its help and knows --out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON result to this file")
    return parser


def report(result: dict[str, Any], out: Path | None) -> None:
    """Add the machine card to a result, write it to `out` if there is one, and print it as the last line."""
    line = json.dumps({"machine": machine.card(ROOT), **result})
    if out:
        out.write_text(line + "\n")
    print(line)


@contextlib.contextmanager
def reporting(out: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a result to fill and report it at the end, even if the run fails or is interrupted."""
    result: dict[str, Any] = {}
    try:
        yield result
    finally:
        report(result, out)
