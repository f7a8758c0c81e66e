"""accelerate: give a loaded transformers model a packed forward pass on its own weights; restore: undo it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.spec import EncoderSpec, TensorSpec
from unpadded.errors import OptionError
from unpadded.execution.runner import Runner
from unpadded.integrations.transformers import NO_ATTENTIONS, run_padded
from unpadded.loading import DTYPES, make_encoder
from unpadded.model.attention import attention_backend
from unpadded.model.weights import assemble

logger = logging.getLogger("unpadded")

STATE = "_unpadded"  # the attribute of an accelerated model


@dataclass
class _State:
    """The attribute that `accelerate` adds to a model."""

    spec: EncoderSpec
    parameter_names: dict[str, tuple[str, ...]]  # weight of the encoder -> parameters stacked in it
    logged_reasons: set[str] = field(default_factory=set)  # for the model's own forward pass; each is logged once
    runner: Runner | None = None  # made for the parameters at `pointers`
    pointers: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the runner, whose kernels cannot be copied; `_runner` makes another."""
        return {**vars(self), "runner": None}


def accelerate(model: Any) -> Any:
    """Replace the forward pass of a transformers encoder in place by a packed one on the same weights.

    Parameters that the kernels need stacked (q, k and v; gate and up) become views of one tensor, so memory does not
    grow. In training mode, and for arguments that are not supported, the model's own forward pass runs; a warning is
    logged once for each reason. OptionError, with the reason, for a model that is not supported. Returns the model.
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
    state = _State(*_match(model))
    _runner(model, state)
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
    for names in state.parameter_names.values():
        if len(names) > 1:
            for name in names:
                parameter = model.get_parameter(name)
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
    unsupported = {key: value for key, value in keywords.items() if value is not None}
    hidden_states = unsupported.pop("output_hidden_states", self.config.output_hidden_states)
    attentions = unsupported.pop("output_attentions", self.config.output_attentions)
    return_dict = unsupported.pop("return_dict", self.config.return_dict)
    reason = None
    if self.training:
        reason = "it is in training mode"
    elif attentions:
        reason = NO_ATTENTIONS
    elif attention_mask is not None and attention_mask.ndim != 2:
        reason = f"attention_mask has {attention_mask.ndim} dimensions"
    elif unsupported:
        reason = f"{', '.join(unsupported)} is not supported"
    if reason is not None:
        if reason not in state.logged_reasons:
            state.logged_reasons.add(reason)
            logger.warning("%s runs its own forward pass: %s", type(self).__name__, reason)
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        keywords |= {key: value for key, value in inputs.items() if value is not None}
        return type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, **keywords)
    output = run_padded(
        _runner(self, state),
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        inputs_embeds,
        output_hidden_states=bool(hidden_states),
    )
    if getattr(self, "pooler", None) is not None:
        with torch.no_grad():
            output.pooler_output = self.pooler(output.last_hidden_state)
    return output if return_dict else output.to_tuple()


def _match(model: Any) -> tuple[EncoderSpec, dict[str, tuple[str, ...]]]:
    """Return the model's spec and its parameters by weight of the encoder; OptionError if it is not supported."""
    parameters = dict(model.named_parameters())
    config = model.config.to_dict()
    family = next((one for one in FAMILIES.values() if one.matches(config, list(parameters))), None)
    if family is None:
        raise OptionError(
            f"{type(model).__name__} belongs to no supported family: model_type = {model.config.model_type!r}; "
            f"accelerate supports {', '.join(FAMILIES)}"
        )
    spec = family.read_config(config)
    spec = replace(spec, vocabulary=model.get_input_embeddings().weight.shape[0])
    specs = family.tensors(spec)
    names = {weight: _present_names(tensor, parameters) for weight, tensor in specs.items()}
    reason = next(_mismatches(spec, specs, names, parameters, family.ignored), None)
    if reason is not None:
        raise OptionError(f"{type(model).__name__} cannot be accelerated: {reason}; use it without accelerate")
    return spec, names


def _present_names(tensor: TensorSpec, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    return next((names for names in tensor.alternatives if all(name in parameters for name in names)), ())


def _mismatches(
    spec: EncoderSpec,
    specs: Mapping[str, TensorSpec],
    names: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, Tensor],
    ignored: Sequence[str],
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
    if surplus := sorted(name for name in unused if not any(fnmatchcase(name, pattern) for pattern in ignored)):
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


def _runner(model: Any, state: _State) -> Runner:
    """Return the runner; a new one if a parameter has moved, as after `to`, `half` or a copy."""
    parameters = {name: model.get_parameter(name) for names in state.parameter_names.values() for name in names}
    pointers = tuple(parameter.data_ptr() for parameter in parameters.values())
    if state.runner is None or state.pointers != pointers:
        tensors = {
            weight: _stack_in_place([parameters[name] for name in names])
            for weight, names in state.parameter_names.items()
        }
        weights = assemble(state.spec, tensors)
        device, dtype = weights.word.device, weights.word.dtype
        encoder = make_encoder(state.spec, weights, attention_backend("auto", device, dtype))
        state.runner = Runner(encoder, device, pooling="mean", dense=())
        state.pointers = tuple(parameter.data_ptr() for parameter in parameters.values())
    return state.runner


def _stack_in_place(parameters: list[nn.Parameter]) -> Tensor:
    """Return the parameters as one tensor, stacked along dim 0, and make them views of it."""
    if len(parameters) == 1:
        return parameters[0].detach()
    stacked = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, stacked.split([len(one) for one in parameters]), strict=True):
        parameter.data = rows
    return stacked
