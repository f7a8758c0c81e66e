"""The encoder's weights: loaded from a checkpoint, assembled into layers, and changed into other kinds of linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.family import remove_prefixes
from unpadded.checkpoint.modules import Dense
from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.safetensors_header import read_headers
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec
from unpadded.model.layer import MLP, QKV, ExpertMLP, HeadLayer, Layer, LayerNorm, Norm, RMSNorm
from unpadded.model.linear import AnyLinear, Linear
from unpadded.model.tensor_loader import TensorLoader, find_tensors
from unpadded_kernels import avx512
from unpadded_kernels.avx512 import PackedLinear

# Returns another kind of linear in the place of one, given its name, such as layers.3.qkv.
ChangeLinear: TypeAlias = Callable[[str, AnyLinear], AnyLinear]


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """Every tensor of the encoder, on one device, in one dtype."""

    word: Tensor  # [vocabulary, hidden]
    token_type: Tensor | None  # [token_types, hidden]
    position: Tensor | None  # [position_rows, hidden]
    position_bias: Tensor | None  # [buckets, heads]
    norm: Norm
    layers: tuple[Layer, ...]
    # tensor name -> the LoRA factors of all tasks: B [tasks, rows, rank] and A [tasks, rank, columns]
    lora: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def map_linears(self, change: ChangeLinear) -> EncoderWeights:
        """Return the weights with change(name, linear) in the place of each linear."""
        layers = (layer.map_linears(f"layers.{index}.", change) for index, layer in enumerate(self.layers))
        return replace(self, layers=tuple(layers))


def load_weights(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, change: ChangeLinear | None = None
) -> EncoderWeights:
    """Load the encoder's tensors to `device` in `dtype`; change: see `assemble`.

    WeightsError when tensors are missing, surplus or mis-shaped (all of them listed), when one is not finite, or when a
    value does not fit `dtype`.
    """
    spec = checkpoint.spec
    specs = FAMILIES[spec.family].tensors(spec)
    heads = checkpoint.tokens.dense if checkpoint.tokens else ()
    of_heads = tuple(f"{dense.name}." for dense in heads if dense.weight_files == checkpoint.weight_files)
    stored = [tensor for tensor in read_headers(checkpoint.weight_files) if not tensor.name.startswith(of_heads)]
    found = find_tensors(specs, stored)
    loader = TensorLoader(device, dtype)
    tensors = {name: loader.load(specs[name].shape, parts) for name, parts in found.items()}
    return assemble(spec, tensors, change)


def load_dense(modules: tuple[Dense, ...], *, device: torch.device) -> tuple[HeadLayer, ...]:
    """Load layers after the encoder, in fp32; WeightsError as in `load_weights`."""
    loader = TensorLoader(device, torch.float32)
    layers = []
    for dense in modules:
        prefix = dense.name and f"{dense.name}."
        weight, bias = (f"{prefix}weight", f"{prefix}gamma", dense.name), (f"{prefix}bias", f"{prefix}beta")
        specs = {"weight": TensorSpec(dense.shape, tuple((name,) for name in weight))}
        specs |= {"bias": TensorSpec(dense.shape[:1], tuple((name,) for name in bias))} if dense.bias else {}
        stored = read_headers(dense.weight_files)
        own = [tensor for tensor in stored if f"{remove_prefixes(tensor.name)}.".startswith(prefix)]
        found = find_tensors(specs, own)
        tensors = {name: loader.load(specs[name].shape, parts) for name, parts in found.items()}
        layers.append(HeadLayer(tensors["weight"], tensors.get("bias"), dense.activation, dense.eps))
    return tuple(layers)


def assemble(spec: EncoderSpec, tensors: dict[str, Tensor], change: ChangeLinear | None = None) -> EncoderWeights:
    """Return the weights made of tensors by name (see `Family.tensors`), with change(name, linear) for each linear.

    The layers' tensors are removed from `tensors`, so that a plain matrix is freed as soon as it is changed. Those that
    LoRA may rewrite stay plain.
    """
    layers = []
    for index in range(spec.layers):
        prefix = f"layers.{index}."
        names = [name for name in tensors if name.startswith(prefix)]
        layer = _layer(spec, {name.removeprefix(prefix): tensors.pop(name) for name in names})
        layers.append(layer.map_linears(prefix, change) if change and spec.lora is None else layer)
    lora = [name.removesuffix(".B") for name in tensors if name.startswith("lora.") and name.endswith(".B")]
    return EncoderWeights(
        word=tensors["word"],
        token_type=tensors.get("token_type"),
        position=tensors.get("position"),
        position_bias=tensors.get("position_bias"),
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
    experts = _expert_mlp(spec, tensors) if "router" in tensors else None
    return Layer(
        qkv=QKV(linear=linear("qkv"), heads=spec.heads),
        out=linear("out"),
        attention_norm=_norm(spec, tensors, "attention_norm"),
        mlp=experts or MLP(up=linear("up", spec.activation), down=linear("down")),
        mlp_norm=_norm(spec, tensors, "mlp_norm"),
    )


def _norm(spec: EncoderSpec, tensors: Mapping[str, Tensor], name: str) -> Norm:
    if spec.rms_norm:
        return RMSNorm(weight=tensors[name], eps=spec.norm_eps)
    bias = tensors[f"{name}_bias"] if "norm" in spec.biases else torch.zeros_like(tensors[name])
    return LayerNorm(weight=tensors[name], bias=bias, eps=spec.norm_eps, prenorm=spec.prenorm)


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


def packed_linear(_: str, linear: AnyLinear) -> AnyLinear:
    """Return a linear packed for AVX-512 if that is possible."""
    if not isinstance(linear, Linear) or not avx512.can_pack(linear.weight):
        return linear
    return PackedLinear(linear.weight, linear.bias, linear.activation)


def plain_weights(weights: EncoderWeights) -> EncoderWeights:
    """Undo `packed_linear`."""

    def plain(_: str, linear: AnyLinear) -> AnyLinear:
        if not isinstance(linear, PackedLinear):
            return linear
        return Linear(weight=linear.unpack(), bias=linear.bias, activation=cast(Activation | None, linear.activation))

    return weights.map_linears(plain)


def int8_linear(name: str, linear: AnyLinear) -> AnyLinear:
    """Return a linear in 8-bit integers. Attention follows that of q, k and v: in bf16 where that is faster."""
    if not isinstance(linear, Linear):
        return linear
    dtype = torch.bfloat16 if name.endswith(".qkv") and avx512.has_fast_bf16() else torch.float32
    return PackedLinear(linear.weight, linear.bias, linear.activation, int8=dtype)


def invariant_weights(weights: EncoderWeights) -> EncoderWeights:
    """Return the weights with every `Linear` invariant; the other kinds are invariant already."""
    return weights.map_linears(lambda _, one: replace(one, invariant=True) if isinstance(one, Linear) else one)
