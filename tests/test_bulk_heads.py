"""Bulk jobs for spans, sparse weights and token vectors: the values of the engine, resuming, and rejected flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.checkpoints import write_nomic
from support.late_interaction import write_stanford
from support.rerankers import SIZES, draw_pairs, write_reranker
from test_bulk import Killed, contents, stop_at
from transformers import BertConfig, BertForMaskedLM

import unpadded
from unpadded.cli.main import main

TEXTS = [f"{first} Tides rise. {second}" for first, second in draw_pairs(12)] + ["Bread. " * 40, "Sea.", "Sea."]
MODEL_OF = {"spans": "nomic", "sparse": "splade", "tokens": "colbert"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, unpadded.Engine]:
    """Return engines whose windows have four texts."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig(**SIZES, vocab_size=30522, max_position_embeddings=64))
    folders = {
        "nomic": write_nomic(root / "nomic", hidden=64, heads=1),
        "splade": write_reranker(root / "splade", "splade", masked),
        "colbert": write_stanford(root / "colbert"),
    }
    found = {name: unpadded.load(folder, device="cpu") for name, folder in folders.items()}
    for engine in found.values():
        engine._pipeline.reader.max_texts = 4
    return found


@pytest.fixture
def source(engines: dict[str, unpadded.Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(unpadded, "load", lambda model, **options: engines[model], raising=False)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text, "doc": f"d{index}", "n": index}) for index, text in enumerate(TEXTS)]
    Path("in.jsonl").write_text("\n".join(lines))
    return "in.jsonl"


def embed(result: str, *arguments: str) -> int:
    return main(["embed", "in.jsonl", "-m", MODEL_OF[result], f"--{result}", *arguments])


def read(name: str) -> pa.Table:
    table = pq.read_table(name)
    table.validate(full=True)
    return table


def description(name: str) -> Any:
    return json.loads(pq.read_schema(name).metadata[b"unpadded"])


@pytest.mark.parametrize("output", ["out.parquet", "out/"])
def test_spans_have_one_row_each(source: str, output: str, engines: dict[str, unpadded.Engine]) -> None:
    flags = ["--span-tokens", "12", "--overlap", "3", "-t", "search_document", "--dimensions", "32"]
    parts = ["--part-rows", "6"] if output == "out/" else []
    assert embed("spans", *flags, *parts, "-o", output, "--id-column", "doc", "--carry", "n") == 0
    found = read(output)
    expected = engines["nomic"].encode_spans(TEXTS, span_tokens=12, overlap=3, task="search_document", dimensions=32)
    assert len(expected.text_index) > 2 * len(TEXTS)
    assert found.column_names == ["id", "embedding", "start", "end", "tokens", "n"]
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert np.array_equal(np.array(found["embedding"].to_pylist(), np.float32), expected.vectors)
    assert list(zip(found["start"].to_pylist(), found["end"].to_pylist(), strict=True)) == [
        tuple(bounds) for bounds in expected.bounds.tolist()
    ]
    assert found["tokens"].to_pylist() == expected.token_counts.tolist()
    assert found["id"].to_pylist() == [f"d{index}" for index in expected.text_index]
    assert found["n"].to_pylist() == [str(index) for index in expected.text_index]
    if parts:
        names = sorted(path.name for path in Path(output).glob("part-*"))
        assert [len({*read(f"out/{name}")["id"].to_pylist()}) for name in names] == [6, 6, 3]
    else:
        assert (description(output)["result"], description(output)["settings"]["span_tokens"]) == ("spans", 12)


def test_row_groups_count_texts(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpadded.bulk.writers.LARGE_GROUP_ROWS", 5)
    for result in ("spans", "tokens"):
        assert embed(result, "-o", f"{result}.parquet") == 0
        file = pq.ParquetFile(f"{result}.parquet")
        assert [{*file.read_row_group(group)["id"].to_pylist()} for group in range(file.num_row_groups)] == [
            {*range(start, start + 5)} for start in range(0, len(TEXTS), 5)
        ]


@pytest.mark.parametrize("top_k", [None, 5])
def test_sparse_weights_are_lists(source: str, top_k: int | None, engines: dict[str, unpadded.Engine]) -> None:
    flags = [] if top_k is None else ["--top-k", str(top_k)]
    assert embed("sparse", *flags, "-o", "out.parquet", "--carry", "n") == 0
    found, expected = read("out.parquet"), engines["splade"].encode_sparse(TEXTS, top_k=top_k)
    assert found.column_names == ["id", "ids", "weights", "tokens", "truncated", "n"]
    assert [found.schema.field(name).type for name in ("ids", "weights")] == [
        pa.list_(pa.int32()),
        pa.list_(pa.float32()),
    ]
    for name, values in (("ids", expected.ids), ("weights", expected.weights)):
        parts = np.split(values, expected.indptr[1:-1])
        assert found[name].to_pylist() == [part.tolist() for part in parts]
    assert found["tokens"].to_pylist() == expected.token_counts.tolist()
    assert found["truncated"].to_pylist() == expected.truncated.tolist() and expected.truncated.any()
    assert "dimensions" not in description("out.parquet")["settings"]


@pytest.mark.parametrize("options", [{}, {"kind": "query"}, {"pool_factor": 2.0}], ids=["document", "query", "pooled"])
def test_token_vectors_are_lists_of_vectors(
    source: str, options: dict[str, Any], engines: dict[str, unpadded.Engine]
) -> None:
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert embed("tokens", *flags, "-o", "out.parquet") == 0
    found, expected = read("out.parquet"), engines["colbert"].encode_tokens(TEXTS, **options)
    assert found.column_names == ["id", "vectors", "tokens", "truncated"]
    assert found.schema.field("vectors").type == pa.list_(pa.list_(pa.float32(), expected.vectors.shape[1]))
    for one, other in zip(found["vectors"].to_pylist(), expected, strict=True):
        assert np.array_equal(np.array(one, np.float32), other)
    assert found["tokens"].to_pylist() == expected.token_counts.tolist()
    assert found["truncated"].to_pylist() == expected.truncated.tolist() and expected.truncated.any()


@pytest.mark.parametrize("result", MODEL_OF)
def test_resuming_writes_the_same_bytes(source: str, result: str) -> None:
    flags = ["--part-rows", "5", "--carry", "n"]
    with pytest.MonkeyPatch.context() as counting:
        steps = stop_at(counting, 10**6)
        assert embed(result, "-o", "whole/", *flags) == 0
    whole = contents(Path("whole"))
    assert len(whole) == 4
    for step in range(1, steps[0] + 1, 3):
        out = f"stopped{step}/"
        with pytest.MonkeyPatch.context() as stopping, pytest.raises(Killed):
            stop_at(stopping, step)
            embed(result, "-o", out, *flags)
        assert embed(result, "-o", out, *flags, "--resume") == 0
        assert contents(Path(out)) == whole, step


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--spans", "--span-tokens", "20"], "settings.span_tokens 12, this run 20"),
        (["--spans", "--span-tokens", "12", "--overlap", "1"], "settings.overlap 0, this run 1"),
        ([], "layout.result 'spans', this run 'vectors'"),
    ],
    ids=["span_tokens", "overlap", "result"],
)
def test_another_result_is_not_resumed(
    source: str, flags: list[str], difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed("spans", "--span-tokens", "12", "-o", "out/") == 0
    assert main(["embed", source, "-m", "nomic", *flags, "-o", "out/", "--resume"]) == 2
    assert difference in capsys.readouterr().err


@pytest.mark.parametrize("result", MODEL_OF)
def test_an_empty_input_gives_an_empty_file(source: str, result: str) -> None:
    assert embed(result, "-o", "some.parquet") == 0
    Path(source).write_text("")
    assert embed(result, "-o", "none.parquet") == 0
    assert len(read("none.parquet")) == 0 and read("none.parquet").schema == read("some.parquet").schema


@pytest.mark.parametrize("result", MODEL_OF)
def test_a_search_needs_one_vector_per_text(source: str, result: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed(result, "-o", "out.parquet") == 0
    assert main(["search", "out.parquet", "tides", "-m", MODEL_OF[result]]) == 2
    message = f"a search needs one vector per text: 'out.parquet' has {result}; embed without --{result}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--spans --sparse -o out/", "argument --sparse: not allowed with argument --spans"),
        ("--spans -o out.npy", "--spans needs a Parquet output: 'out.npy'"),
        ("--sparse -o out.jsonl", "--sparse needs a Parquet output: 'out.jsonl'"),
        ("--tokens", "--tokens needs a Parquet output: 'stdout'"),
        ("--spans --precision int8 -o out/", "--precision is not supported with --spans: 'int8'; omit it"),
        ("--spans --truncation error -o out/", "--truncation is not supported with --spans: 'error'; omit it"),
        ("--sparse --dimensions 8 -o out/", "--dimensions is not supported with --sparse: 8; omit it"),
        ("--tokens --no-normalize -o out/", "--normalize is not supported with --tokens: False; omit it"),
        ("--tokens -t query -o out/", "--task is not supported with --tokens: 'query'; omit it"),
        ("--overlap 3 -o out/", "--overlap needs --spans: 3; add it, or omit --overlap"),
        ("--spans --top-k 3 -o out/", "--top-k needs --sparse: 3"),
        ("--sparse --top-k 0 -o out/", "--top-k is not positive: 0"),
        ("--sparse --kind query -o out/", "--kind needs --tokens: 'query'"),
        ("--spans --carry start -o out/", "the output would have a column twice: 'start'"),
        ("--spans --overlap 256 -o out/", "overlap"),
        ("--tokens --pool-factor 0.5 -o out/", "pool_factor is 0.5"),
        ("--sparse -o out/", "has no head for sparse weights"),
        ("--tokens -o out/ --ray local", "--tokens is not supported with --ray 'local'; omit one of them"),
    ],
)
def test_flags_that_do_not_apply_are_rejected(
    source: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "colbert" if "--pool-factor" in flags else "nomic"
    try:
        assert main(["embed", source, "-m", model, *flags.split()]) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    assert message in capsys.readouterr().err
    assert not list(Path("out").glob("*.parquet"))
