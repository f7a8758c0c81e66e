"""Command-line flags that are generated from `LoadOptions` and `EncodeOptions`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from unpadded.options import EncodeOptions, LoadOptions, Option, convert, describe

if TYPE_CHECKING:
    from unpadded import Engine

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # to which each command adds its parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of `unpadded.load`."""
    add_flags(parser.add_argument_group("loading the model"), LoadOptions)


def add_flags(group: argparse._ArgumentGroup, options: type[LoadOptions] | type[EncodeOptions]) -> None:
    """Add a flag for each option of a class."""
    for option in describe(options):
        flags = [*_SHORT_FLAGS.get(option.name, ()), f"--{option.name.replace('_', '-')}"]
        group.add_argument(*flags, default=option.default, help=_help(option), **_how_to_parse(option))


def flag_values(args: argparse.Namespace, options: type[LoadOptions] | type[EncodeOptions]) -> dict[str, Any]:
    """Return the keyword arguments that the flags stand for."""
    return {option.name: convert(option, getattr(args, option.name)) for option in describe(options)}


def load(args: argparse.Namespace) -> Engine:
    """Load the model that the flags describe."""
    import unpadded

    return unpadded.load(args.model, **flag_values(args, LoadOptions))


def _help(option: Option) -> str:
    default = "" if option.default in (None, False) else f" (default: {option.default})"
    return (option.help + default).replace("%", "%%")


def _how_to_parse(option: Option) -> dict[str, Any]:
    """Return the arguments of `add_argument` that depend on the option's type."""
    if option.type == "bool":
        return {"action": "store_true"}
    if option.type == "bool | None":
        return {"action": argparse.BooleanOptionalAction}
    return {"choices": option.choices, "metavar": option.metavar}


_SHORT_FLAGS = {"task": ["-t"]}
