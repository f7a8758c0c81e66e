"""`unpadded info`: describe a checkpoint without reading its weights."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from unpadded.cli.flags import Commands, add_model

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NAME_WIDTH = 22


def add_command(commands: Commands) -> None:
    """Add the command `unpadded info`."""
    info = commands.add_parser("info", help="describe a model", description="Describe a model without loading it.")
    info.set_defaults(command=run)
    add_model(info)
    info.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    info.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the description of a checkpoint."""
    from unpadded.checkpoint.families import FAMILIES
    from unpadded.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(args.model, revision=args.revision)
    slots = FAMILIES[checkpoint.spec.family].tensors(checkpoint.spec)
    parameters = sum(math.prod(slot.shape) for slot in slots.values())
    memory = {dtype: parameters * item_bytes for dtype, item_bytes in ITEM_BYTES.items()}
    described = checkpoint.describe()
    description = {
        "model": described.pop("model"),
        "dimensions": checkpoint.dense[-1].shape[0] if checkpoint.dense else checkpoint.spec.hidden,
        "matryoshka": described.pop("matryoshka"),
        "max_length": described.pop("max_length"),
        "prompts": described.pop("prompts"),
        "parameters": parameters,
        "memory": memory,
        **described,
    }
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        mebibytes = {dtype: f"{size / 2**20:,.1f} MiB" for dtype, size in memory.items()}
        _print_nested({**description, "parameters": f"{parameters:,}", "memory": mebibytes})


def _print_nested(values: dict[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}")
            _print_nested(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name}".ljust(NAME_WIDTH) + str("none" if text in (None, "", {}) else text))
