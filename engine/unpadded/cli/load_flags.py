"""The flags that say which model is loaded and how, shared by the commands that load one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from unpadded import Engine

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what a command adds itself to


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a model that is loaded."""
    model = parser.add_argument_group("the model")
    model.add_argument("--revision", help="a branch, tag or commit of a Hugging Face id")
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, all, or several: cuda:0,cuda:1 (default: auto)"
    )
    model.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16, float8 (default: auto)")
    model.add_argument("--attention", default="auto", help="the attention backend (default: auto)")
    model.add_argument(
        "--rotary-scaling-factor",
        type=_scaling_factor,
        default="config",
        metavar="F",
        help="config, none, or a number such as 2 (default: config)",
    )
    model.add_argument("--max-length", type=int, metavar="N", help="tokens kept of a text (default: the model's)")
    model.add_argument(
        "--token-budget", type=_token_budget, metavar="N", help="tokens of a batch, or auto: as many as memory holds"
    )
    model.add_argument("--batch-invariant", action="store_true", help="the same bits in any batch on CUDA too, slower")


def load(args: argparse.Namespace) -> Engine:
    """The engine that the flags ask for."""
    import unpadded

    return unpadded.load(args.model, **settings(args))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The words of `unpadded.load` that the flags give, all but the model."""
    return {
        "device": args.device,
        "dtype": args.dtype,
        "attention": args.attention,
        "rotary_scaling_factor": args.rotary_scaling_factor,
        "max_length": args.max_length,
        "token_budget": args.token_budget,
        "batch_invariant": args.batch_invariant,
        "revision": args.revision,
    }


def _token_budget(value: str) -> str | int:
    try:
        return value if value == "auto" else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not auto or a number: {value!r}") from None


def _scaling_factor(value: str) -> str | float | None:
    if value == "config":
        return value
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not config, none or a number: {value!r}") from None
