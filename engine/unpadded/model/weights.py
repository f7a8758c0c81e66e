"""safetensors -> device: each tensor read in pieces, cast, and written into its rows of the fused destination.

The pieces pass through one staging buffer that stays in the cache. On a 547 MB fp32 file with a warm page cache (2 CPU
cores, torch 2.13, bench/loading.py) this takes, as fp16, 0.44 x the time of reading the file and casting it and 0.50 x
the file in memory; as fp32, 1.05 x and 1.00 x. Copied out of a memory map the same takes 1.5 x and 2.0 x the file in
memory, because the pages it touches stay resident.

For a CPU each layer's matrices are then laid out as its products read them, see `prepacked`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.safetensors_header import StoredTensor, read_header, read_headers
from unpadded.checkpoint.spec import EncoderSpec, TensorSpec
from unpadded.errors import WeightsError
from unpadded_kernels.fp8 import quantize_rows_reference
from unpadded_kernels.linear_prepacked import PrepackedWeight, prepacks

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# torch's grain size: an operation on no more elements than this runs on the calling thread. Longer pieces make threads
# meet hundreds of times a load, which took 0.08 s instead of 0.18 s on an idle machine, and 1 to 7 s on a busy one.
PIECE = 32_768

Matrix: TypeAlias = Tensor | PrepackedWeight
MATRICES = ("qkv", "out", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer; matrices are [rows, columns] as torch.nn.Linear keeps them, on a CPU also `prepacked`."""

    qkv: Matrix  # [3 * hidden, hidden], rows ordered three, head, dim
    qkv_scale: Tensor | None = None  # [3 * hidden] fp32, of each row where qkv is in e4m3 (see `quantized`)
    qkv_bias: Tensor | None = None
    out: Matrix  # [hidden, hidden]
    out_bias: Tensor | None = None
    attention_norm: Tensor
    attention_norm_bias: Tensor  # of every norm: zeros where the family has none
    up: Matrix  # [up_rows, hidden]; gated: the gate's rows, then the up rows; experts: [experts, up_rows, hidden]
    up_scale: Tensor | None = None  # [up_rows] fp32 where up is in e4m3
    up_bias: Tensor | None = None
    down: Matrix  # [hidden, intermediate]; experts: [experts, hidden, intermediate]
    down_bias: Tensor | None = None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor
    qk_norm: Tensor | None = None  # [2 * hidden], q's then k's
    qk_norm_bias: Tensor | None = None
    inner_norm: Tensor | None = None
    inner_norm_bias: Tensor | None = None
    router: Tensor | None = None  # [experts, hidden]


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """Every tensor of the encoder, on one device, in one dtype."""

    word: Tensor  # [vocabulary, hidden]
    token_type: Tensor | None  # [token_types, hidden]
    position: Tensor | None  # [position_rows, hidden]
    norm: Tensor
    norm_bias: Tensor
    layers: tuple[LayerWeights, ...]
    # slot -> the factors of its change, of every task: rows [tasks, rows, rank], columns [tasks, n * rank, columns], of
    # the n matrices that lie stacked in the slot where each has factors of its own, else n = 1
    lora: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def load_weights(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, prepack: bool = False
) -> EncoderWeights:
    """The encoder's tensors on `device` in `dtype`; prepack: as `prepacked` gives them.

    WeightsError when tensors are missing, surplus or mis-shaped (all of them listed), when one is not finite, or when a
    value does not fit `dtype`.
    """
    spec = checkpoint.spec
    family = FAMILIES[spec.family]
    slots = family.tensors(spec)
    # where each adapter has a file, so have its slots, and the files are stacked
    apart = {slot: slots.pop(slot) for slot in list(slots) if slot.startswith("lora.") and checkpoint.lora_files}
    found = assign(slots, read_headers(checkpoint.weight_files), family.prefixes, family.ignored)
    files = [
        assign(apart, read_header(file).values(), family.prefixes, family.ignored) for file in checkpoint.lora_files
    ]
    loader = _Loader(device, dtype)
    tensors = {slot: loader.load(slots[slot].shape, parts) for slot, parts in found.items()}
    for slot, one in apart.items():
        stored = loader.load((len(files), *one.shape), tuple(part for file in files for part in file[slot]))
        tensors[slot] = stored.mT if one.transposed else stored
    return assemble(spec, tensors, prepack=prepack)


def assemble(spec: EncoderSpec, tensors: dict[str, Tensor], *, prepack: bool = False) -> EncoderWeights:
    """The weights of an encoder from the tensor of each slot; those of layers are taken out.

    prepack: as `prepacked` gives them.
    """
    if not spec.norm_bias:
        tensors |= {
            f"{slot}_bias": torch.zeros_like(tensor) for slot, tensor in tensors.items() if slot.endswith("norm")
        }
    for index in spec.experts.layers if spec.experts else ():
        up, down = f"layers.{index}.up", f"layers.{index}.down"
        tensors[up] = tensors[up].view(-1, spec.up_rows, spec.hidden)
        # stored as [experts * intermediate, hidden]: turned once here, one layer at a time
        tensors[down] = tensors[down].view(-1, spec.intermediate, spec.hidden).mT.contiguous()
    for index in range(spec.layers) if spec.kv_heads else ():
        q, kv = tensors.pop(f"layers.{index}.q"), tensors.pop(f"layers.{index}.kv")
        tensors[f"layers.{index}.qkv"] = _with_a_copy_each(q, kv, spec)

    def layer(index: int) -> LayerWeights:
        start = f"layers.{index}."
        slots = [slot for slot in tensors if slot.startswith(start)]
        # taken out, so that a matrix goes as soon as it is prepacked
        whole = LayerWeights(**{slot.removeprefix(start): tensors.pop(slot) for slot in slots})
        return _prepacked(spec, whole) if prepack else whole

    return EncoderWeights(
        word=tensors["word"],
        token_type=tensors.get("token_type"),
        position=tensors.get("position"),
        norm=tensors["norm"],
        norm_bias=tensors["norm_bias"],
        layers=tuple(layer(index) for index in range(spec.layers)),
        lora={
            slot.removeprefix("lora.").removesuffix(".B"): (rows, tensors[slot.removesuffix("B") + "A"])
            for slot, rows in tensors.items()
            if slot.startswith("lora.") and slot.endswith(".B")
        },
    )


def _with_a_copy_each(q: Tensor, kv: Tensor, spec: EncoderSpec) -> Tensor:
    """[3 * hidden, hidden] from q and the keys and values that several heads share."""
    sharing = 2 * len(q) // len(kv)  # heads, a key
    copies = kv.view(2, -1, 1, spec.head_dim, spec.hidden).expand(-1, -1, sharing, -1, -1)
    return torch.cat([q, copies.reshape(-1, spec.hidden)])


def prepacked(spec: EncoderSpec, weights: EncoderWeights) -> EncoderWeights:
    """The weights with the layers' matrices as a CPU multiplies them; experts, and what adapters change, stay plain."""
    return replace(weights, layers=tuple(_prepacked(spec, layer) for layer in weights.layers))


def _prepacked(spec: EncoderSpec, layer: LayerWeights) -> LayerWeights:
    if spec.lora is not None:
        return layer
    matrices = {name: matrix for name in MATRICES if isinstance(matrix := getattr(layer, name), Tensor)}
    found: dict[str, Any] = {
        name: PrepackedWeight(matrix, spec.activation if name == "up" else None)
        for name, matrix in matrices.items()
        if matrix.dim() == 2 and prepacks(matrix)
    }
    return replace(layer, **found)


def plain_weights(weights: EncoderWeights) -> EncoderWeights:
    """The weights with plain matrices."""

    def layer(whole: LayerWeights) -> LayerWeights:
        matrices = {name: getattr(whole, name) for name in MATRICES}
        found = {name: matrix.plain() for name, matrix in matrices.items() if isinstance(matrix, PrepackedWeight)}
        return replace(whole, **found)

    return replace(weights, layers=tuple(layer(whole) for whole in weights.layers))


def quantized(weights: EncoderWeights) -> EncoderWeights:
    """The weights with those of the products that follow a LayerNorm in e4m3; experts stay as they are."""

    def layer(whole: LayerWeights) -> LayerWeights:
        assert isinstance(whole.qkv, Tensor) and isinstance(whole.up, Tensor), "prepacked"
        qkv, qkv_scale = quantize_rows_reference(whole.qkv)
        up, up_scale = (whole.up, None) if whole.router is not None else quantize_rows_reference(whole.up)
        return replace(whole, qkv=qkv, qkv_scale=qkv_scale, up=up, up_scale=up_scale)

    return replace(weights, layers=tuple(layer(whole) for whole in weights.layers))


def load_dense(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor | None, Literal["identity", "tanh"]], ...]:
    """(weight [out_features, in_features], bias or None, activation) of each Dense module after the pooling."""
    loader = _Loader(device, dtype)
    modules = []
    for dense in checkpoint.dense:
        slots = {"weight": TensorSpec((dense.out_features, dense.in_features), (("linear.weight",),))}
        if dense.bias:
            slots["bias"] = TensorSpec((dense.out_features,), (("linear.bias",),))
        found = assign(slots, read_header(dense.weight_file).values(), (), ())
        tensors = {slot: loader.load(slots[slot].shape, parts) for slot, parts in found.items()}
        modules.append((tensors["weight"], tensors.get("bias"), dense.activation))
    return tuple(modules)


def assign(
    slots: Mapping[str, TensorSpec], stored: Iterable[StoredTensor], prefixes: tuple[str, ...], ignored: tuple[str, ...]
) -> dict[str, tuple[StoredTensor, ...]]:
    """The stored tensors that make up each slot; WeightsError listing everything that does not fit."""
    problems = []
    unused: dict[str, StoredTensor] = {}
    paths = set()
    for tensor in stored:
        paths.add(tensor.path)
        name = _without_prefix(tensor.name, prefixes)
        if name in unused:
            problems.append(f"stored twice: {unused[name].name} and {tensor.name}")
        unused[name] = tensor

    found = {}
    for slot, wanted in slots.items():
        nearest = max(wanted.alternatives, key=lambda names: sum(name in unused for name in names) / len(names))
        missing = [name for name in nearest if name not in unused]
        problems += [f"missing: {name} {_part_shape(wanted, nearest)}" for name in missing]
        parts = tuple(unused.pop(name) for name in nearest if name in unused)
        for part in parts:
            if part.shape != _part_shape(wanted, nearest):
                problems.append(f"mis-shaped: {part.name} {part.shape} instead of {_part_shape(wanted, nearest)}")
            if part.dtype not in DTYPES:
                problems.append(f"stored as {part.dtype} instead of {', '.join(DTYPES)}: {part.name}")
        found[slot] = tuple(half for part in parts for half in _in_order(part, wanted))

    surplus = [name for name in unused if not any(fnmatchcase(name, pattern) for pattern in ignored)]
    problems += [f"surplus: {unused[name].name} {unused[name].shape}" for name in surplus]
    if problems:
        files = ", ".join(sorted(str(path) for path in paths)) or "no file"
        raise WeightsError(
            f"the tensors of {files} are not those of the configuration:\n  "
            + "\n  ".join(problems)
            + "\ncheck that config.json and the weights belong together"
        )
    return found


def _part_shape(slot: TensorSpec, names: tuple[str, ...]) -> tuple[int, ...]:
    return (slot.shape[0] // len(names), *slot.shape[1:])


def _in_order(part: StoredTensor, slot: TensorSpec) -> tuple[StoredTensor, ...]:
    """The tensor, or its two halves in the slot's order where the checkpoint has them the other way round."""
    if not part.name.endswith(slot.up_before_gate):
        return (part,)
    shape, middle = (part.shape[0] // 2, *part.shape[1:]), (part.start + part.stop) // 2
    return replace(part, shape=shape, start=middle), replace(part, shape=shape, stop=middle)


def _without_prefix(name: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


class _Loader:
    """Reads tensors through one staging buffer into new tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.staging = torch.empty(PIECE * 8, dtype=torch.uint8)  # the widest stored elements are float64
        self.cast = torch.empty(PIECE, dtype=dtype)

    def load(self, shape: tuple[int, ...], parts: tuple[StoredTensor, ...]) -> Tensor:
        """`parts` stacked along dim 0, as one tensor of `shape`."""
        destination = torch.empty(shape, device=self.device, dtype=self.dtype)
        rows = destination.view(-1)
        for part in parts:
            size = math.prod(part.shape)
            self._fill(rows[:size], part)
            rows = rows[size:]
        return destination

    def _fill(self, destination: Tensor, part: StoredTensor) -> None:
        stored_dtype = DTYPES[part.dtype]
        with part.path.open("rb", buffering=0) as file:
            file.seek(part.start)
            for start in range(0, destination.numel(), PIECE):
                rows = destination[start : start + PIECE]
                stored = self.staging[: rows.numel() * stored_dtype.itemsize]
                _read(file, stored, part.path)
                stored = stored.view(stored_dtype)
                piece = stored if stored_dtype == self.dtype else self.cast[: rows.numel()].copy_(stored)
                if not _finite(piece):
                    raise self._not_finite(part, stored)
                rows.copy_(piece)

    def _not_finite(self, part: StoredTensor, stored: Tensor) -> WeightsError:
        if not _finite(stored):
            return WeightsError(f"{part.name} in {part.path} holds values that are not finite; replace the file")
        largest = stored.abs().max().item()
        return WeightsError(
            f"{part.name} in {part.path} does not fit {self.dtype}: it holds {largest:.6g}, "
            f"the limit is {torch.finfo(self.dtype).max:.6g}; load it with dtype='float32'"
        )


def _read(file: FileIO, destination: Tensor, path: Path) -> None:
    """The next bytes of the file, as many as `destination` has."""
    view = memoryview(destination.numpy().data)
    while view:
        read = file.readinto(view)
        if not read:
            raise WeightsError(f"{path} ends at byte {file.tell()}, inside a tensor; download it again")
        view = view[read:]


def _finite(piece: Tensor) -> bool:
    # a sum is one pass in the cache (0.02 s for 547 MB); it may overflow by itself, so it only acquits
    return math.isfinite(piece.sum().item()) or bool(piece.isfinite().all())
