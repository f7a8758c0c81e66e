"""Runs batches on one device, in this process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from unpadded.errors import TooLargeError, forked_error
from unpadded.execution.cuda_graphs import Graphs, bucket_of, fill
from unpadded.execution.memory import max_batch_tokens
from unpadded.execution.transfer import HostCopy, Wait, copy_to_host, from_words, to_words, wait_for, wait_for_terms
from unpadded.model.batch import Ids, PackedBatch, pack
from unpadded.model.encoder import Encoder
from unpadded.model.heads import Head, head_rows
from unpadded.options import VectorOptions
from unpadded_kernels import matryoshka
from unpadded_kernels.attention import make_tile_map
from unpadded_kernels.tiles import attention_block_m

logger = logging.getLogger("unpadded")

# Batches in flight per CUDA device: it computes one, has the next one, and the host prepares a third or reads a result.
DEPTH = 3
PROCESS = os.getpid()  # the process that imported this module
GROWTH = 1.01  # of the limit after each batch near it: other programs' memory may be free again
Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")


def in_thread(run: Callable[[], Result]) -> Result:
    """Return run(), called in a thread with which the OpenMP threads that it starts exit: a fork cannot use them."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def check_fork(device: torch.device) -> None:
    """Raise WorkerError if the device cannot be used because this process was forked."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise forked_error("the CUDA devices")


def _after_fork(method: Method) -> Method:
    """Run a method in a thread of its own if this process was forked.

    GNU OpenMP deadlocks in the main thread of a fork whose parent computed there; a new thread starts its own threads.
    """

    @wraps(method)
    def run(self: Runner, *args: Any, **keywords: Any) -> Any:
        check_fork(self.device)
        forked = self.device.type == "cpu" and os.getpid() != PROCESS
        if not forked or threading.current_thread() is not threading.main_thread():
            return method(self, *args, **keywords)
        return in_thread(partial(method, self, *args, **keywords))

    return cast(Method, run)


class Runner:
    """Runs an encoder and its heads, by name, on one device. Any thread may call it.

    A batch that does not fit the device's memory is split in halves, and so are later batches of its size.
    """

    devices = 1

    def __init__(self, encoder: Encoder, device: torch.device, heads: Mapping[str, Head]) -> None:
        self.encoder = encoder
        self.device = device
        self.heads = {"states": Head("none"), **heads}
        self.depth = DEPTH if device.type == "cuda" else 1
        self._max_tokens: float = math.inf  # per batch; halved by a batch that did not fit, and grows again
        lock = encoder.lock
        os.register_at_fork(  # a fork waits for the running batch, so that it has no lock without an owner
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
        # Attention libraries need the lengths on the host, which a graph cannot capture.
        captures = device.type == "cuda" and encoder.attention.name == "unpadded"
        self.graphs = Graphs(device) if captures else None

    @property
    def dimensions(self) -> int:
        """Length of a vector at its full length."""
        return self.heads["vector"].width(self.encoder.spec.hidden)

    @property
    def ready_devices(self) -> int:
        """1, or 0 after an error that has broken the CUDA context of this process: no later batch can run."""
        try:
            if self.encoder.stream is not None:
                self.encoder.stream.query()  # raises the error again, and does not wait
        except RuntimeError:
            return 0
        return 1

    def describe(self) -> dict[str, str]:
        """Return the device, the dtype and the attention backend."""
        encoder = self.encoder
        return {"device": str(self.device), "dtype": encoder.dtype_name, "attention": encoder.attention.name}

    def max_batch_tokens(self) -> int | None:
        """Return how many tokens of a batch fit the free memory of the device, or None if that is unknown."""
        return max_batch_tokens(self.encoder.spec, self.encoder.weights.word.dtype.itemsize, self.device)

    @_after_fork
    @torch.no_grad()
    def forward(self, batch: PackedBatch, states: list[Tensor] | None = None, embeds: Tensor | None = None) -> Tensor:
        """Return the last hidden state of every token of a batch on the host: [total_tokens, hidden] on the device.

        states, embeds: see `Encoder`; embeds may be on any device and of any dtype.
        """
        if embeds is not None:
            embeds = embeds.to(self.device, self.encoder.weights.word.dtype).contiguous()
        with self._on_device():
            if states is not None or embeds is not None:
                hidden = self.encoder(self.to_device(batch), states, embeds=embeds)
            else:
                hidden = self._run(batch, None, None)
                hidden = hidden.clone() if hidden.is_inference() else hidden  # the next replay overwrites a graph's
        if self.encoder.stream is not None:
            caller = torch.cuda.current_stream(self.device)
            caller.wait_stream(self.encoder.stream)
            for tensor in (hidden, *(states or ())):
                tensor.record_stream(caller)  # its memory is not used again before the caller's stream has read it
        return hidden

    @_after_fork
    @torch.inference_mode()
    def launch(self, sequences: Sequence[Ids], options: VectorOptions) -> Wait:
        """Start computing a head's rows for sequences: [rows, dimensions] fp32, or `wait_for_terms`, in their order.

        Does not wait on CUDA, so that the host can pack the next batch.
        Raises TooLargeError, with the index in `sequences`, for a sequence that does not fit the memory alone.
        """
        sparse = self.heads[options.head].pooling == "vocabulary"
        wait = wait_for_terms if sparse else wait_for

        def run(batch: PackedBatch) -> HostCopy:
            rows = self._run(batch, options.adapter, options.head)
            if sparse:
                return copy_to_host(rows)
            return copy_to_host(matryoshka(rows, options.layer_norm, options.dimensions, options.normalize))

        return partial(wait, self._run_split(sequences, run))

    def close(self) -> None:
        """Do nothing: there are no processes to stop."""

    def _run_split(self, sequences: Sequence[Ids], run: Callable[[PackedBatch], HostCopy]) -> list[HostCopy]:
        """Run sequences as one batch if it fits the memory, otherwise in halves."""
        copies: list[HostCopy] = []
        parts = [range(len(sequences))]  # that wait, the first one last
        while parts:
            part = parts.pop()
            tokens = sum(len(sequences[i]) for i in part)
            if tokens <= self._max_tokens or len(part) == 1:
                try:
                    batch = pack([sequences[i] for i in part], self.encoder.spec)
                    with self._on_device():
                        copies.append(run(batch))
                    if tokens > self._max_tokens / 2:
                        self._max_tokens *= GROWTH
                    continue
                except RuntimeError as error:  # an OutOfMemoryError, or an AcceleratorError for pinned memory
                    if "out of memory" not in str(error):
                        raise
                # Outside of the handler, because the exception holds the tensors of every frame that it passed.
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if len(part) == 1:
                    raise TooLargeError(part.start, tokens, str(self.device))
                if self._max_tokens == math.inf:
                    logger.warning(
                        "a batch of %d tokens does not fit the memory of %s; batches are split; load with a lower "
                        "token_budget",
                        tokens,
                        self.device,
                    )
                self._max_tokens = tokens // 2
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
        return copies

    def _run(self, batch: PackedBatch, adapter: str | None, head: str | None) -> Tensor:
        """Return a head's rows before `matryoshka`, or without a head the hidden states, of a batch on the host.

        The next batch may overwrite them.
        """
        run: Callable[[PackedBatch], Tensor] = partial(self.encoder, adapter=adapter)
        if head is not None:
            run = partial(head_rows, self.encoder, adapter=adapter, head=self.heads[head])
        pooling = "none" if head is None else self.heads[head].pooling
        # a captured graph keeps its rows, up to 1 MB per text with "vocabulary"
        bucket = bucket_of(batch) if self.graphs is not None and pooling != "vocabulary" else None
        if self.graphs is None or bucket is None:
            return run(self.to_device(batch))
        self.encoder.weights_of(adapter)  # computes them outside of a captured graph
        filled = fill(self._with_tile_map(batch), bucket, self._block_m())
        # All adapters share a graph: each is written into the same memory before the pass.
        key = (bucket, adapter is not None, batch.key_lengths is not None, head, batch.token_types is not None)
        rows = self.graphs.replay(key, to_words(filled), lambda words: run(from_words(words, filled)))
        return rows[: len(batch.input_ids) if pooling == "none" else len(batch.lengths)]

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Hold the encoder's lock and run on its stream, after what the caller's stream has been given."""
        stream = self.encoder.stream
        with self.encoder.lock:
            if stream is None:
                yield
                return
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                yield

    def to_device(self, batch: PackedBatch) -> PackedBatch:
        if self.device.type == "cpu":
            return batch
        batch = self._with_tile_map(batch)
        return from_words(to_words(batch).to(self.device, non_blocking=True), batch)

    def _with_tile_map(self, batch: PackedBatch) -> PackedBatch:
        return replace(batch, tile_map=make_tile_map(batch.lengths, self._block_m(), batch.key_lengths))

    def _block_m(self) -> int:
        return attention_block_m(self.encoder.weights.word.dtype, self.encoder.spec.head_dim, self.device)
