"""accelerate: a loaded transformers model computes with packed batches on its own weights; restore undoes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.family import Family
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
    """What an accelerated model carries."""

    spec: EncoderSpec
    found: dict[str, tuple[str, ...]]  # slot -> the model's parameters that are stacked in it
    said: set[str]  # why it fell back
    runner: Runner | None = None  # made for the parameters at `pointers`
    pointers: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the runner, which holds kernels, is made anew there."""
        return {**vars(self), "runner": None}


def accelerate(model: Any) -> Any:
    """Replace the forward pass of a transformers encoder in place with the packed one, on the same weights.

    Parameters that the kernels want stacked (q, k and v; gate and up) become views of one tensor, held once.
    In training mode, and for arguments that are not offered, the model's own forward pass runs and says so once.
    OptionError, with the reason, for a model that cannot be taken. Returns the model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise OptionError(f"accelerate does not take {type(model).__name__}; pass a loaded transformers model")
    if STATE in vars(model):
        return model
    base = getattr(model, "base_model", model)
    if base is not model:
        raise OptionError(
            f"{type(model).__name__} has a head on its encoder; "
            f"accelerate the {type(base).__name__} inside, its base_model"
        )
    spec, found = _match(model)
    state = _State(spec, found, set())
    _runner(model, state)
    # bound, so that a deep copy's forward is the copy's
    vars(model)[STATE] = state
    model.forward = MethodType(_forward, model)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`: the model's own forward pass, each parameter in memory of its own. Returns the model."""
    state = vars(model).pop(STATE, None)
    if state is None:
        raise OptionError(f"this {type(model).__name__} is not accelerated; call unpadded.accelerate first")
    del model.forward
    for names in state.found.values():
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
    """The accelerated forward pass; see `UnpaddedModel.forward`."""
    state: _State = getattr(self, STATE)
    options = {key: value for key, value in keywords.items() if value is not None}
    states = options.pop("output_hidden_states", self.config.output_hidden_states)
    attentions = options.pop("output_attentions", self.config.output_attentions)
    return_dict = options.pop("return_dict", self.config.return_dict)
    reason = "it is in training mode" if self.training else None
    reason = reason or (NO_ATTENTIONS if attentions else None)
    if reason is None and attention_mask is not None and attention_mask.ndim != 2:
        reason = f"attention_mask has {attention_mask.ndim} dimensions"
    if reason is None and options:
        reason = f"{', '.join(options)} were given"
    if reason is not None:
        kind = reason.partition(":")[0]
        if kind not in state.said:
            state.said.add(kind)
            logger.warning("%s runs its own forward pass: %s", type(self).__name__, reason)
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given = {key: value for key, value in given.items() if value is not None}
        return type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, **given, **keywords)
    output = run_padded(
        _runner(self, state),
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        inputs_embeds,
        output_hidden_states=bool(states),
    )
    if getattr(self, "pooler", None) is not None:
        with torch.no_grad():
            output.pooler_output = self.pooler(output.last_hidden_state)
    return output if return_dict else output.to_tuple()


def _match(model: Any) -> tuple[EncoderSpec, dict[str, tuple[str, ...]]]:
    """The model's spec, and the parameters of each slot; OptionError with what does not fit."""
    parameters = dict(model.named_parameters())
    config = model.config.to_dict()
    family = next((one for one in FAMILIES.values() if one.matches(config, list(parameters))), None)
    if family is None:
        raise OptionError(
            f"{type(model).__name__} is of no known family: model_type = {model.config.model_type!r}; "
            f"accelerate takes {', '.join(FAMILIES)}"
        )
    spec = family.read_config(config)
    spec = replace(spec, vocabulary=model.get_input_embeddings().weight.shape[0])
    slots = family.tensors(spec)
    found = {slot: _parameters_of(wanted, parameters) for slot, wanted in slots.items()}
    reason = _reason_against(spec, slots, found, parameters, family)
    if reason is not None:
        raise OptionError(f"{type(model).__name__} cannot be accelerated: {reason}; run it as it is")
    return spec, found


def _parameters_of(wanted: TensorSpec, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    return next((names for names in wanted.alternatives if all(name in parameters for name in names)), ())


def _reason_against(
    spec: EncoderSpec,
    slots: Mapping[str, TensorSpec],
    found: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, Tensor],
    family: Family,
) -> str | None:
    if absent := [slot for slot, names in found.items() if not names]:
        wanted = [" + ".join(slots[slot].alternatives[0]) for slot in absent]
        return f"it lacks the parameters {', '.join(wanted[:4])}"
    if spec.experts is not None:
        return f"{spec.family} has experts, which the kernels want turned"
    if spec.kv_heads is not None:
        return f"its {spec.heads} heads share {spec.kv_heads} keys and values, which the kernels want copied"
    used = {name for names in found.values() for name in names}
    if swapped := [
        name for slot, names in found.items() for name in names if name.endswith(slots[slot].up_before_gate)
    ]:
        return f"its {swapped[0]} holds its halves the other way round than the kernels want"
    ignored = [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in family.ignored)]
    if surplus := sorted(parameters.keys() - used - set(ignored)):
        return f"it has the surplus parameters {', '.join(surplus[:4])}"
    for slot, names in found.items():
        shapes = [tuple(parameters[name].shape) for name in names]
        if (sum(shape[0] for shape in shapes), *shapes[0][1:]) != slots[slot].shape:
            return f"{', '.join(names)} have the shapes {shapes} instead of {slots[slot].shape} together"
    kinds = {(parameters[name].dtype, parameters[name].device) for name in used}
    if len(kinds) > 1:
        return f"its parameters lie in several dtypes or devices: {sorted(map(str, kinds))}"
    dtype, device = kinds.pop()
    return None if dtype in DTYPES.values() and device.type != "meta" else f"its parameters are {dtype} on {device}"


def _runner(model: Any, state: _State) -> Runner:
    """Made anew where a parameter lies elsewhere than before: after `to`, `half` or a copy."""
    parameters = {name: model.get_parameter(name) for names in state.found.values() for name in names}
    pointers = tuple(parameter.data_ptr() for parameter in parameters.values())
    if state.runner is None or state.pointers != pointers:
        tensors = {slot: _stacked([parameters[name] for name in names]) for slot, names in state.found.items()}
        weights = assemble(state.spec, tensors)
        device, dtype = weights.word.device, weights.word.dtype
        encoder = make_encoder(state.spec, weights, attention_backend("auto", device, dtype))
        state.runner = Runner(encoder, device, pooling="mean", dense=())
        state.pointers = tuple(parameter.data_ptr() for parameter in parameters.values())
    return state.runner


def _stacked(parts: list[nn.Parameter]) -> Tensor:
    """The parameters along dim 0 as one tensor, of which they become views; a single one as it is."""
    if len(parts) == 1:
        return parts[0].detach()
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole
