"""safetensors -> device: each tensor is read in pieces, cast, and written into its rows of the fused destination.

The pieces pass through one staging buffer that stays in the cache. bench/NOTES.md has the cost of safetensors' package.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from unpadded.checkpoint.family import IGNORED, remove_prefixes
from unpadded.checkpoint.safetensors_header import StoredTensor
from unpadded.checkpoint.spec import TensorSpec
from unpadded.errors import WeightsError

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements per piece: torch's grain size, up to which an operation runs on the calling thread (see bench/NOTES.md).
PIECE = 32_768


def find_tensors(
    specs: Mapping[str, TensorSpec], stored: Sequence[StoredTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Return the stored tensors that each spec's tensor is made of; WeightsError listing everything that does not fit.

    PREFIXES are removed from stored names, and those that IGNORED matches need not be in a spec.
    """
    problems = []
    unused: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = remove_prefixes(tensor.name)
        if name in unused:
            problems.append(f"stored twice: {unused[name].name} and {tensor.name}")
        unused[name] = tensor

    found = {}
    for tensor_name, wanted in specs.items():
        names = max(wanted.alternatives, key=lambda names: sum(name in unused for name in names) / len(names))
        shape = (wanted.shape[0] // len(names), *wanted.shape[1:])
        problems += [f"missing: {name} {shape}" for name in names if name not in unused]
        parts = [unused.pop(name) for name in names if name in unused]
        for part in parts:
            if part.shape != shape:
                problems.append(f"mis-shaped: {part.name} {part.shape} instead of {shape}")
            if part.dtype not in STORED_DTYPES:
                problems.append(f"stored as {part.dtype} instead of {', '.join(STORED_DTYPES)}: {part.name}")
        found[tensor_name] = tuple(half for part in parts for half in _gate_first(part, wanted))

    surplus = [name for name in unused if not any(fnmatchcase(name, pattern) for pattern in IGNORED)]
    problems += [f"surplus: {unused[name].name} {unused[name].shape}" for name in surplus]
    if problems:
        files = ", ".join(sorted({str(tensor.path) for tensor in stored})) or "no file"
        raise WeightsError(
            f"the tensors of {files} do not match the configuration:\n  "
            + "\n  ".join(problems)
            + "\ncheck that config.json and the weights belong together"
        )
    return found


def _gate_first(part: StoredTensor, wanted: TensorSpec) -> tuple[StoredTensor, ...]:
    """Return the tensor, or its two halves exchanged if the checkpoint stores up before gate."""
    if not part.name.endswith(wanted.up_before_gate):
        return (part,)
    shape, middle = (part.shape[0] // 2, *part.shape[1:]), (part.start + part.stop) // 2
    return replace(part, shape=shape, start=middle), replace(part, shape=shape, stop=middle)


class TensorLoader:
    """Reads stored tensors into new tensors on a device, through one staging buffer."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._staging = torch.empty(PIECE * 8, dtype=torch.uint8)  # bytes; the widest stored elements are float64
        self._cast = torch.empty(PIECE, dtype=dtype)

    def load(self, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> Tensor:
        """Return `parts`, stacked along dim 0, as one tensor of `shape`; WeightsError for a value that does not fit."""
        destination = torch.empty(shape, device=self._device, dtype=self._dtype)
        sizes = [math.prod(part.shape) for part in parts]
        for part, rows in zip(parts, destination.view(-1).split(sizes), strict=True):
            self._read(part, rows)
        return destination

    def _read(self, part: StoredTensor, destination: Tensor) -> None:
        stored_dtype = STORED_DTYPES[part.dtype]
        with part.path.open("rb") as file:
            file.seek(part.start)
            for start in range(0, destination.numel(), PIECE):
                target = destination[start : start + PIECE]
                stored = self._staging[: target.numel() * stored_dtype.itemsize]
                if file.readinto(stored.numpy().data) < stored.numel():
                    raise WeightsError(f"{part.path} ends at byte {file.tell()}, inside a tensor; download it again")
                stored = stored.view(stored_dtype)
                piece = stored if stored_dtype == self._dtype else self._cast[: target.numel()].copy_(stored)
                if not _is_finite(piece):
                    raise self._not_finite(part, stored)
                target.copy_(piece)

    def _not_finite(self, part: StoredTensor, stored: Tensor) -> WeightsError:
        if not _is_finite(stored):
            return WeightsError(f"{part.name} in {part.path} contains values that are not finite; replace the file")
        largest = stored.abs().max().item()
        return WeightsError(
            f"{part.name} in {part.path} does not fit {self._dtype}: it contains {largest:.6g}, "
            f"the limit is {torch.finfo(self._dtype).max:.6g}; load it with dtype='float32'"
        )


def _is_finite(piece: Tensor) -> bool:
    # one pass in the cache (0.02 s for 547 MB); a sum of finite values may overflow, so the second test decides
    return math.isfinite(piece.sum().item()) or bool(piece.isfinite().all())
