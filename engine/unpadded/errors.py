"""What can go wrong, by whose hand it can be mended.

UnpaddedError
├── CheckpointError      a model's files: absent, broken, not understood
│   ├── ConfigError      a configuration that is contradictory or not implemented
│   └── WeightsError     tensors missing, surplus, mis-shaped, truncated or pickled
├── OptionError          an argument or flag with a value that is not offered
├── InputError           a text or id list that cannot be embedded; names its index
│   └── TooLargeError    a text that alone does not fit the device's memory
├── OutputError          a result that cannot be given: not finite, or a file that cannot be written
│   └── WorkerError      the processes that run a model on several devices died, or were closed
└── BusyError            work that was not done for lack of time or room
    ├── OverloadedError  the queue is full
    └── DeadlineError    the caller's deadline passed

Every message has three parts: what was wrong, the value received, what to do.
"""

from __future__ import annotations


class UnpaddedError(Exception):
    """The root: catch it to catch everything this package raises on purpose."""


class CheckpointError(UnpaddedError):
    """A model's files are absent, broken or not understood."""


class ConfigError(CheckpointError):
    """A model's configuration is contradictory or asks for what is not implemented."""


class WeightsError(CheckpointError):
    """A model's tensors are missing, surplus, mis-shaped, truncated or pickled."""


class OptionError(UnpaddedError, ValueError):
    """An argument has a value that is not offered."""


class InputError(UnpaddedError, ValueError):
    """A text, or a sequence of token ids, cannot be embedded."""


class TooLargeError(InputError):
    """A text alone does not fit the device's memory."""

    def __init__(self, index: int, tokens: int, device: str) -> None:
        super().__init__(index, tokens, device)
        self.index, self.tokens, self.device = index, tokens, device

    def __str__(self) -> str:
        return (
            f"text {self.index} does not fit the memory of {self.device}: {self.tokens} tokens; free some, load with a "
            f"max_length below {self.tokens}, or in float16 or bfloat16"
        )

    def at(self, index: int) -> TooLargeError:
        """The same, where the text is counted otherwise."""
        return TooLargeError(index, self.tokens, self.device)


class OutputError(UnpaddedError):
    """A result cannot be given: it is not finite, or its file cannot be written."""


class WorkerError(OutputError):
    """The processes that run a model on several devices died, or were closed."""


class BusyError(UnpaddedError):
    """Work was not done for lack of time or room; the same may succeed later."""


class OverloadedError(BusyError):
    """The queue is full."""


class DeadlineError(BusyError, TimeoutError):
    """The caller's deadline passed; its work was dropped."""
