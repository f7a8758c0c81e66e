"""What can go wrong, by whose hand it can be mended.

UnpaddedError
├── CheckpointError      a model's files: absent, broken, not understood
│   ├── ConfigError      a configuration that is contradictory or not implemented
│   └── WeightsError     tensors missing, surplus, mis-shaped, truncated or pickled
├── OptionError          an argument or flag with a value that is not offered
├── InputError           a text or id list that cannot be embedded; names its index
├── OutputError          a result that cannot be given: not finite, or a file that cannot be written
└── BusyError            work that was not done for lack of time or room
    ├── OverloadedError  the queue is full
    └── DeadlineError    the caller's deadline passed

Every message has three parts: what was wrong, the value received, what to do.
"""


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


class OutputError(UnpaddedError):
    """A result cannot be given: it is not finite, or its file cannot be written."""


class BusyError(UnpaddedError):
    """Work was not done for lack of time or room; the same may succeed later."""


class OverloadedError(BusyError):
    """The queue is full."""


class DeadlineError(BusyError, TimeoutError):
    """The caller's deadline passed; its work was dropped."""
