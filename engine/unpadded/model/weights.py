"""The encoder's weights: loaded from a checkpoint, assembled into layers, and changed into other kinds of linears.

Files are read by `tensor_loader`: loading 547 MB of fp32 through the safetensors package instead took 1.8 to 1.9 times
as long, with the same private memory, and left the whole file resident (bench/loading.py on 2 busy Xeon cores).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.safetensors_header import read_header, read_headers
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec
from unpadded.model.layer import MLP, QKV, ExpertMLP, InnerNorm, Layer, LayerNorm, Norm, PreLayerNorm, QKNorm, RMSNorm
from unpadded.model.linear import AnyLinear, Float8Linear, InvariantLinear, Linear, PrepackedLinear
from unpadded.model.tensor_loader import TensorLoader, find_tensors
from unpadded_kernels.linear_cpu import can_prepack


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """Every tensor of the encoder, on one device, in one dtype."""

    word: Tensor  # [vocabulary, hidden]
    token_type: Tensor | None  # [token_types, hidden]
    position: Tensor | None  # [position_rows, hidden]
    norm: LayerNorm | RMSNorm
    layers: tuple[Layer, ...]
    # tensor name -> the LoRA factors of all tasks: B [tasks, rows, rank] and A [tasks, n * rank, columns]; n is 1, or 3
    # where q, k and v have separate factors
    lora: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def load_weights(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, prepack: bool = False
) -> EncoderWeights:
    """Load the encoder's tensors to `device` in `dtype`; prepack: as `prepacked_weights` does, one layer at a time.

    WeightsError when tensors are missing, surplus or mis-shaped (all of them listed), when one is not finite, or when a
    value does not fit `dtype`.
    """
    spec = checkpoint.spec
    family = FAMILIES[spec.family]
    specs = family.tensors(spec)
    # with one LoRA file per task, the specs describe one task's tensors, and the files' tensors are stacked
    lora_names = [name for name in specs if name.startswith("lora.")] if checkpoint.lora_files else []
    lora_specs = {name: specs.pop(name) for name in lora_names}
    found = find_tensors(specs, read_headers(checkpoint.weight_files), family.prefixes, family.ignored)
    per_task = [
        find_tensors(lora_specs, read_header(file).values(), family.prefixes, family.ignored)
        for file in checkpoint.lora_files
    ]
    loader = TensorLoader(device, dtype)
    tensors = {name: loader.load(specs[name].shape, parts) for name, parts in found.items()}
    for name, wanted in lora_specs.items():
        stacked = loader.load((len(per_task), *wanted.shape), [part for task in per_task for part in task[name]])
        tensors[name] = stacked.mT if wanted.transposed else stacked
    return assemble(spec, tensors, prepack=prepack)


def load_dense(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor | None, Literal["identity", "tanh"]], ...]:
    """Return (weight [out_features, in_features], bias or None, activation) of each Dense module after the pooling."""
    loader = TensorLoader(device, dtype)
    modules = []
    for dense in checkpoint.dense:
        specs = {"weight": TensorSpec((dense.out_features, dense.in_features), (("linear.weight",),))}
        if dense.bias:
            specs["bias"] = TensorSpec((dense.out_features,), (("linear.bias",),))
        found = find_tensors(specs, read_header(dense.weight_file).values(), (), ())
        tensors = {name: loader.load(specs[name].shape, parts) for name, parts in found.items()}
        modules.append((tensors["weight"], tensors.get("bias"), dense.activation))
    return tuple(modules)


def assemble(spec: EncoderSpec, tensors: dict[str, Tensor], *, prepack: bool = False) -> EncoderWeights:
    """Return the weights made of tensors by name (see `Family.tensors`); prepack: as `prepacked_weights` does.

    The layers' tensors are removed from `tensors`, so that a plain matrix is freed as soon as it is prepacked.
    """
    layers = []
    for index in range(spec.layers):
        prefix = f"layers.{index}."
        names = [name for name in tensors if name.startswith(prefix)]
        layer = _layer(spec, {name.removeprefix(prefix): tensors.pop(name) for name in names})
        layers.append(_prepacked(spec, layer) if prepack else layer)
    lora = [name.removesuffix(".B") for name in tensors if name.startswith("lora.") and name.endswith(".B")]
    return EncoderWeights(
        word=tensors["word"],
        token_type=tensors.get("token_type"),
        position=tensors.get("position"),
        norm=_norm(spec, tensors, "norm"),
        layers=tuple(layers),
        lora={name.removeprefix("lora."): (tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in lora},
    )


def _layer(spec: EncoderSpec, tensors: dict[str, Tensor]) -> Layer:
    """tensors: those of one layer, by name without the layer's prefix."""

    def linear(name: str, activation: Activation | None = None) -> Linear:
        return Linear(weight=tensors[name], bias=tensors.get(f"{name}_bias"), activation=activation)

    if spec.kv_heads is not None:
        tensors["qkv"] = _qkv_of_shared_heads(spec, tensors.pop("q"), tensors.pop("kv"))
    qk_norm = None
    if "qk_norm" in tensors:
        qk_norm = QKNorm(weight=tensors["qk_norm"], bias=_norm_bias(tensors, "qk_norm"), eps=spec.norm_eps)
    attention_norm: Norm = _norm(spec, tensors, "attention_norm")
    if "inner_norm" in tensors:
        attention_norm = InnerNorm(inner=_norm(spec, tensors, "inner_norm"), outer=attention_norm)
    mlp: MLP | ExpertMLP
    if "router" in tensors:
        mlp = _expert_mlp(spec, tensors)
    else:
        mlp = MLP(up=linear("up", spec.activation), down=linear("down"))
    return Layer(
        qkv=QKV(linear=linear("qkv"), norm=qk_norm, heads=spec.heads),
        out=linear("out"),
        attention_norm=attention_norm,
        mlp=mlp,
        mlp_norm=_norm(spec, tensors, "mlp_norm"),
    )


def _norm(spec: EncoderSpec, tensors: Mapping[str, Tensor], name: str) -> LayerNorm | RMSNorm:
    if spec.rms_norm:
        return RMSNorm(weight=tensors[name], eps=spec.norm_eps)
    kind = PreLayerNorm if spec.prenorm else LayerNorm
    return kind(weight=tensors[name], bias=_norm_bias(tensors, name), eps=spec.norm_eps)


def _norm_bias(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the bias, zeros in a family that has none."""
    bias = tensors.get(f"{name}_bias")
    return torch.zeros_like(tensors[name]) if bias is None else bias


def _expert_mlp(spec: EncoderSpec, tensors: Mapping[str, Tensor]) -> ExpertMLP:
    assert spec.experts is not None
    return ExpertMLP(
        router=tensors["router"],
        up=tensors["up"].view(-1, spec.up_rows, spec.hidden),
        # stored as [experts * intermediate, hidden]: transposed once here, one layer at a time
        down=tensors["down"].view(-1, spec.intermediate, spec.hidden).mT.contiguous(),
        bias=tensors["down_bias"],
        top_k=spec.experts.top_k,
        activation=spec.activation,
    )


def _qkv_of_shared_heads(spec: EncoderSpec, q: Tensor, kv: Tensor) -> Tensor:
    """Return [3 * hidden, hidden], with one copy of each key and value per head that shares it."""
    sharing = 2 * len(q) // len(kv)
    copies = kv.view(2, -1, 1, spec.head_dim, spec.hidden).expand(-1, -1, sharing, -1, -1)
    return torch.cat([q, copies.reshape(-1, spec.hidden)])


def prepacked_weights(spec: EncoderSpec, weights: EncoderWeights) -> EncoderWeights:
    """Return the weights with linears in oneDNN's layout on a CPU; those that LoRA may rewrite stay plain."""
    return replace(weights, layers=tuple(_prepacked(spec, layer) for layer in weights.layers))


def _prepacked(spec: EncoderSpec, layer: Layer) -> Layer:
    def change(_: str, linear: AnyLinear) -> AnyLinear:
        if spec.lora is None and isinstance(linear, Linear) and can_prepack(linear.weight):
            return PrepackedLinear.from_linear(linear)
        return linear

    return layer.map_linears(change)


def plain_weights(weights: EncoderWeights) -> EncoderWeights:
    """Undo `prepacked_weights`."""

    def change(_: str, linear: AnyLinear) -> AnyLinear:
        return linear.to_linear() if isinstance(linear, PrepackedLinear) else linear

    return replace(weights, layers=tuple(layer.map_linears(change) for layer in weights.layers))


def float8_weights(weights: EncoderWeights) -> EncoderWeights:
    """Return the weights with the linears that follow a norm, qkv and up, in e4m3; experts are not changed."""

    def change(name: str, linear: AnyLinear) -> AnyLinear:
        return Float8Linear.from_linear(linear) if name in ("qkv", "up") and isinstance(linear, Linear) else linear

    return replace(weights, layers=tuple(layer.map_linears(change) for layer in weights.layers))


def invariant_weights(weights: EncoderWeights) -> EncoderWeights:
    """Return the weights with `InvariantLinear` for `Linear`; the other kinds are invariant already."""

    def change(_: str, linear: AnyLinear) -> AnyLinear:
        return InvariantLinear(**vars(linear)) if isinstance(linear, Linear) else linear

    return replace(weights, layers=tuple(layer.map_linears(change) for layer in weights.layers))
