"""accelerate: give a loaded transformers model a packed forward pass on its own weights; restore: undo it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from unpadded.checkpoint.families import find_family
from unpadded.checkpoint.family import IGNORED
from unpadded.checkpoint.spec import EncoderSpec, TensorSpec
from unpadded.errors import OptionError
from unpadded.execution.runner import Runner
from unpadded.integrations.padding import PaddedInputs
from unpadded.integrations.transformers import NO_ATTENTIONS, run_padded
from unpadded.loading import DTYPES
from unpadded.model.attention import attention_backend
from unpadded.model.encoder import Encoder
from unpadded.model.heads import Head
from unpadded.model.weights import assemble

logger = logging.getLogger("unpadded")

STATE = "_unpadded"  # the attribute of an accelerated model
OUTPUT_OPTIONS = ("output_hidden_states", "output_attentions", "return_dict")  # of a call, or else of the config


@dataclass
class _State:
    """The attribute that `accelerate` adds to a model."""

    modules: list[nn.Module]  # the model and those inside
    children: list[nn.Module | None]  # of the modules, as `_values` returns them
    logged_reasons: set[str] = field(default_factory=set)  # for the model's own forward pass; each is logged once
    runner: Runner | None = None  # made for the parameters at `pointers`
    pointers: list[int] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the runner, whose kernels cannot be copied; `_runner` makes another."""
        return {**vars(self), "runner": None}


def accelerate(model: Any) -> Any:
    """Replace the forward pass of a transformers encoder in place by a packed one on the same weights.

    Parameters that the kernels need stacked (q, k and v; gate and up) become views of one tensor, so memory does not
    grow. In training mode, with gradients, with hooks on or changes of its modules, and for arguments that are not
    supported, the model's own forward pass runs; a warning is logged once for each reason. OptionError or ConfigError,
    with the reason, for a model that is not supported. Returns the model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise OptionError(f"accelerate does not support {type(model).__name__}; pass a loaded transformers model")
    if STATE in vars(model):
        return model
    base = getattr(model, "base_model", model)
    if base is not model:
        raise OptionError(
            f"{type(model).__name__} has a head on its encoder; pass its base_model, the {type(base).__name__}"
        )
    modules = list(model.modules())
    state = _State(modules, _values(modules, "_modules"))
    _runner(model, state, _parameters(modules))
    vars(model)[STATE] = state
    # A bound method, so that the forward pass of a deep copy uses the copy.
    model.forward = MethodType(_forward, model)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`: restore the model's forward pass and separate its parameters' memory. Returns the model."""
    state = vars(model).pop(STATE, None)
    if state is None:
        raise OptionError(f"this {type(model).__name__} is not accelerated; call accelerate first")
    del model.forward
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
    return model


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **keywords: Any,
) -> Any:
    """Run the packed forward pass; see `UnpaddedModel.forward`."""
    state: _State = getattr(self, STATE)
    inputs = PaddedInputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    options = {name: getattr(self.config, name) for name in OUTPUT_OPTIONS}
    options |= {name: value for name, value in keywords.items() if value is not None}
    parameters = _parameters(state.modules)
    reason = _own_reason(state, parameters, inputs, options)
    if reason is not None:
        if reason not in state.logged_reasons:
            state.logged_reasons.add(reason)
            logger.warning("%s runs its own forward pass: %s", type(self).__name__, reason)
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        return type(self).forward(self, **given, **keywords)
    output = run_padded(_runner(self, state, parameters), inputs, options["output_hidden_states"])
    if getattr(self, "pooler", None) is not None:
        with torch.no_grad():
            output.pooler_output = self.pooler(output.last_hidden_state)
    return output if options["return_dict"] else output.to_tuple()


def _values(modules: list[nn.Module], attribute: str) -> list[Any]:
    """Return the values of an attribute that is a dict, such as _parameters, of all modules.

    It runs in every forward pass. Walking modules() and names in Python took 4.0 ms per pass, this takes 0.23 ms (197
    parameters, Intel Xeon, 2026-11).
    """
    return list(chain.from_iterable(map(dict.values, map(attrgetter(attribute), modules))))


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for parameter in _values(modules, "_parameters") if parameter is not None]


def _own_reason(
    state: _State, parameters: list[nn.Parameter], inputs: PaddedInputs, options: dict[str, Any]
) -> str | None:
    """Return what the packed forward pass would leave out of the call or of the model as it is now, or None."""
    model, *inner = state.modules
    if model.training:
        return "it is in training mode"
    tensors = (inputs.inputs_embeds, *parameters)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "gradients are recorded; call it under torch.no_grad()"
    if torch.is_autocast_enabled(parameters[0].device.type):
        return "autocast is enabled"
    if _values(state.modules, "_modules") != state.children:
        return "its modules have changed, as by an adapter or a parametrization"
    if replaced := [module for module in inner if "forward" in vars(module)]:
        return f"the forward of a {type(replaced[0]).__name__} was replaced"
    everywhere = torch.nn.modules.module
    hooks = [*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()]
    hooks += _values(inner, "_forward_hooks") + _values(inner, "_forward_pre_hooks")
    # those of transformers only record outputs; those of torch may prune weights
    if any(_package(hook) != "transformers" for hook in hooks):
        return "its modules have hooks"
    if options["output_attentions"]:
        return NO_ATTENTIONS
    if inputs.attention_mask is not None and inputs.attention_mask.ndim != 2:
        return f"attention_mask has {inputs.attention_mask.ndim} dimensions"
    unsupported = [name for name in options if name not in OUTPUT_OPTIONS]
    return f"{', '.join(unsupported)} is not supported" if unsupported else None


def _package(function: object) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _match(model: Any) -> tuple[EncoderSpec, dict[str, tuple[str, ...]]]:
    """Return the model's spec and its parameters by weight of the encoder; errors as in `accelerate`."""
    parameters = dict(model.named_parameters())
    config = model.config.to_dict()
    family = find_family(config, list(parameters))
    spec = replace(family.read_config(config), vocabulary=model.get_input_embeddings().weight.shape[0])
    specs = family.tensors(spec)
    names: dict[str, tuple[str, ...]] = {
        weight: next((found for found in tensor.alternatives if parameters.keys() >= set(found)), ())
        for weight, tensor in specs.items()
    }
    if reason := next(_mismatches(model, spec, specs, names, parameters), None):
        raise OptionError(f"{type(model).__name__} cannot be accelerated: {reason}; use it without accelerate")
    return spec, names


def _mismatches(
    model: nn.Module,
    spec: EncoderSpec,
    specs: Mapping[str, TensorSpec],
    names: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, Tensor],
) -> Iterator[str]:
    """Yield the reasons why the encoder cannot run on the parameters as they are; each assumes that none came before.

    specs, names: by name of a weight of the encoder, such as layers.0.qkv, its tensor and the parameters stacked in it.
    """
    if missing := [" + ".join(specs[weight].alternatives[0]) for weight, found in names.items() if not found]:
        yield f"it lacks the parameters {', '.join(missing[:4])}"
    if spec.experts is not None:
        yield f"{spec.family} has experts, which the kernels read transposed"
    if spec.kv_heads is not None:
        yield f"its {spec.heads} heads share {spec.kv_heads} keys and values, which the kernels read repeated"
    used = {name: specs[weight] for weight, found in names.items() for name in found}
    if reordered := [name for name, tensor in used.items() if name.endswith(tensor.up_before_gate)]:
        yield f"its {reordered[0]} stores up before gate, which the kernels read in the other order"
    unused = parameters.keys() - used.keys()
    if surplus := sorted(name for name in unused if not any(fnmatchcase(name, pattern) for pattern in IGNORED)):
        yield f"it has the additional parameters {', '.join(surplus[:4])}"
    for weight, found in names.items():
        shapes = [tuple(parameters[name].shape) for name in found]
        stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if stacked != specs[weight].shape:
            yield f"{', '.join(found)} have shapes {shapes}, stacked {stacked} instead of {specs[weight].shape}"
    kinds = {(parameters[name].dtype, parameters[name].device) for name in used}
    if len(kinds) > 1:
        yield f"its parameters have several dtypes or devices: {sorted(map(str, kinds))}"
    dtype, device = kinds.pop()
    if dtype not in DTYPES.values() or device.type == "meta":
        yield f"its parameters are {dtype} on {device}"
    for name, module in model.named_modules():
        if _package(type(module).forward) not in ("torch", "transformers", "transformers_modules"):
            yield f"{name or 'the model'} is a {type(module).__name__} with a forward pass of its own"


def _runner(model: Any, state: _State, parameters: list[nn.Parameter]) -> Runner:
    """Return the runner; a new one if a parameter has moved, as after `to`, `half` or a copy.

    The runner keeps the memory of its parameters alive, so that others cannot have the same addresses.
    """
    if state.runner is None or state.pointers != [parameter.data_ptr() for parameter in parameters]:
        spec, names = _match(model)  # again, because the vocabulary may have been resized
        tensors = {key: _stack_in_place([model.get_parameter(name) for name in found]) for key, found in names.items()}
        weights = assemble(spec, tensors)
        encoder = Encoder(spec, weights, attention_backend("auto", weights.word.device, weights.word.dtype))
        state.runner = Runner(encoder, weights.word.device, {"vector": Head("mean")})
        state.pointers = [parameter.data_ptr() for parameter in parameters]
    return state.runner


def _stack_in_place(parameters: list[nn.Parameter]) -> Tensor:
    """Return the parameters as one tensor, stacked along dim 0, and make them views of it."""
    if len(parameters) == 1:
        return parameters[0].detach()
    stacked = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, stacked.split([len(one) for one in parameters]), strict=True):
        parameter.data = rows
    return stacked
