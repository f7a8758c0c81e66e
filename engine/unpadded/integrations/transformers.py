"""A checkpoint as transformers' forward pass: padded ids in, padded hidden states out, packed in between.

>>> from unpadded.integrations.transformers import UnpaddedModel
>>> model = UnpaddedModel.from_pretrained("nomic-ai/nomic-embed-text-v1.5")
>>> model(**tokenizer(sentences, padding=True, return_tensors="pt"))[0]
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unpadded.checkpoint import lora_files
from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.checkpoint.safetensors_header import read_header
from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.execution.runner import Dense, Runner
from unpadded.integrations import attention_interface
from unpadded.integrations.padding import pad, unpad
from unpadded.loading import DTYPES, load, make_encoder
from unpadded.model.attention import attention_backend
from unpadded.model.tensor_loader import STORED_DTYPES
from unpadded.model.weights import EncoderWeights, plain_weights, prepacked_weights
from unpadded.tokenization.tokenizer import Tokenizer

logger = logging.getLogger("unpadded")

ATTENTION = {None: "auto", "eager": "auto", "sdpa": "auto", "flash_attention_2": "flash-attn"}  # transformers' words
# Of from_pretrained, what changes no value here.
HARMLESS = {"add_pooling_layer", "low_cpu_mem_usage", "safe_serialization", "trust_remote_code", "use_safetensors"}

NO_ATTENTIONS = "output_attentions were asked for, which are never held whole"

attention_interface.register()


class UnpaddedModel(nn.Module):
    """An encoder that takes and gives what transformers' models do, and computes nothing for padding.

    It only infers: in training mode it raises, and its outputs carry no gradient. It has no pooler: `pooler_output` is
    None. On a CPU a parameter that is written in place by other means than `load_state_dict` changes nothing.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.config = make_config(engine.checkpoint)
        weights = plain_weights(engine._pipeline.runner.encoder.weights)
        self._weights = _as_parameters(weights, lambda name, value: self.register_parameter(name, value))
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        rotary_scaling_factor: float | Literal["config"] | None = "config",
        attn_implementation: str | None = None,
        revision: str | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **harmless: Any,
    ) -> UnpaddedModel:
        """Load a folder or a hub id as `unpadded.load` does: no code of the checkpoint is run.

        dtype: None or "auto" is the one that the checkpoint is stored in; device: None is the CPU; as in transformers.
        rotary_scaling_factor: see `unpadded.load`. attn_implementation: "auto", "unpadded", "torch", "flash-attn", or
        transformers' words for them. OptionError for an argument that is not offered.
        """
        if unknown := sorted(set(harmless) - HARMLESS):
            raise OptionError(f"from_pretrained does not take {', '.join(unknown)}; leave it out")
        if harmless.get("trust_remote_code"):
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run")
        folder = model
        if not Path(model).is_dir() and (cache_dir or token is not None or local_files_only):
            folder = fetch(
                os.fspath(model), revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        folder_revision = revision if folder is model and not Path(model).is_dir() else None
        asked = dtype or torch_dtype or "auto"
        if asked == "float8":
            raise OptionError("dtype='float8' is not for a module, whose parameters may be cast; use unpadded.load")
        if asked == "auto":
            asked = _stored_dtype(open_checkpoint(folder, revision=folder_revision))
        engine = load(
            folder,
            device=device or ("cpu" if device_map is None else device_map),
            dtype=asked,
            attention=ATTENTION.get(attn_implementation, attn_implementation or "auto"),
            rotary_scaling_factor=rotary_scaling_factor,
            revision=folder_revision,
        )
        return cls(engine)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor | tuple[Tensor, ...], ...]:
        """last_hidden_state: [batch, length, hidden], zeros at padding, on the model's device in its dtype.

        input_ids: [batch, length], or inputs_embeds: [batch, length, hidden], to which no gradient is carried.
        attention_mask: [batch, length], zeros at padding. token_type_ids: [batch, length], of no effect on a model
        without token types, as in transformers. position_ids: [batch, length], instead of the texts' own.
        output_attentions are refused.
        """
        if self.training:
            raise OptionError(
                "the model is in training mode, and it only infers; call eval(), or train transformers' own"
            )
        if output_attentions:
            raise OptionError(f"{NO_ATTENTIONS}; leave it out, or use transformers' own model")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        output = run_padded(
            self.engine._pipeline.runner,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def device(self) -> torch.device:
        device: torch.device = self._weights.word.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._weights.word.dtype
        return dtype

    def can_generate(self) -> bool:
        """Asked by transformers' pipelines."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The table of words, sharing its memory."""
        table: nn.Module = nn.Embedding.from_pretrained(self._weights.word)
        return table

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Copy the checkpoint's configuration, weights and adapters, as they are stored."""
        folder, checkpoint = Path(save_directory), self.engine.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint.spec != open_checkpoint(checkpoint.folder).spec:
            logger.warning("rotary_scaling_factor is not saved; pass it again when %s is loaded", folder)
        (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")
        index = checkpoint.folder / "model.safetensors.index.json"
        adapters = [path for file in checkpoint.lora_files for path in (file, file.with_name(lora_files.CONFIG))]
        for path in (*checkpoint.weight_files, *([index] if len(checkpoint.weight_files) > 1 else []), *adapters):
            target = folder / path.relative_to(checkpoint.folder)
            if path.resolve() != target.resolve():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnpaddedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._move()

    def _move(self) -> None:
        """Run where the parameters are, as they are: on a CPU their products take a copy, see `prepacked_weights`."""
        old = self.engine._pipeline.runner
        name = old.encoder.attention.name if self.device.type == "cuda" else "auto"
        runner = _make_runner(self.engine.checkpoint, self._weights, name, old.dense)
        self.engine = Engine(self.engine._pipeline.with_runner(runner))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: the engine, which holds kernels, is made anew there."""
        engine = self.engine
        runner = engine._pipeline.runner
        parts = (engine.checkpoint, engine._pipeline.token_budget, runner.encoder.attention.name, runner.dense)
        return {**self.__dict__, "engine": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint, token_budget, attention, dense = state.pop("engine")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        tokenizer = Tokenizer.from_folder(checkpoint.folder, lower_case=checkpoint.lower_case)
        runner = _make_runner(checkpoint, self._weights, attention, dense)
        self.engine = Engine(EmbeddingPipeline(checkpoint, tokenizer, runner, token_budget))


@torch.no_grad()
def run_padded(
    runner: Runner,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    *,
    output_hidden_states: bool,
) -> BaseModelOutputWithPooling:
    """Unpad, run the packed encoder, pad at the very end."""
    weights = runner.encoder.weights
    batch, places, shape = unpad(
        input_ids,
        attention_mask,
        runner.encoder.spec,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
    )
    states: list[Tensor] | None = [] if output_hidden_states else None
    if batch is None:
        last = weights.word.new_zeros(*shape, weights.word.shape[1])
        padded = (last,) * (len(weights.layers) + 1)
    else:
        embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
        last = pad(runner.forward(batch, states, embeds), places, shape)
        padded = tuple(pad(state, places, shape) for state in states or ())
    return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=padded if output_hidden_states else None)


def make_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration object: of the model_type's class where it knows that, else of the base class."""
    spec = checkpoint.spec
    stated = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.intermediate,
        "vocab_size": checkpoint.config.get("vocab_size", spec.vocabulary),
        "type_vocab_size": spec.token_types,
        "layer_norm_eps": spec.norm_eps,
    }
    known = {"max_position_embeddings": spec.position_rows or checkpoint.max_length}
    known |= {key: value for key, value in checkpoint.config.items() if key not in ("auto_map", "model_type")}
    model_type = checkpoint.config.get("model_type", spec.family)
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**known | stated)
    config = PreTrainedConfig(**known | stated)
    config.model_type = model_type  # type: ignore[misc]  # a class variable there
    return config


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the configuration says, else what the first file holds most of."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if stated in DTYPES:
        return DTYPES[stated]
    stored = [tensor.dtype for tensor in read_header(checkpoint.weight_files[0]).values()]
    found = STORED_DTYPES.get(max(set(stored), key=stored.count), torch.float32)
    return torch.float32 if found == torch.float64 else found


def _as_parameters(value: Any, register: Callable[[str, nn.Parameter], None], name: str = "") -> Any:
    """The same dataclass, each of its tensors registered as a frozen parameter that shares its memory."""
    if isinstance(value, Tensor):
        parameter = nn.Parameter(value, requires_grad=False)
        register(name, parameter)
        return parameter
    start = f"{name}_" if name else ""
    if isinstance(value, tuple):
        return tuple(_as_parameters(item, register, f"{start}{index}") for index, item in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        found = {
            field.name: _as_parameters(getattr(value, field.name), register, start + field.name)
            for field in fields(value)
        }
        return replace(value, **found)
    return copy.copy(value)


def _make_runner(checkpoint: Checkpoint, weights: EncoderWeights, attention: str, dense: tuple[Dense, ...]) -> Runner:
    """A runner where the weights are."""
    device = weights.word.device
    backend = attention_backend(attention, device, weights.word.dtype)
    encoder = make_encoder(checkpoint.spec, prepacked_weights(checkpoint.spec, weights), backend)
    moved = tuple((weight.to(device), _to(bias, device), activation) for weight, bias, activation in dense)
    return Runner(encoder, device, pooling=checkpoint.pooling, dense=moved)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
