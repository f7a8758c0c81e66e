"""Options of `load` and `encode`: described once, typed, and cheap to import; the public names of the package."""

import asyncio
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

import unpadded
from unpadded.errors import OptionError
from unpadded.options import REPLACEMENTS, EncodeKeywords, EncodeOptions, LoadKeywords, LoadOptions, describe

PUBLIC_MEMBERS = {
    "aembed",
    "aencode",
    "ascore",
    "checkpoint",
    "close",
    "describe",
    "dimensions",
    "embed",
    "encode",
    "encode_sparse",
    "rank",
    "score",
    "stream",
    "token_embeddings",
    "tokenizer",
}


@pytest.mark.parametrize(("options", "keywords"), [(LoadOptions, LoadKeywords), (EncodeOptions, EncodeKeywords)])
def test_keywords_are_the_fields_of_the_options(options, keywords):
    types = {name: reference.__forward_arg__ for name, reference in keywords.__annotations__.items()}
    assert types == {field.name: field.type for field in fields(options)}


@pytest.mark.parametrize("options", [LoadOptions, EncodeOptions])
def test_every_option_is_described(options):
    rows = describe(options)
    assert [row.name for row in rows] == [field.name for field in fields(options)]
    assert {row.name: row.default for row in rows} == vars(options())
    assert all(row.help and row.type and not row.help.endswith(".") for row in rows)


def test_describe_returns_the_choices_of_a_literal():
    rows = {row.name: row for row in describe(EncodeOptions)}
    assert rows["truncation"].choices == ("right", "left", "error") and rows["task"].choices is None
    assert rows["dimensions"].metavar == "N" and rows["dimensions"].type == "int | None"


def test_options_are_frozen_and_reject_unknown_names():
    with pytest.raises(FrozenInstanceError):
        EncodeOptions().task = "search_query"
    with pytest.raises(TypeError, match="tsak"):
        EncodeOptions(tsak="search_query")
    with pytest.raises(OptionError, match="precision is unknown: 'int4'; use one of float32"):
        EncodeOptions(precision="int4")


@pytest.mark.parametrize(
    ("method", "keywords", "action"),
    [
        ("encode", {"batch_size": 32}, "batch_size is not an option; omit it, or pass token_budget= to load"),
        ("embed", {"show_progress_bar": True}, "pass show_progress="),
        ("encode", {"convert_to_numpy": False}, "pass output='numpy' or output='list' to encode"),
        ("stream", {"convert_to_tensor": True}, "pass output='torch' to encode"),
        ("token_embeddings", {"device": "cuda"}, "pass it to load"),
        ("encode", {"normalize_embeddings": True}, "pass normalize="),
        ("aembed", {"prompt_name": "query"}, "pass task="),
        ("encode", {"truncate_dim": 64}, "pass dimensions="),
        ("encode", {"output_value": "token_embeddings"}, "call token_embeddings"),
        ("encode", {"tsak": "query"}, "tsak is not an option; use one of task, prompt, dimensions"),
        ("load", {"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ("load", {"model_kwargs": {}}, "pass dtype= and attention="),
        ("load", {"tokenizer_kwargs": {}}, "pass max_length="),
        ("load", {"token": "secret"}, "HF_TOKEN"),
        ("load", {"torch_dtype": "float16"}, "torch_dtype is not an option; use one of device, dtype, attention"),
        ("load", {"task": "x"}, "task is not an option; use one of device, dtype"),
    ],
)
def test_keywords_of_sentence_transformers_raise_with_what_to_use(minilm_engine, method, keywords, action):
    with pytest.raises(OptionError, match=re.escape(action)):
        if method == "load":
            unpadded.load("any", **keywords)
        elif method == "aembed":
            asyncio.run(minilm_engine.aembed(["a"], **keywords))
        else:
            getattr(minilm_engine, method)(["a"], **keywords)


def test_replacements_name_options_and_are_no_options():
    words = {*vars(LoadOptions()), *vars(EncodeOptions()), "output", "show_progress"}
    assert all(set(re.findall(r"(\w+)=", text)) <= words for text in REPLACEMENTS.values())
    assert REPLACEMENTS.keys() & words == {"device"}


def test_options_import_neither_torch_nor_numpy():
    code = "import sys, unpadded.options; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_lists_its_public_names():
    assert dir(unpadded) == sorted(unpadded.__all__)
    assert {"Embeddings", "Engine", "OptionError", "__version__", "embed", "load"} <= set(dir(unpadded))
    assert all(hasattr(unpadded, name) for name in dir(unpadded))
    with pytest.raises(AttributeError, match="no attribute 'accelerate'"):
        unpadded.accelerate  # noqa: B018


def test_an_engine_lists_only_members_for_users():
    assert {name for name in dir(unpadded.Engine) if not name.startswith("_")} == PUBLIC_MEMBERS
