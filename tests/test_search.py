"""`unpadded search` over files that `unpadded embed` wrote: the order of a full comparison, and errors by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import add_sentence_transformers_files, write_bert

import unpadded
from unpadded.cli import search
from unpadded.cli.main import main

TEXTS = [
    f"{noun} {verb} {place}" for noun in ("bread", "tide", "moon") for verb in ("rises", "falls") for place in "ab"
]
QUESTION = "what makes the tide rise?"
PROMPTS = {"search_query": "query: ", "search_document": "document: "}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_sentence_transformers_files(write_bert(tmp_path_factory.mktemp("bert")))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "CHUNK_ROWS", 5)
    Path("in.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n{\n" for text in TEXTS))
    return tmp_path


def embed(model: Path, out: str, *flags: str) -> None:
    arguments = ["in.jsonl", "--column", "body", "--on-error", "skip", "-t", "search_document", "--quiet"]
    assert main(["embed", *arguments, "-m", str(model), "--device", "cpu", "-o", out, *flags]) == 0


def run(model: Path, *arguments: str) -> int:
    options = next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    vectors, flags = arguments[:options], arguments[options:]
    return main(["search", *vectors, QUESTION, *flags, "-m", str(model), "--device", "cpu"])


@pytest.mark.parametrize(
    ("out", "flags"),
    [
        ("v/", ["--carry", "body", "--part-rows", "5", "--dimensions", "7"]),
        ("v.parquet", ["--carry", "body", "--no-normalize", "--precision", "float16"]),
        ("v.npy", []),
    ],
)
def test_the_nearest_texts_are_printed_in_order(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], out: str, flags: list[str]
) -> None:
    embed(model, out, *flags)
    engine = unpadded.load(model, device="cpu")
    dimensions = 7 if out == "v/" else None
    vectors = engine.embed(TEXTS, task="search_document", dimensions=dimensions).vectors
    cosines = vectors @ engine.embed(QUESTION, task="search_query", dimensions=dimensions).vectors[0]
    order = np.argsort(-cosines)[:4]
    capsys.readouterr()
    assert run(model, out, "--top", "4") == 0
    stdout, stderr = capsys.readouterr()
    found = [line.split("  ") for line in stdout.splitlines()]
    assert [text for _, _, text in found] == [TEXTS[row] for row in order]
    assert stderr == "" or dimensions
    np.testing.assert_allclose([float(score) for score, _, _ in found], cosines[order], atol=6e-4)
    if out != "v.npy":
        assert [int(number) for _, number, _ in found] == [2 * row for row in order]  # rejected rows have numbers too

    assert run(model, out, out, "--top", "2", "-t", "search_document") == 0
    same = engine.embed(QUESTION, task="search_document", dimensions=dimensions).vectors[0] @ vectors.T
    scores = [float(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(scores, np.sort(same)[:-3:-1], atol=6e-4)  # a file that is named twice is read once


def test_texts_that_are_not_there_are_left_out(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, out in enumerate(("v.parquet", "v.npy")):
        embed(model, out)
        os.utime("in.jsonl", ns=(0, number))
        assert run(model, out, "--top", "2") == 0
        stdout, stderr = capsys.readouterr()
        assert all(len(line.split("  ")) == 2 for line in stdout.splitlines()) and "--carry text" in stderr
    assert f"an input is missing or changed: '{folder / 'in.jsonl'}'" in stderr


def test_an_unfinished_dataset_is_searched_and_named(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(model, "v/", "--carry", "body", "--part-rows", "5")
    manifest = Path("v/_manifest.json")
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    assert run(model, "v/", "--top", "1") == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.count("\n") == 1 and "the job that writes 'v/' is not finished" in stderr


def test_vectors_that_cannot_be_searched_are_errors(
    folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = add_sentence_transformers_files(write_bert(tmp_path_factory.mktemp("other"), seed=1))
    embed(model, "good.npy")
    embed(model, "v.parquet")
    embed(model, "bits.parquet", "--precision", "binary")
    pq.write_table(pa.table({"id": [1], "embedding": [[1.0]]}), "foreign.parquet")
    np.save("foreign.npy", np.ones((2, 3)))
    description = json.loads(Path("good.npy.json").read_text())
    for name, changed in (
        ("cut.npy", {}),
        ("settings.npy", {"settings": 3}),
        ("averaged.npy", {"settings": {"long_text": "mean"}}),
        ("wide.npy", {}),
    ):
        Path(f"{name}.json").write_text(json.dumps(description | changed))
    Path("cut.npy").write_bytes(Path("good.npy").read_bytes()[:-7])
    for name in ("settings.npy", "averaged.npy"):
        Path(name).write_bytes(Path("good.npy").read_bytes())
    np.save("wide.npy", np.ones((2, 3)))
    os.mkdir("empty")
    Path("a.txt").touch()
    for name, message in {
        "bits.parquet": "needs float32 or float16 vectors: these are 'binary'",
        "foreign.parquet": "do not say which model made them: 'foreign.parquet'",
        "foreign.npy": "'foreign.npy.json' (No such file or directory)",
        "settings.npy": "do not say which model made them: 'settings.npy'",
        "averaged.npy": "long_text is not an option; split long texts",
        "cut.npy": "cannot be read: 'cut.npy'",
        "wide.npy": "'wide.npy' has (2, 3)",
        "empty": "no .parquet: 'empty'",
        "a.txt": "unknown ending: 'a.txt'",
        "absent.parquet": "cannot be read: 'absent.parquet'",
    }.items():
        assert run(model, name) == 2, name
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1, stderr
    assert run(model, "v.parquet", "--top", "0") == 2
    for name in ("v.parquet", "good.npy"):
        assert run(other, name) == 2
        assert f"of another model: '{name}'" in capsys.readouterr().err
