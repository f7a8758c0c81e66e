"""Load a model from a folder or the Hugging Face hub into an `Engine`."""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, Unpack, cast

import torch

from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.execution.pipeline import Backend, EmbeddingPipeline
from unpadded.execution.runner import Runner, check_fork, in_thread
from unpadded.execution.worker_pool import WorkerPool
from unpadded.model.attention import attention_backend
from unpadded.model.encoder import Encoder
from unpadded.model.heads import Head, stacked
from unpadded.model.weights import int8_linear, load_dense, load_weights, packed_linear
from unpadded.options import LoadKeywords, LoadOptions, check_keywords
from unpadded.tokenization.tokenizer import Tokenizer
from unpadded_kernels import avx512

Device: TypeAlias = str | torch.device

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The default token_budget: enough to keep the device busy, few enough for a CPU's caches.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}
# One core that tokenizes keeps up with many that run torch (measured: bench/NOTES.md).
CORES_PER_TOKENIZER_CORE = 16


def load(model: str | os.PathLike[str], **keywords: Unpack[LoadKeywords]) -> Engine:
    """Load a checkpoint: its configuration, safetensors and tokenizer; never a pickle, never its code.

    model: a folder, or an id of the Hugging Face hub (`HF_HUB_OFFLINE` and tokens are honored).
    The keyword arguments are described in `unpadded.options.LoadOptions`.
    Raises CheckpointError (ConfigError, WeightsError) or OptionError.
    """
    check_keywords(keywords, LoadOptions)
    options = LoadOptions(**keywords)
    devices = _devices(options.device)
    kind = devices[0].type
    if options.dtype == "int8" and (kind == "cuda" or not avx512.supports(torch.int8)):
        needed = "needs AVX-512 with VNNI and a C compiler, such as gcc"
        reason, other = ("runs on a CPU only", "float16") if kind == "cuda" else (needed, "float32")
        raise OptionError(f"dtype='int8' {reason}: the device is {devices[0]}; use dtype={other!r}")
    attention_backend(options.attention, devices[0], _dtype(options.dtype, kind))  # checked before anything is read
    checkpoint = open_checkpoint(
        model,
        revision=options.revision,
        max_length=options.max_length,
        rotary_scaling_factor=options.rotary_scaling_factor,
    )
    if options.dtype == "int8" and checkpoint.spec.lora is not None:
        raise OptionError(
            f"dtype={options.dtype!r} is not supported with LoRA adapters, and {checkpoint.name} has some for "
            f"{', '.join(checkpoint.spec.lora.tasks)}; use dtype='auto'"
        )
    expansion = checkpoint.tokens and checkpoint.tokens.expansion
    special = "bias by distance" if checkpoint.spec.position_bias else ""
    special = special or ("tokens without keys" if expansion and not expansion.attend else "")
    if special and options.attention not in ("auto", "unpadded"):
        raise OptionError(f"attention={options.attention!r} has no {special} for {checkpoint.name}; use 'auto'")
    # On a CPU torch needs the cores; the tokenizer gets the few that keep up with it.
    threads = torch.get_num_threads() // len(devices)
    cores = max(1, threads // CORES_PER_TOKENIZER_CORE) if kind == "cpu" else None
    markers = checkpoint.tokens.markers.values() if checkpoint.tokens else ()
    tokenizer = Tokenizer.from_folder(checkpoint.folder, lower_case=checkpoint.lower_case, cores=cores, markers=markers)
    make = partial(make_runner, checkpoint, options)
    if len(devices) > 1:
        backend: Backend = WorkerPool(partial(make_pipeline, checkpoint, tokenizer, options), devices)
    else:
        backend = in_thread(partial(make, devices[0])) if kind == "cpu" else make(devices[0])
    token_budget = options.token_budget
    if not isinstance(token_budget, int):
        fitting = backend.max_batch_tokens() if token_budget == "auto" or kind == "cuda" else None
        token_budget = TOKEN_BUDGET[kind] if fitting is None else min(TOKEN_BUDGET[kind], fitting)
    path = Path(model).expanduser()
    reload = partial(load, path.resolve() if path.is_dir() else model, **vars(options))
    return Engine(EmbeddingPipeline(checkpoint, tokenizer, backend, token_budget), reload)


def make_pipeline(
    checkpoint: Checkpoint, tokenizer: Tokenizer, options: LoadOptions, device: torch.device
) -> EmbeddingPipeline:
    """Load a model in the process of a device, whose parent passes the token budget."""
    return EmbeddingPipeline(checkpoint, tokenizer, make_runner(checkpoint, options, device), TOKEN_BUDGET[device.type])


def make_runner(checkpoint: Checkpoint, options: LoadOptions, device: torch.device) -> Runner:
    """Load a checkpoint's weights onto a device."""
    dtype = _dtype(options.dtype, device.type)
    attention = attention_backend(options.attention, device, dtype)
    change = int8_linear if options.dtype == "int8" else packed_linear
    weights = load_weights(checkpoint, device=device, dtype=dtype, change=change)
    encoder = Encoder(checkpoint.spec, weights, attention, batch_invariant=options.batch_invariant)
    heads = {"vector": Head(checkpoint.pooling, load_dense(checkpoint.dense, device=device))}
    if checkpoint.score is not None:
        heads["score"] = Head(checkpoint.score.pooling, load_dense(checkpoint.score.dense, device=device))
    if (sparse := checkpoint.sparse) is not None:
        heads["sparse"] = Head("vocabulary" if sparse.log1p else "none", load_dense(sparse.dense, device=device))
    if checkpoint.tokens is not None:
        heads["tokens"] = Head("none", load_dense(checkpoint.tokens.dense, device=device))
    if checkpoint.has_all:
        heads["all"] = Head("none", (stacked([heads["sparse"].layers[0], heads["tokens"].layers[0]]),))
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # GNU's C library keeps what loading has freed, 20 to 40 MB for MiniLM
    return Runner(encoder, device, heads)


def _devices(device: Device | Sequence[Device]) -> list[torch.device]:
    if device == "all":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    if isinstance(device, str):
        device = device.replace(" ", "").split(",")
    devices = [_device(one) for one in ([device] if isinstance(device, torch.device) else device)]
    if not devices:
        raise OptionError(f"no device is given: {device!r}; use auto, all, cpu, cuda or cuda:N")
    if len({one.type for one in devices}) > 1:
        raise OptionError(f"devices are of different types: {device!r}; use CUDA devices only, or cpu only")
    return devices


def _device(device: Device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device is unknown: {device!r}; use auto, all, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f"device is not supported: {device!r}; use auto, all, cpu, cuda or cuda:N")
    check_fork(found)
    if found.type == "cpu":
        return found
    if (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device does not exist: {device!r}, there are {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    # With its index, because another thread may have another current device.
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _dtype(dtype: str | torch.dtype, kind: str) -> torch.dtype:
    if dtype in ("auto", "int8"):  # what is not a linear layer
        return torch.float16 if kind == "cuda" else torch.float32
    if dtype in DTYPES.values():
        return cast(torch.dtype, dtype)
    if dtype not in DTYPES:
        raise OptionError(f"dtype is unknown: {dtype!r}; use auto, {', '.join(DTYPES)}, int8")
    return DTYPES[dtype]
