"""load: a folder or a hub id -> an Engine on a device."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch

from unpadded.backends import Attention, attention_backend
from unpadded.checkpoint import open_checkpoint
from unpadded.encoder import Encoder
from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.runner import Runner
from unpadded.spec import EncoderSpec
from unpadded.tokenizer import Tokenizer
from unpadded.weights import EncoderWeights, load_dense, load_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Rows of a layer's out-projection and MLP that go together on a CPU, so that their activations stay in its caches (EPYC
# with 32 MiB, hidden 768, fp32, 2026-11: an MLP ran at 410 GFLOP/s in such blocks, at 340 whole).
CPU_ROW_BLOCK = 512
# Tokens of a batch where the caller names none: enough to keep the processor busy, few enough for a CPU's caches.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    rotary_scaling_factor: float | Literal["config"] | None = "config",
    max_length: int | None = None,
    token_budget: int | None = None,
    batch_invariant: bool = False,
    revision: str | None = None,
) -> Engine:
    """Load a checkpoint: its configuration, safetensors and tokenizer; never a pickle, never its code.

    model: a folder, or an id of the Hugging Face hub (`HF_HUB_OFFLINE` and tokens are honoured), at `revision`.
    device: "auto" takes CUDA where there is one, else the CPU. dtype: "auto" is float16 on CUDA, float32 on a CPU.
    attention: "auto", "unpadded", "torch" or "flash-attn".
    rotary_scaling_factor: "config" (what the checkpoint says), None, or the factor of dynamic-NTK scaling for texts
    longer than the model was trained on; every text is scaled by its own length.
    max_length: tokens kept of a text; None takes the checkpoint's. token_budget: tokens of a batch; it bounds memory.
    batch_invariant: the same bits for a text alone and in any batch on CUDA too, through our own matrix products; a CPU
    gives them anyway.
    Raises CheckpointError (or its ConfigError, WeightsError) and OptionError.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    backend = attention_backend(attention, device, dtype)
    if token_budget is not None and token_budget < 1:
        raise OptionError(f"token_budget is not positive: {token_budget}; pass the tokens of a batch, such as 16384")
    checkpoint = open_checkpoint(
        model, revision=revision, max_length=max_length, rotary_scaling_factor=rotary_scaling_factor
    )
    weights = load_weights(checkpoint, device=device, dtype=dtype)
    encoder = make_encoder(checkpoint.spec, weights, backend, batch_invariant=batch_invariant)
    runner = Runner(encoder, device, pooling=checkpoint.pooling, dense=load_dense(checkpoint, device=device))
    tokenizer = Tokenizer.from_folder(checkpoint.folder, lower_case=checkpoint.lower_case)
    return Engine(checkpoint, tokenizer, runner, token_budget or TOKEN_BUDGET.get(device.type, 8192))


def make_encoder(
    spec: EncoderSpec, weights: EncoderWeights, attention: Attention, *, batch_invariant: bool = False
) -> Encoder:
    """An encoder that runs where its weights are."""
    row_block = CPU_ROW_BLOCK if weights.word.device.type == "cpu" else None
    return Encoder(spec, weights, attention=attention, row_block=row_block, batch_invariant=batch_invariant)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device is unknown: {device!r}; use auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device is not here: {device!r}, of {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return found


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype in DTYPES.values():
        return cast(torch.dtype, dtype)
    if dtype not in DTYPES:
        raise OptionError(f"dtype is unknown: {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
