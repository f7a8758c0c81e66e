"""Command-line flags that are generated from dataclasses of options."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from unpadded.cli.terminal import waiting
from unpadded.options import REPLACEMENTS, LoadOptions, Option, convert, describe

if TYPE_CHECKING:
    from unpadded import Engine

MODEL_VARIABLE = "UNPADDED_MODEL"
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # to which each command adds its parser


class CommandParser(argparse.ArgumentParser):
    """A parser whose error about an unknown option shows the usage of its own command and the nearest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(option, self._option_string_actions, 1)
            name, usage = option.lstrip("-").replace("-", "_"), f"see {self.prog} --help"
            remedy = f"did you mean {near[0]}?" if near else REPLACEMENTS.get(name, usage)
            kind = "option" if option.startswith("-") else "argument"
            self.error(f"unknown {kind}: {unknown[0]!r}; {remedy}")
        return found, unknown


def add_model(parser: argparse.ArgumentParser, *flags: str, several: bool = False) -> None:
    """Add the model as an option with these flags, or as a positional argument, which may be omitted.

    several: the argument is `models`, a list.
    """
    default = os.environ.get(MODEL_VARIABLE) or None
    kind = "folders or Hugging Face ids" if several else "a folder or a Hugging Face id"
    text = f"{kind} (default: {MODEL_VARIABLE} of the environment)"
    if several:
        nargs = "*" if default else "+"
        parser.add_argument("models", nargs=nargs, default=default and [default], metavar="MODEL", help=text)
        return
    needed: dict[str, Any] = {"required": default is None} if flags else {"nargs": "?" if default else None}
    parser.add_argument(*(flags or ["model"]), default=default, metavar="MODEL", help=text, **needed)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of `unpadded.load`."""
    add_flags(parser.add_argument_group("loading the model"), describe(LoadOptions))


def add_flags(group: argparse._ArgumentGroup, options: Iterable[Option]) -> None:
    """Add a flag for each option."""
    for option in options:
        flags = [*(["-t"] if option.name == "task" else []), f"--{option.name.replace('_', '-')}"]
        group.add_argument(*flags, help=_help(option), **_how_to_parse(option))


def flag_values(args: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """Return the keyword arguments that the flags stand for."""
    return {option.name: convert(option, getattr(args, option.name)) for option in options}


def load(args: argparse.Namespace, model: str | None = None) -> Engine:
    """Load a model as the flags describe; None: the one that they name."""
    import unpadded

    model = model or args.model
    with waiting(f"loading {model}"):
        return unpadded.load(model, **flag_values(args, describe(LoadOptions)))


def _help(option: Option) -> str:
    default = "" if option.default in (None, False, ()) else f" (default: {option.default})"
    return (option.help + default).replace("%", "%%")


def _how_to_parse(option: Option) -> dict[str, Any]:
    """Return the arguments of `add_argument` that depend on the option's type."""
    if option.type == "bool":
        return {"action": "store_true"}
    if option.type == "bool | None":
        return {"action": argparse.BooleanOptionalAction, "default": option.default}
    if option.default == ():
        return {"action": "append", "default": [], "metavar": option.metavar}
    return {"choices": option.choices, "default": option.default, "metavar": option.metavar}
