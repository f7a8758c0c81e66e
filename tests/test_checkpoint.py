"""Reading a checkpoint: sentence-transformers' files, prompts, lengths, matryoshka, the hub, and broken files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects
from support.checkpoints import add_sentence_transformers_files, change_json, write_bert, write_json, write_nomic

from unpadded.checkpoint.reader import open_checkpoint
from unpadded.checkpoint.spec import Rotary
from unpadded.errors import CheckpointError, ConfigError, OptionError, UnpaddedError, WeightsError

NOMIC_PROMPTS = {
    "search_query": "search_query: ",
    "search_document": "search_document: ",
    "clustering": "clustering: ",
    "classification": "classification: ",
}


@pytest.fixture
def nomic(tmp_path: Path) -> Path:
    return write_nomic(tmp_path / "nomic", vocabulary=64, tokenizer=False)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert", vocabulary=64, tokenizer=False)


def test_minilm(minilm: Path) -> None:
    checkpoint = open_checkpoint(minilm)
    assert (checkpoint.pooling, checkpoint.normalize, checkpoint.dense) == ("mean", True, ())
    assert checkpoint.max_length == 256  # sentence-transformers' file; the tokenizer's has 512
    assert (checkpoint.prompts, checkpoint.default_prompt, checkpoint.lower_case) == ({}, None, False)
    assert (checkpoint.matryoshka, checkpoint.matryoshka_layer_norm, checkpoint.defaults) == ((), False, ())
    assert (checkpoint.spec.layers, checkpoint.spec.hidden, checkpoint.spec.vocabulary) == (6, 384, 30522)
    assert checkpoint.weight_files == (minilm / "model.safetensors",)


def test_defaults_are_used_and_listed(nomic: Path, bert: Path) -> None:
    checkpoint = open_checkpoint(nomic)
    assert (checkpoint.name, checkpoint.folder) == ("nomic", nomic)
    assert (checkpoint.pooling, checkpoint.normalize, checkpoint.max_length) == ("mean", False, 8192)
    assert (checkpoint.prompts, checkpoint.default_prompt) == (NOMIC_PROMPTS, None)
    listed = " | ".join(checkpoint.defaults)
    assert all(default in listed for default in ("pooling='mean'", "normalize=False", "prompts=", "max_length=8192"))
    assert checkpoint.describe()["defaults"] == list(checkpoint.defaults)
    assert json.loads(json.dumps(checkpoint.describe()))["encoder"]["hidden"] == 128

    checkpoint = open_checkpoint(bert)
    assert (checkpoint.pooling, checkpoint.max_length, checkpoint.prompts) == ("mean", 512, {})


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode_mean_tokens": False}, "mean"),  # as sentence-transformers reads it
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
    ],
)
def test_pooling(config: dict[str, object], pooling: str, nomic: Path) -> None:
    add_sentence_transformers_files(nomic)
    write_json(nomic / "1_Pooling" / "config.json", config)
    checkpoint = open_checkpoint(nomic)
    assert checkpoint.pooling == pooling
    assert not any("pooling" in default for default in checkpoint.defaults)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode": "max"}, "'max'"),
        ({"pooling_mode": ["cls", "mean"]}, "'cls', 'mean'"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "'cls', 'mean'"),
        ({"pooling_mode_weightedmean_tokens": True}, "'weightedmean'"),
        ({"pooling_mode": "cls", "include_prompt": False}, "include_prompt in .* = False"),
    ],
)
def test_an_unsupported_pooling_raises(config: dict[str, object], message: str, nomic: Path) -> None:
    add_sentence_transformers_files(nomic)
    write_json(nomic / "1_Pooling" / "config.json", config)
    with pytest.raises(ConfigError, match=f"{message}.*is not implemented"):
        open_checkpoint(nomic)


@pytest.mark.parametrize("normalize", [True, False])
def test_normalize_is_read_from_modules_json(normalize: bool, nomic: Path) -> None:
    add_sentence_transformers_files(nomic, normalize=normalize)
    assert open_checkpoint(nomic).normalize is normalize


@pytest.mark.parametrize(
    ("class_name", "kind"),
    [
        ("sentence_transformers.base.modules.transformer.Transformer", "Transformer"),  # as version 6 writes them
        ("sentence_transformers.models.Transformer", "Transformer"),
    ],
)
def test_modules_of_all_versions_and_a_transformer_in_a_subfolder(class_name: str, kind: str, tmp_path: Path) -> None:
    inner = write_bert(tmp_path / "root" / f"0_{kind}", vocabulary=64, tokenizer=False)
    root = inner.parent
    pooling = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    write_json(
        root / "modules.json",
        [{"idx": 0, "name": "0", "path": inner.name, "type": class_name}, {"path": "1_Pooling", "type": pooling}],
    )
    write_json(root / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    write_json(root / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    write_json(inner / "sentence_bert_config.json", {"max_seq_length": 99, "do_lower_case": True})
    checkpoint = open_checkpoint(root)
    assert (checkpoint.folder, checkpoint.name, checkpoint.pooling) == (inner, "root", "cls")
    assert (checkpoint.max_length, checkpoint.lower_case, checkpoint.prompts) == (99, True, {"query": "q: "})


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["Transformer"], "Transformer"),
        (["Pooling", "Transformer"], "Pooling, Transformer"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "Normalize, Dense"),
        (["Transformer", "Pooling", "Pooling"], "Pooling, Pooling"),
        (["Transformer", "Pooling", "Normalize", "LayerNorm"], "LayerNorm"),
        (["Transformer", "Pooling", "custom.Module"], r"custom\.Module"),
    ],
)
def test_unsupported_modules_raise(types: list[str], message: str, nomic: Path) -> None:
    class_names = [kind if "." in kind else f"sentence_transformers.models.{kind}" for kind in types]
    write_json(nomic / "modules.json", [{"path": f"{i}", "type": name} for i, name in enumerate(class_names)])
    with pytest.raises(ConfigError, match=f"{message}.*is not implemented"):
        open_checkpoint(nomic)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_a_module_outside_the_checkpoint_raises(path: str, nomic: Path) -> None:
    write_json(nomic / "modules.json", [{"path": path, "type": "sentence_transformers.models.Transformer"}])
    with pytest.raises(ConfigError, match="outside the checkpoint"):
        open_checkpoint(nomic)


def test_dense(nomic: Path) -> None:
    add_sentence_transformers_files(nomic, dense=(128, 48))
    (dense,) = open_checkpoint(nomic).dense
    assert (dense.shape, dense.bias, dense.activation) == ((48, 128), True, "tanh")
    assert dense.weight_files == (nomic / "2_Dense" / "model.safetensors",)
    path = nomic / "2_Dense" / "config.json"
    change_json(path, activation_function="torch.nn.modules.linear.Identity")
    assert open_checkpoint(nomic).dense[0].activation == "identity"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"activation_function": "torch.nn.modules.activation.SiLU"},
            "activation_function in .*SiLU' is not implemented",
        ),
        ({"activation_function": "mine.Tanh"}, "activation_function in .*mine.Tanh' is not implemented"),
        ({"use_residual": True}, "use_residual in .*True is not implemented"),
        ({"module_input_name": "token_embeddings"}, "module_input_name in .*token_embeddings' is not implemented"),
        ({"in_features": 64}, "in_features = 64 .* input of 128"),
        ({"in_features": ...}, "lacks in_features"),
    ],
)
def test_unsupported_dense_modules_raise(change: dict[str, object], message: str, nomic: Path) -> None:
    add_sentence_transformers_files(nomic, dense=(128, 48))
    change_json(nomic / "2_Dense" / "config.json", **change)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(nomic)


def test_a_pickled_dense_raises(nomic: Path) -> None:
    add_sentence_transformers_files(nomic, dense=(128, 48))
    (nomic / "2_Dense" / "model.safetensors").rename(nomic / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*never loaded"):
        open_checkpoint(nomic)


def test_prompts(nomic: Path) -> None:
    add_sentence_transformers_files(nomic)  # with empty prompts, as sentence-transformers writes them
    assert open_checkpoint(nomic).prompts == NOMIC_PROMPTS
    prompts = {"query": "Represent this query for searching relevant code: ", "document": ""}
    add_sentence_transformers_files(nomic, prompts=prompts, default_prompt_name="query")
    checkpoint = open_checkpoint(nomic)
    assert (checkpoint.prompts, checkpoint.default_prompt) == (prompts, "query")
    assert not any("prompts" in default for default in checkpoint.defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default_prompt_name": "passage"}, r"default_prompt_name = 'passage' is not among"),
        ({"prompts": ["query: "]}, r"prompts = \['query: '\] is not an object of strings"),
        ({"prompts": {"query": 1}}, "is not an object of strings"),
    ],
)
def test_invalid_prompts_raise(change: dict[str, object], message: str, nomic: Path) -> None:
    add_sentence_transformers_files(nomic)
    change_json(nomic / "config_sentence_transformers.json", **change)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(nomic)


def test_max_length_comes_from_the_first_file_that_states_it(nomic: Path) -> None:
    assert open_checkpoint(nomic).max_length == 8192
    write_json(nomic / "tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656})
    assert open_checkpoint(nomic).max_length == 8192
    write_json(nomic / "tokenizer_config.json", {"model_max_length": None})
    assert open_checkpoint(nomic).max_length == 8192
    write_json(nomic / "tokenizer_config.json", {"max_len": 256})
    assert open_checkpoint(nomic).max_length == 256
    write_json(nomic / "tokenizer_config.json", {"model_max_length": 512, "max_len": 256})
    assert open_checkpoint(nomic).max_length == 512
    add_sentence_transformers_files(nomic, max_seq_length=None)
    assert open_checkpoint(nomic).max_length == 512
    add_sentence_transformers_files(nomic, max_seq_length=4096)
    assert open_checkpoint(nomic).max_length == 4096
    assert open_checkpoint(nomic, max_length=10_000).max_length == 10_000


def test_max_length_is_limited_by_learned_positions(bert: Path) -> None:
    write_json(bert / "tokenizer_config.json", {"model_max_length": 8192})
    assert open_checkpoint(bert).max_length == 512
    assert open_checkpoint(bert, max_length=512).max_length == 512
    with pytest.raises(OptionError, match="max_length = 513 exceeds the 512"):
        open_checkpoint(bert, max_length=513)


@pytest.mark.parametrize("length", [0, -1, 2.5, True, "512"])
def test_an_invalid_max_length_raises(length: object, bert: Path) -> None:
    with pytest.raises(OptionError, match="max_length = "):
        open_checkpoint(bert, max_length=length)  # type: ignore[arg-type]


def test_a_model_is_named_by_the_hub_its_path_or_its_configuration(tmp_path: Path) -> None:
    small = {"layers": 1, "hidden": 64, "heads": 1, "intermediate": 64, "vocabulary": 64, "tokenizer": False}
    for path, name in (
        ("nomic", "nomic"),
        ("my-model", "my-model"),
        ("gte/model", "gte"),
        ("bge/checkpoint-500", "bge"),
        ("e5/0_Transformer", "e5"),
        ("jina/V2", "jina"),
        ("models/model", "parent"),
        ("models--owner--name/snapshots/0123456789abcdef", "owner/name"),
        ("models--owner--name/snapshots/model", "owner/name"),
        ("models--bert-base-uncased/snapshots/0123456789abcdef", "bert-base-uncased"),
    ):
        folder = write_nomic(tmp_path / path, **small)
        change_json(folder / "config.json", _name_or_path="/somewhere/parent")
        assert open_checkpoint(folder).name == name
    change_json(folder / "config.json", _name_or_path=...)
    folder = write_nomic(tmp_path / "data" / "model", **small)
    assert open_checkpoint(folder).name == "model", "nothing tells more"


def test_matryoshka_defaults_are_those_of_published_names(tmp_path: Path) -> None:
    real = {"layers": 1, "hidden": 768, "heads": 12, "intermediate": 256, "vocabulary": 64, "tokenizer": False}
    snapshot = "models--nomic-ai--nomic-embed-text-v1.5/snapshots/0123456789abcdef"
    for path, trained in (
        ("nomic-embed-text-v1.5", True),
        (snapshot, True),
        ("nomic-embed-text-v1", False),
        ("my-nomic-embed-text-v1.5-finetuned", False),
    ):
        folder = write_nomic(tmp_path / path, **real)
        change_json(folder / "config.json", _name_or_path="nomic-ai/nomic-embed-text-v1.5")
        checkpoint = open_checkpoint(folder)
        assert checkpoint.matryoshka == ((768, 512, 256, 128, 64) if trained else ())
        assert checkpoint.matryoshka_layer_norm is trained


def test_matryoshka_dimensions_in_a_file_take_precedence(nomic: Path, bert: Path) -> None:
    change_json(nomic / "config.json", matryoshka_dimensions=[32, 128, 64])
    checkpoint = open_checkpoint(nomic)
    assert (checkpoint.matryoshka, checkpoint.matryoshka_layer_norm) == ((128, 64, 32), True)
    add_sentence_transformers_files(bert)
    change_json(bert / "config_sentence_transformers.json", matryoshka_dimensions=[64])
    checkpoint = open_checkpoint(bert)
    assert (checkpoint.matryoshka, checkpoint.matryoshka_layer_norm) == ((64,), False)
    change_json(bert / "config_sentence_transformers.json", matryoshka_layer_norm=True)
    assert open_checkpoint(bert).matryoshka_layer_norm
    change_json(nomic / "config.json", matryoshka_dimensions=[256])
    with pytest.raises(ConfigError, match=r"matryoshka_dimensions = \[256\] are not whole numbers up to 128"):
        open_checkpoint(nomic)


def test_the_scaling_factor_can_be_overridden(tmp_path: Path, bert: Path) -> None:
    folder = write_nomic(tmp_path / "scaled", scaling_factor=2, vocabulary=64, tokenizer=False)
    rotary = Rotary(base=1000.0, trained_length=2048, scaling_factor=2.0)
    assert open_checkpoint(folder).spec.rotary == rotary
    for factor in (None, 4.0, 3):
        rotary = open_checkpoint(folder, rotary_scaling_factor=factor).spec.rotary
        assert rotary == Rotary(base=1000.0, trained_length=2048, scaling_factor=factor)
    assert open_checkpoint(bert, rotary_scaling_factor=None).spec.rotary is None
    with pytest.raises(OptionError, match=r"rotary_scaling_factor = 2 .*bert has no rotary.*; omit"):
        open_checkpoint(bert, rotary_scaling_factor=2)
    for wrong in (0, -1.0, float("nan"), True, "two"):
        with pytest.raises(OptionError, match=r"rotary_scaling_factor = .*; use"):
            open_checkpoint(folder, rotary_scaling_factor=wrong)  # type: ignore[arg-type]


def test_loading_arguments_that_change_vectors_raise(nomic: Path) -> None:
    add_sentence_transformers_files(nomic)
    path = nomic / "sentence_bert_config.json"
    change_json(path, model_args={"torch_dtype": "bfloat16"}, config_args={"trust_remote_code": True})
    open_checkpoint(nomic)
    change_json(path, config_args={"rotary_scaling_factor": 2})
    with pytest.raises(ConfigError, match=r"config_args in .*'rotary_scaling_factor'.* is not implemented"):
        open_checkpoint(nomic)
    (nomic / "modules.json").unlink()  # then sentence-transformers does not read the file
    open_checkpoint(nomic)


@pytest.mark.parametrize(
    ("key", "supported", "other"),
    [
        ("document_length", None, 32),
        (
            "modality_config",
            {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            {"message": {}},
        ),
        ("module_output_name", "token_embeddings", "sentence_embedding"),
        ("processing_kwargs", {}, {"text": {"max_length": 8}}),
        ("query_expansion", None, {"strategy": "fixed", "length": 32}),
        ("query_length", None, 32),
        ("tokenizer_name_or_path", None, "owner/tokenizer"),
        ("transformer_task", "feature-extraction", "fill-mask"),
        ("unpad_inputs", False, ...),
        ("unknown", None, 1),
    ],
)
def test_settings_of_the_first_module(key: str, supported: object, other: object, nomic: Path) -> None:
    """Every key of sentence_bert_config.json but those of other tests."""
    add_sentence_transformers_files(nomic)
    path = nomic / "sentence_bert_config.json"
    change_json(path, **{key: supported})
    open_checkpoint(nomic)
    if other is not ...:
        change_json(path, **{key: other})
        with pytest.raises(ConfigError, match=rf"{key} in .* = .* is not implemented"):
            open_checkpoint(nomic)


@pytest.mark.parametrize(
    "name", ["config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
)
@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe\x00", b'"a string"'])
def test_the_error_names_a_file_that_is_not_json(name: str, content: bytes, nomic: Path) -> None:
    add_sentence_transformers_files(nomic)
    (nomic / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        open_checkpoint(nomic)


def test_a_folder_without_config_json_raises(nomic: Path) -> None:
    (nomic / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: No such file"):
        open_checkpoint(nomic)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def index_without_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}})


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_weights, r"neither model\.safetensors nor"),
        (only_pickles, r"only pickled weights \(pytorch_model\.bin\), which are never loaded"),
        (index_without_shard, r"model-00001-of-00002\.safetensors, absent"),
        (index_outside, "outside the checkpoint"),
        (index_without_map, "has no weight_map"),
    ],
)
def test_missing_weights_raise(change: Callable[[Path], None], message: str, nomic: Path) -> None:
    change(nomic)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(nomic)


def test_a_missing_folder_raises(tmp_path: Path, nomic: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"there is no folder '\./absent'"):
        open_checkpoint("./absent")
    with pytest.raises(CheckpointError, match="there is no folder ''"):
        open_checkpoint("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(nomic / "config.json")
    with pytest.raises(OptionError, match=r"revision = 'main'.* folder.*; omit"):
        open_checkpoint(nomic, revision="main")


def test_a_hub_id_is_downloaded_at_its_revision(nomic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[tuple[str, str | None]] = []

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        requested.append((repo_id, revision))
        return str(nomic)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name", revision="abc")
    assert (checkpoint.name, checkpoint.folder, requested) == ("owner/name", nomic, [("owner/name", "abc")])


def test_only_files_that_are_read_are_downloaded(nomic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "adapter_config.json",
        "added_tokens.json",
        "artifact.metadata",
        "colbert_linear.safetensors",
        "config.json",
        "config_sentence_transformers.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "sentence_bert_config.json",
        "sentencepiece.bpe.model",
        "sparse_linear.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    not_needed = [
        "2_Dense/pytorch_model.bin",
        "adapter_model.safetensors",
        "README.md",
        "data_config.json",
        "modeling_hf_nomic_bert.py",
        "onnx/config.json",
        "onnx/model.onnx",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        "retrieval_query/adapter_config.json",
        "retrieval_query/adapter_model.safetensors",
        "rust_model.ot",
        "training_args.bin",
    ]

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert sorted(filter_repo_objects(needed + not_needed, allow_patterns=allow_patterns)) == needed
        return str(nomic)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    open_checkpoint("owner/name")


HTTP = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]  # httpx, or httpx2 since huggingface_hub 2


@pytest.mark.parametrize(
    "error", [OSError("is gated"), HTTP.ConnectError("no route"), HTTP.ProxyError("407"), HFValidationError("name")]
)
def test_an_error_of_the_hub_is_a_checkpoint_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=rf"'owner/name' \(revision None\).*{type(error).__name__}: {error}"):
        open_checkpoint("owner/name")


def test_an_error_of_another_http_client_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub 2 uses httpx2, and httpx is not installed with it."""

    class OtherError(Exception): ...

    def snapshot_download(repo_id: str, **options: object) -> str:
        raise OtherError("no route")

    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.setattr(huggingface_hub.errors, "HfHubHTTPError", type("HfHubHTTPError", (OtherError,), {}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="OtherError: no route"):
        open_checkpoint("owner/name")


def test_a_model_that_is_not_cached_raises_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/not-in-the-cache", "no such: name"):
        with pytest.raises(CheckpointError, match="cannot be fetched from the hub"):
            open_checkpoint(name)


def test_errors_are_subclasses_of_unpadded_error() -> None:
    assert issubclass(ConfigError, CheckpointError) and issubclass(WeightsError, CheckpointError)
    assert issubclass(CheckpointError, UnpaddedError) and issubclass(OptionError, UnpaddedError)
