"""The interface between the pipeline and the devices: a `Runner` in this process, or a `WorkerPool` of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unpadded.options import VectorOptions


@dataclass(frozen=True)
class PendingVectors:
    """Vectors that a device is computing. `wait` blocks until they are on the host: [batch, dimensions] fp32."""

    wait: Callable[[], np.ndarray]


class Backend(Protocol):
    """Runs batches of id sequences, each [tokens] int32, on one or more devices."""

    parallelism: int  # batches that run at the same time: one per device
    depth: int  # batches worth launching before the first is waited for

    @property
    def dimensions(self) -> int:
        """Length of a vector at its full length."""

    @property
    def ready_devices(self) -> int:
        """Devices that accept batches; less than `parallelism` while a crashed process restarts."""

    def launch(self, sequences: Sequence[np.ndarray], options: VectorOptions) -> PendingVectors:
        """Start computing one vector per sequence."""

    def hidden_states(self, sequences: Sequence[np.ndarray], *, adapter: str | None = None) -> list[np.ndarray]:
        """Return the last hidden states of each sequence: [tokens, hidden] fp32 on the host."""

    def describe(self) -> dict[str, str]:
        """Return the device, the dtype and the attention backend."""

    def max_batch_tokens(self) -> int | None:
        """Return how many tokens of a batch fit the free memory of each device, or None if that is unknown."""

    def close(self) -> None:
        """Stop the processes, if there are any."""
