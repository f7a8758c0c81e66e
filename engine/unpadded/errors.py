"""Errors, grouped by who can fix the problem. A message has what is wrong, the value received, and what to do."""

import os
from typing import Self


def install_command(extra: str) -> str:
    """Return how to install an extra: from a checkout, because the package is not on PyPI."""
    return f"run pip install '.[{extra}]' in a checkout of unpadded"


class UnpaddedError(Exception):
    """Base class of all errors that this package raises."""


class CheckpointError(UnpaddedError):
    """A model's files are missing, broken or not supported. A message longer than a screen lacks its middle."""

    def __init__(self, message: str) -> None:
        lines = message.split("\n")
        if len(lines) > 24:
            message = "\n".join([*lines[:22], f"  ... ({len(lines)} lines)", lines[-1]])
        super().__init__(message if len(message) <= 2000 else f"{message[:1600]} ... {message[-300:]}")


class ConfigError(CheckpointError):
    """A model's configuration is contradictory or not implemented."""


class WeightsError(CheckpointError):
    """A model's tensors are missing, unexpected, misshaped, truncated or pickled."""


class OptionError(UnpaddedError, ValueError):
    """An argument or flag has a value that is not supported."""


class InputError(UnpaddedError, ValueError):
    """A text, or a sequence of token ids, cannot be embedded; the message has its index."""


class TooLargeError(InputError):
    """A single text does not fit the device's memory."""

    def __init__(self, index: int, tokens: int, device: str) -> None:
        super().__init__(index, tokens, device)
        self.index, self.tokens, self.device = index, tokens, device

    def __str__(self) -> str:
        return (
            f"text {self.index} does not fit the memory of {self.device}: {self.tokens} tokens; free memory, load with "
            f"a max_length below {self.tokens}, or use float16 or bfloat16"
        )

    def at(self, index: int) -> Self:
        """Return the same error with another index."""
        return type(self)(index, self.tokens, self.device)


class OutputError(UnpaddedError):
    """A result is not finite, or its file cannot be written."""


class WorkerError(OutputError):
    """The processes that run a model crashed, hung or were closed, or belong to the parent of a fork."""


class BusyError(UnpaddedError):
    """Work was not done for lack of time or capacity; it may succeed later."""


class OverloadedError(BusyError):
    """The queue is full."""


class DeadlineError(BusyError, TimeoutError):
    """The caller's deadline passed; its work was dropped."""


def forked_error(used: str) -> WorkerError:
    """Return the error of a forked process that cannot use what its parent uses."""
    return WorkerError(
        f"a forked process cannot use {used} of its parent: process {os.getpid()}; load models after the fork only, or "
        "start processes with multiprocessing's 'spawn'"
    )
