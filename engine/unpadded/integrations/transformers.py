"""UnpaddedModel: transformers' interface, padded ids to padded hidden states, with a packed forward pass inside.

>>> from unpadded.integrations.transformers import UnpaddedModel
>>> model = UnpaddedModel.from_pretrained("nomic-ai/nomic-embed-text-v1.5")
>>> model(**tokenizer(sentences, padding=True, return_tensors="pt"))[0]
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.checkpoint.safetensors_header import read_header
from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.execution.runner import Runner, in_thread
from unpadded.integrations.padding import PaddedInputs, pad, to_device, unpad
from unpadded.loading import DTYPES, load
from unpadded.model.attention import attention_backend
from unpadded.model.encoder import Encoder
from unpadded.model.heads import Head
from unpadded.model.tensor_loader import STORED_DTYPES
from unpadded.model.weights import EncoderWeights, packed_linear, plain_weights
from unpadded.tokenization.tokenizer import Tokenizer

logger = logging.getLogger("unpadded")

# transformers' names of attention implementations -> the names that `unpadded.load` takes
ATTENTION = {None: "auto", "eager": "auto", "sdpa": "auto", "flash_attention_2": "flash-attn"}
# Arguments of transformers' from_pretrained that do not affect the values computed here.
IGNORED_ARGUMENTS = {"add_pooling_layer", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"}
NO_ATTENTIONS = "output_attentions = True is not supported: attention weights are never stored"


class UnpaddedModel(nn.Module):
    """An encoder with the inputs and outputs of transformers' models that computes nothing for padding.

    For inference only: it raises in training mode, and its outputs have no gradient. `pooler_output` is None.
    On a CPU, in-place changes of parameters have no effect, except through `load_state_dict`.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.config = make_config(engine.checkpoint)
        weights = in_thread(partial(plain_weights, engine._pipeline.runner.encoder.weights))
        self._weights: EncoderWeights = _as_parameters(
            weights, lambda name, value: self.register_parameter(name, value)
        )
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
        **ignored: Any,
    ) -> UnpaddedModel:
        """Load a folder or a hub id as `unpadded.load` does; no code of the checkpoint is run.

        dtype: None and "auto" mean the dtype of the checkpoint. device: None means the CPU. Both as in transformers.
        attn_implementation: "auto", "unpadded", "torch", "flash-attn", or transformers' names for them.
        rotary_scaling_factor: see `unpadded.load`. OptionError for an argument that is not supported.
        """
        if unknown := sorted(set(ignored) - IGNORED_ARGUMENTS):
            raise OptionError(f"from_pretrained does not support {', '.join(unknown)}; omit it")
        if Path(model).is_dir():
            revision = None
        elif cache_dir or token is not None or local_files_only:
            options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
            model, revision = fetch(os.fspath(model), revision, **options), None
        dtype = dtype or torch_dtype or "auto"
        if dtype == "int8":
            raise OptionError(f"dtype={dtype!r} is not supported by a module, which may be cast; use unpadded.load")
        if dtype == "auto":
            dtype = _stored_dtype(open_checkpoint(model, revision=revision))
        engine = load(
            model,
            device=device or ("cpu" if device_map is None else device_map),
            dtype=dtype,
            attention=ATTENTION.get(attn_implementation, attn_implementation or "auto"),
            rotary_scaling_factor=rotary_scaling_factor,
            revision=revision,
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
        """Return last_hidden_state, [batch, length, hidden], zeros at padding, on the model's device in its dtype.

        input_ids: [batch, length]; or inputs_embeds: [batch, length, hidden], which receive no gradient.
        attention_mask: [batch, length], zeros at padding. token_type_ids: [batch, length]; ignored by a model without
        token types, as in transformers. position_ids: [batch, length]; None counts from the start of each text.
        output_attentions = True raises OptionError.
        """
        if self.training:
            raise OptionError(
                "the model is in training mode but supports inference only; call eval(), or train transformers' model"
            )
        if output_attentions:
            raise OptionError(f"{NO_ATTENTIONS}; omit it, or use transformers' model")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs = PaddedInputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        output = run_padded(self.engine._pipeline.runner, inputs, output_hidden_states)
        return output.to_tuple() if return_dict is False else output

    @property
    def device(self) -> torch.device:
        return self._weights.word.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.word.dtype

    def can_generate(self) -> bool:
        """Return False; transformers' pipelines call this."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings as a module that shares their memory."""
        table: nn.Module = nn.Embedding.from_pretrained(self._weights.word)
        return table

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Copy the checkpoint's configuration and weight files as they are stored."""
        folder, checkpoint = Path(save_directory), self.engine.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint.spec != open_checkpoint(checkpoint.folder).spec:
            logger.warning("rotary_scaling_factor is not saved; pass it again when you load %s", folder)
        (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n")
        index = checkpoint.weight_files[0].with_name("model.safetensors.index.json")
        for path in (*checkpoint.weight_files, *([index] if len(checkpoint.weight_files) > 1 else [])):
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(path, folder / path.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnpaddedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_engine(*self._engine_parts())
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._make_engine(*self._engine_parts())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the engine, whose kernels cannot be copied; `__setstate__` makes another."""
        return {**self.__dict__, "engine": self._engine_parts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_engine(*state["engine"])

    def _engine_parts(self) -> tuple[Checkpoint, Tokenizer, int, str, Mapping[str, Head]]:
        """Return the arguments of `_make_engine` that make an engine like this one."""
        pipeline = self.engine._pipeline
        attention, heads = pipeline.runner.encoder.attention.name, pipeline.runner.heads
        return pipeline.checkpoint, pipeline.tokenizer, pipeline.token_budget, attention, heads

    def _make_engine(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, budget: int, attention: str, heads: Mapping[str, Head]
    ) -> None:
        """Make an engine for the parameters as they are after a move, a cast, `load_state_dict` or a copy."""
        device = self.device
        backend = attention_backend(attention if device.type == "cuda" else "auto", device, self.dtype)
        plain = checkpoint.spec.lora is not None  # a LoRA task rewrites the weights
        packed = self._weights if plain else in_thread(partial(self._weights.map_linears, packed_linear))
        encoder = Encoder(checkpoint.spec, packed, backend)
        runner = Runner(encoder, device, {name: head.to(device) for name, head in heads.items()})
        self.engine = Engine(EmbeddingPipeline(checkpoint, tokenizer, runner, budget))


@torch.no_grad()
def run_padded(runner: Runner, inputs: PaddedInputs, output_hidden_states: bool) -> BaseModelOutputWithPooling:
    """Run the packed encoder on padded tensors and pad its results; see `UnpaddedModel.forward`."""
    weights = runner.encoder.weights
    batch, kept, shape = unpad(inputs, runner.encoder.spec)
    states: list[Tensor] | None = [] if output_hidden_states else None
    if batch is None:
        last = weights.word.new_zeros(*shape, weights.word.shape[1])
        padded = (last,) * (len(weights.layers) + 1)
    else:
        embeds = None if inputs.inputs_embeds is None else inputs.inputs_embeds.flatten(0, 1)
        indices = None if kept is None else to_device(kept, runner.device)  # before the pass, so that nothing waits
        last = pad(runner.forward(batch, states, embeds), indices, shape)
        padded = tuple(pad(state, indices, shape) for state in states or ())
    return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=padded if output_hidden_states else None)


def make_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of a checkpoint, of the base class if it does not know the model_type."""
    spec = checkpoint.spec
    from_spec = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.intermediate,
        "vocab_size": checkpoint.config.get("vocab_size", spec.vocabulary),
        "type_vocab_size": spec.token_types,
        "layer_norm_eps": spec.norm_eps,
    }
    from_file = {key: value for key, value in checkpoint.config.items() if key not in ("auto_map", "model_type")}
    default = {"max_position_embeddings": spec.position_rows or checkpoint.max_length}
    values = default | from_file | from_spec
    model_type = checkpoint.config.get("model_type", spec.family)
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type](**values)
    config = PreTrainedConfig(**values)
    config.model_type = model_type  # type: ignore[misc]  # a class variable there
    return config


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the configuration names, else the most frequent one of the first weight file."""
    configured = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if configured in DTYPES:
        return DTYPES[configured]
    stored = [tensor.dtype for tensor in read_header(checkpoint.weight_files[0]).values()]
    most_frequent = STORED_DTYPES.get(max(set(stored), key=stored.count), torch.float32)
    return torch.float32 if most_frequent == torch.float64 else most_frequent


def _as_parameters(value: Any, register: Callable[[str, nn.Parameter], None], name: str = "") -> Any:
    """Copy a dataclass with each tensor as a frozen parameter that shares its memory, and register the parameters."""
    if isinstance(value, Tensor):
        parameter = nn.Parameter(value, requires_grad=False)
        register(name, parameter)
        return parameter
    prefix = f"{name}_" if name else ""
    if isinstance(value, tuple):
        return tuple(_as_parameters(item, register, f"{prefix}{index}") for index, item in enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        parameters = {
            field.name: _as_parameters(getattr(value, field.name), register, prefix + field.name)
            for field in fields(value)
        }
        return replace(value, **parameters)
    return copy.copy(value)
