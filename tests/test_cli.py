"""The command line: tests of files and flags use a fake engine, tests of vectors use real weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from support.forks import ENVIRONMENT, ForkedProcess, run_cli

import unpadded
from unpadded import bulk
from unpadded.cli.main import main
from unpadded.errors import InputError

TEXTS = ["a red house", "", "zwölf Boxkämpfer", "one", " two  spaces ", "日本語 テキスト", "last line"]
LONG_TEXT = 3  # words; the fake engine reports longer texts as truncated


def rows(texts: Iterable[str]) -> SimpleNamespace:
    """Return the results of the fake engine: each vector identifies its text."""
    texts = list(texts)
    words = [len(text.split()) for text in texts]
    vectors = np.array([[len(text), sum(map(ord, text)), 0.1] for text in texts], np.float32).reshape(-1, 3)
    return SimpleNamespace(
        vectors=vectors, token_counts=np.array(words, np.int64), truncated=np.array(words, np.int64) >= LONG_TEXT
    )


@dataclass
class FakeEngine:
    load_options: dict[str, Any] = field(default_factory=dict)
    text_options: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None  # raised after the first block

    def load(self, model: str, **options: Any) -> FakeEngine:
        self.load_options = {"model": model, **options}
        return self

    def embed(self, texts: list[str], **options: Any) -> SimpleNamespace:
        return rows(texts)

    def stream(self, texts: Iterable[str], **options: Any) -> Iterator[SimpleNamespace]:
        self.text_options = options
        iterator = iter(texts)
        while block := list(islice(iterator, 3)):
            yield rows(block)
            if self.failure is not None:
                raise self.failure


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(unpadded, "load", fake.load, raising=False)
    return fake


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def embed(*arguments: str | Path) -> int:
    return main(["embed", "-m", "fake", *map(str, arguments)])


def test_npy_has_one_row_per_line(engine: FakeEngine, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    assert embed(text_file, "-o", out) == 0
    np.testing.assert_array_equal(np.load(out), rows(TEXTS).vectors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy"]


def test_inputs_of_every_format_are_read_in_order(
    engine: FakeEngine, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = tmp_path / "in.jsonl"
    objects.write_text('{"body": "an object", "n": 1}\n"a string"\n')
    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": range(3000), "body": [f"row {i}" for i in range(3000)]}), table)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfby pipe\r\nno newline")))
    out = tmp_path / "out.jsonl"
    assert embed(table, "-", text_file, objects, "--column", "body", "-o", out) == 0

    texts = [f"row {i}" for i in range(3000)] + ["by pipe", "no newline", *TEXTS, "an object", "a string"]
    expected = rows(texts)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(texts)))
    assert [line["tokens"] for line in lines] == expected.token_counts.tolist()
    assert [line["truncated"] for line in lines] == expected.truncated.tolist()
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), expected.vectors)


def test_parquet_output_has_the_vectors_and_counts(engine: FakeEngine, tmp_path: Path) -> None:
    texts = [f"text {i} {'x ' * (i % 3)}" for i in range(10_000)]  # more than two row groups
    source, out = tmp_path / "in.txt", tmp_path / "out.parquet"
    source.write_text("\n".join(texts))
    assert embed(source, "-o", out) == 0
    table, expected = pq.read_table(out), rows(texts)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 3)
    np.testing.assert_array_equal(vectors, expected.vectors)
    assert table["tokens"].to_pylist() == expected.token_counts.tolist()
    assert table["truncated"].to_pylist() == expected.truncated.tolist()
    assert pq.ParquetFile(out).num_row_groups == 3


def test_without_output_json_lines_go_to_stdout(
    engine: FakeEngine, text_file: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert embed(text_file) == 0
    stdout, stderr = capsysbinary.readouterr()
    lines = [json.loads(line) for line in stdout.splitlines()]
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), rows(TEXTS).vectors)
    truncated = int(rows(TEXTS).truncated.sum())
    assert b"7 texts, 12 tokens in" in stderr and f"{truncated} truncated -> stdout".encode() in stderr


@pytest.mark.parametrize("ending", [".npy", ".jsonl", ".parquet"])
def test_an_empty_input_makes_an_empty_file(engine: FakeEngine, tmp_path: Path, ending: str) -> None:
    source, out = tmp_path / "in.txt", tmp_path / f"out{ending}"
    source.touch()
    assert embed(source, "-o", out) == 0
    if ending == ".npy":
        vectors = np.load(out)
        assert vectors.shape == (0, 3) and vectors.dtype == np.float32
    elif ending == ".jsonl":
        assert out.read_bytes() == b""
    else:
        assert pq.read_table(out).num_rows == 0
        assert pq.read_schema(out).field("embedding").type == pa.list_(pa.float32(), 3)


def test_flags_reach_the_engine(engine: FakeEngine, text_file: Path, tmp_path: Path) -> None:
    flags = "-t search_query --dimensions 64 --dtype bfloat16 --device cpu --attention sdpa --precision int8"
    more = "--rotary-scaling-factor 2 --truncation left --long-text mean --no-normalize --max-length 512"
    rest = "--token-budget 4096 --batch-invariant --revision main --prompt p:"
    assert embed(text_file, "-o", tmp_path / "out.npy", *flags.split(), *more.split(), *rest.split()) == 0
    assert engine.load_options == {
        "model": "fake",
        "device": "cpu",
        "dtype": "bfloat16",
        "attention": "sdpa",
        "rotary_scaling_factor": 2.0,
        "max_length": 512,
        "token_budget": 4096,
        "batch_invariant": True,
        "revision": "main",
    }
    assert engine.text_options == {
        "task": "search_query",
        "prompt": "p:",
        "dimensions": 64,
        "normalize": False,
        "precision": "int8",
        "ranges": None,
        "truncation": "left",
        "long_text": "mean",
        "show_progress": None,
    }


@pytest.mark.parametrize(("flag", "value"), [("config", "config"), ("none", None), ("2.5", 2.5)])
def test_rotary_scaling_factor_is_a_number_or_a_word(
    engine: FakeEngine, text_file: Path, tmp_path: Path, flag: str, value: object
) -> None:
    assert embed(text_file, "-o", tmp_path / "out.npy", "--rotary-scaling-factor", flag) == 0
    assert engine.load_options["rotary_scaling_factor"] == value


@pytest.mark.parametrize("flag", ["rotary-scaling-factor", "max-length", "token-budget", "dimensions"])
def test_a_flag_that_is_not_a_number_is_an_error(
    engine: FakeEngine, text_file: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert embed(text_file, f"--{flag}", "ten") == 2
    assert f"{flag.replace('-', '_')} is not a number: 'ten'; pass one such as" in capsys.readouterr().err


def test_inputs_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"line %d\n" % taken

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless()))
    found = islice(bulk.read_rows(["-"]), 5)
    assert [row.text for row in found if isinstance(row, bulk.Row)] == [f"line {i}" for i in range(1, 6)]
    assert taken == 5


@pytest.mark.parametrize("ending", [".npy", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("failure", "status"), [(KeyboardInterrupt(), 130), (InputError("text 3 is bad"), 2)])
def test_a_failed_run_leaves_the_folder_as_it_was(
    engine: FakeEngine,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ending: str,
    failure: BaseException,
    status: int,
) -> None:
    engine.failure = failure
    out = tmp_path / f"out{ending}"
    out.write_bytes(b"from an earlier run")
    assert embed(text_file, "-o", out) == status
    assert out.read_bytes() == b"from an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.txt", out.name])
    stderr = capsys.readouterr().err
    assert ("interrupted" if status == 130 else "unpadded: error: text 3 is bad") in stderr
    assert "Traceback" not in stderr


BAD_FILES = {
    "bad.jsonl": b'"fine"\n{"text": \n',
    "field.jsonl": b'{"title": "a", "body": "b"}\n',
    "number.jsonl": b'{"text": "a"}\n{"text": 12}\n',
    "list.jsonl": b'["a"]\n',
    "latin.txt": b"fine\nZ\xfcrich\n",
    "not.parquet": b"PAR1 and no more",
}


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["absent.txt"], "does not exist: 'absent.txt'", "pass a file"),
        (["folder"], "in the input folder: 'folder'", "pass another"),
        (["bad.jsonl"], "'bad.jsonl' line 2", "fix the line"),
        (["field.jsonl"], "'text': 'field.jsonl' line 1 has 'title', 'body'", "use one of these names"),
        (["number.jsonl"], "'number.jsonl' line 2: '12'", "use a string"),
        (["list.jsonl"], "'list.jsonl' line 1", "use a string"),
        (["latin.txt"], "'latin.txt' line 2", "save the file as UTF-8"),
        (["not.parquet"], "not a Parquet file: 'not.parquet'", "check the file"),
        (["good.parquet", "--column", "body"], "'body': 'good.parquet' has 'text', 'number'", "use one of these names"),
        (["good.parquet", "--column", "number"], "'number' of 'good.parquet' is int64", "pass another with --column"),
        (["good.parquet"], "'good.parquet' row 1 of 'text' is null", "use a string"),
        (["good.txt", "--column", "body"], "--column 'body'", "omit it"),
        (["good.txt", "-o", "out.csv"], "'out.csv'", "use one of .npy, .jsonl, .parquet"),
        (["good.txt", "-o", "out"], "'out'", "or a folder such as 'out/'"),
        (["good.txt", "-o", "absent/out.npy"], "'absent/out.npy'", "check its folder"),
        (["good.txt", "-o", "folder.npy"], "is a folder: 'folder.npy'", "pass a file name"),
        (["good.txt", "--ranges", "good.txt"], "'good.txt'", ".npy"),
        (["good.txt", "--ranges", "ranges.npy"], "'ranges.npy' (3,)", "[2, dimensions]"),
        (["good.jsonl", "-o", "good.jsonl"], "'good.jsonl'", "pass another name"),
    ],
)
def test_an_error_names_the_file_and_a_remedy(
    engine: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    value: str,
    remedy: str,
) -> None:
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("a\n")
    (tmp_path / "good.jsonl").write_text('"a"\n')
    np.save(tmp_path / "ranges.npy", np.zeros(3))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.npy").mkdir()
    pq.write_table(pa.table({"text": ["a", None], "number": [1, 2]}), tmp_path / "good.parquet")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert embed(*arguments, *([] if "-o" in arguments else ["-o", "out.npy"])) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("unpadded: error: ") and value in stderr and remedy in stderr and stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes past this size of a file fail, as they do when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", [".npy", ".jsonl", ".parquet"])
def test_a_full_disk_is_reported(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    source, out = tmp_path / "in.txt", tmp_path / f"out{ending}"
    source.write_text("".join(f"{'word' * (i % 97)} {i * 7919 % 10007}\n" for i in range(10_000)))
    with file_size_limit(4096):
        assert embed(source, "-o", out) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("unpadded: error: the output cannot be written") and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_reported(text_file: Path, minilm: Path) -> None:
    status, stderr = run_cli("embed", str(text_file), "-m", str(minilm), "--device", "cpu", stdout="/dev/full")
    assert status == 2
    assert stderr.startswith("unpadded: error: the output cannot be written: 'stdout'") and stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(tmp_path: Path, minilm: Path) -> None:
    source, pipe = tmp_path / "in.txt", tmp_path / "pipe"
    source.write_text("a line\n" * 2000)
    os.mkfifo(pipe)
    run = ForkedProcess(["embed", str(source), "-m", str(minilm), "--device", "cpu"], stdout=pipe)
    with run.stderr:
        with open(pipe) as stdout:
            assert json.loads(stdout.readline())["index"] == 0
        assert run.stderr.read() == ""
    assert run.wait() == 141


def test_ctrl_c_leaves_no_file(tmp_path: Path, minilm: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\n" * 100_000)
    run = ForkedProcess(["embed", str(source), "-m", str(minilm), "--device", "cpu", "-o", str(out)])
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".out.jsonl.*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    with run.stderr as stderr:
        assert stderr.read() == "unpadded: interrupted\n"
    assert run.wait() == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_every_format_has_the_vectors_of_the_engine(
    tmp_path: Path, minilm: Path, minilm_engine: unpadded.Engine, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    texts = ["What is the capital of Peru?", "Lima is the capital of Peru.", "", "word " * 400]
    source = tmp_path / "in.txt"
    source.write_text("\n".join(texts))
    flags = ["-m", str(minilm), "--device", "cpu", "--dimensions", "128"]
    expected = minilm_engine.embed(texts, dimensions=128)
    assert expected.truncated.tolist() == [False, False, False, True]

    for ending in (".npy", ".jsonl", ".parquet"):
        assert main(["embed", str(source), *flags, "-o", str(tmp_path / f"out{ending}")]) == 0
    assert main(["embed", str(source), *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (tmp_path / "out.jsonl").read_bytes() == capsysbinary.readouterr().out
    table = pq.read_table(tmp_path / "out.parquet")

    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected.vectors)
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), expected.vectors)
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected.vectors)
    for counts in ([line["tokens"] for line in lines], table["tokens"].to_pylist()):
        assert counts == expected.token_counts.tolist()
    for truncated in ([line["truncated"] for line in lines], table["truncated"].to_pylist()):
        assert truncated == [False, False, False, True]


def test_a_missing_model_is_reported(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "no-model"
    assert main(["embed", str(text_file), "-m", str(model), "-o", str(tmp_path / "out.npy")]) == 2
    assert str(model) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_info_describes_the_model_that_would_be_loaded(
    minilm: Path, minilm_engine: unpadded.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--json", str(minilm)]) == 0
    described = json.loads(capsys.readouterr().out)
    loaded = minilm_engine.describe()
    assert {name: loaded[name] for name in described.keys() & loaded.keys()} == {
        name: described[name] for name in described.keys() & loaded.keys()
    }
    with safe_open(minilm / "model.safetensors", "np") as file:
        stored = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    used = sum(size for name, size in stored.items() if "pooler" not in name and "position_ids" not in name)
    assert described["parameters"] == used
    assert described["memory"] == {"float32": 4 * used, "float16": 2 * used, "bfloat16": 2 * used}


def test_info_does_not_import_torch(minilm: Path) -> None:
    code = "import sys; from unpadded.cli.main import main\n"
    code += f"main(['info', {str(minilm)!r}]); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    *described, imported = ran.stdout.splitlines()
    assert imported == "False"
    assert any(line.split() == ["parameters", "22,565,376"] for line in described), described
    assert any(line.split() == ["float32", "86.1", "MiB"] for line in described), described


def test_info_reports_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("unpadded: error: ") and str(tmp_path) in stderr
