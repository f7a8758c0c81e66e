"""The command line: tests of files and flags use a fake engine, tests of vectors use real weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from support.forks import ENVIRONMENT, ForkedProcess, run_cli
from support.serving import wait_until

import unpadded
from unpadded import bulk
from unpadded.cli.main import _parser as parser
from unpadded.cli.main import main
from unpadded.errors import InputError
from unpadded.options import REPLACEMENTS

TEXTS = ["a red house", "zwölf Boxkämpfer", "one", " two  spaces ", "日本語 テキスト", "last line"]
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
    each_block: Callable[[], object] = bool

    def load(self, model: str, **options: Any) -> FakeEngine:
        self.load_options = {"model": model, **options}
        return self

    def embed(self, texts: list[str], **options: Any) -> SimpleNamespace:
        return rows(texts)

    def stream(self, texts: Iterable[str], **options: Any) -> Iterator[SimpleNamespace]:
        self.text_options = options
        advance = self.text_options.pop("show_progress")
        iterator = iter(texts)
        while block := list(islice(iterator, 3)):
            if callable(advance):
                advance(len(block), 7)
            self.each_block()
            yield rows(block)
            if self.failure is not None:
                raise self.failure


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(unpadded, "load", fake.load, raising=False)
    monkeypatch.setattr("unpadded.bulk.job.describe_vectors", lambda *arguments: {"model": "fake"})
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy", "out.npy.json"]


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
    assert b"unpadded: 6 texts, 12 tokens in" in stderr and f"{truncated} truncated".encode() in stderr
    assert stderr.endswith(b" -> stdout\n") and stderr.count(b"\n") == 1


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
    more = "--rotary-scaling-factor 2 --truncation left --no-normalize --max-length 512"
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
    reader, writer = os.pipe()
    with open(reader, "rb") as stdin, open(writer, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
        found = bulk.read_rows(["-"])
        for i in range(5):  # each line is read before the next one is written
            pipe.write(b"line %d\n" % i)
            row = next(found)
            assert isinstance(row, bulk.Row) and row.text == f"line {i}"


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
    assert embed(text_file, "-o", out, "--overwrite") == status
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
        (["absent.txt"], "'absent.txt' (No such file or directory)", "check the file"),
        (["folder"], "in the input folder: 'folder'", "pass another"),
        (["bad.jsonl"], "'bad.jsonl' line 2", "fix the line"),
        (["field.jsonl"], "'text': 'field.jsonl' line 1 has 'title', 'body'", "use one of these names"),
        (["number.jsonl"], "'number.jsonl' line 2: '12'", "use a string"),
        (["list.jsonl"], "'list.jsonl' line 1", "use a string"),
        (["latin.txt"], "not UTF-8 (byte 0xfc at character 2): 'latin.txt' line 2", "convert it to UTF-8"),
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
        (["good.jsonl", "-o", "good.jsonl", "--overwrite"], "replace an input: 'good.jsonl'", "pass another name"),
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


@pytest.mark.parametrize("ending", [".npy", ".jsonl", ".parquet"])
def test_an_output_is_overwritten_only_if_asked(
    engine: FakeEngine, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    out, rejects = tmp_path / f"out{ending}", tmp_path / f"out{ending}.rejects.jsonl"
    description: list[tuple[Path, list[str]]] = [(tmp_path / "out.npy.json", [])] if ending == ".npy" else []
    for existing, flags in ((out, []), (rejects, ["--on-error", "skip"]), *description):
        existing.write_bytes(b"mine")
        assert embed(text_file, "-o", out, *flags) == 2
        assert f"the output exists: '{existing}'; pass --overwrite" in capsys.readouterr().err
        assert existing.read_bytes() == b"mine" and not engine.load_options  # found before the model is loaded
        assert embed(text_file, "-o", out, *flags, "--overwrite") == 0
        assert existing.read_bytes() != b"mine"
        for path in tmp_path.glob("out*"):
            path.unlink()
        engine.load_options = {}


def test_a_summary_has_one_line_and_what_is_not_zero(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text('"one"\n')
    assert embed(source, "-o", out) == 0
    assert re.fullmatch(rf"unpadded: 1 text, 1 token in \d\.\d\d s -> {out}\n", capsys.readouterr().err)
    source.write_text('"one two three"\n\n{\n{\n' + '"one"\n' * 9)
    assert embed(source, "-o", out, "--on-error", "skip", "--overwrite") == 0
    pattern = (
        r"unpadded: 10 texts, 12 tokens in \d\.\d\d s \([\d,]+ tokens/s\), 1 truncated, 2 skipped, "
        rf"1 blank line left out, 2\.5x less work than padded batches of 32 -> {out}\n"
    )
    assert re.fullmatch(pattern, capsys.readouterr().err)


def monkeypatched_stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Return a new stderr, which can be read while threads write to it."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def test_a_job_reports_its_progress_without_a_terminal(
    engine: FakeEngine, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpadded.bulk.progress.REPORT_SECONDS", 0.05)
    stderr = monkeypatched_stderr(monkeypatch)
    expected, times = iter(["unpadded: computing the first batch", "unpadded: 6 texts of about 6"]), []

    def wait_for_report() -> None:
        times.append(time.perf_counter())
        line = next(expected)
        wait_until(lambda: any(found.startswith(line) for found in stderr.getvalue().split("\n")[:-1]))
        times.append(time.perf_counter())

    engine.each_block = wait_for_report
    assert embed(text_file, "-o", tmp_path / "out.npy") == 0
    first, *_, last, summary = stderr.getvalue().splitlines()
    assert first == "unpadded: computing the first batch, which also prepares the kernels"
    assert re.fullmatch(r"unpadded: 6 texts of about 6, 0 s left, [\d,]+ tokens/s", last), last
    seconds = re.match(r"unpadded: 6 texts, 12 tokens in (\d+\.\d\d) s", summary)
    assert seconds is not None and float(seconds[1]) >= times[-1] - times[0] - 0.01
    stderr = monkeypatched_stderr(monkeypatch)
    engine.each_block = lambda: time.sleep(0.2)
    assert embed(text_file, "-o", tmp_path / "out.npy", "--overwrite", "--quiet") == 0
    assert stderr.getvalue() == ""


def test_loading_says_what_it_waits_for(
    engine: FakeEngine, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = monkeypatched_stderr(monkeypatch)
    monkeypatch.setattr("unpadded.cli.terminal.WAIT_SECONDS", 0.05)

    def load(model: str, **options: Any) -> FakeEngine:
        wait_until(lambda: stderr.getvalue() == "unpadded: loading fake\n")
        return engine

    monkeypatch.setattr(unpadded, "load", load)
    assert embed(text_file, "-o", tmp_path / "out.npy") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "--dimensoins", "3"], "unknown option: '--dimensoins'; did you mean --dimensions?"),
        (["embed", "--over-write=1"], "unknown option: '--over-write=1'; did you mean --overwrite?"),
        (["embed", "--long-text", "mean"], f"unknown option: '--long-text'; {REPLACEMENTS['long_text']}"),
        (["embed", "--xyzzy"], "unknown option: '--xyzzy'; see unpadded embed --help"),
        (["info", "--jason"], "unknown option: '--jason'; did you mean --json?"),
        (["info", "also"], "unknown argument: 'also'; see unpadded info --help"),
    ],
)
def test_a_mistyped_option_shows_its_command_and_the_nearest_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command, *rest = arguments
    with pytest.raises(SystemExit, match="2"):
        main([command, "x", *(["-m", "fake"] if command == "embed" else []), *rest])
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"usage: unpadded {command} ") and stderr.endswith(f"error: {message}\n")


def test_the_version_and_the_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[Any] = []
    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=parsers.append))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"unpadded {unpadded.__version__}\n"
    assert "embed" in parsers[0].format_help() and "argcomplete" in parsers[0].format_help()


def test_the_environment_names_the_model(
    engine: FakeEngine, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("UNPADDED_MODEL", raising=False)
    for _ in range(2):
        with pytest.raises(SystemExit, match="2"):
            main(["embed", str(text_file)])
        assert "required: -m/--model" in capsys.readouterr().err
        monkeypatch.setenv("UNPADDED_MODEL", "")
    monkeypatch.setenv("UNPADDED_MODEL", "absent/")
    assert main(["embed", str(text_file)]) == 0 and engine.load_options["model"] == "absent/"
    assert main(["embed", str(text_file), "-m", "fake", "-o", "-"]) == 0 and engine.load_options["model"] == "fake"
    assert main(["info"]) == 2
    assert "absent" in capsys.readouterr().err
    assert parser().parse_args(["serve"]).models == ["absent/"]
    assert parser().parse_args(["serve", "a", "b", "--port", "0"]).models == ["a", "b"]
    monkeypatch.delenv("UNPADDED_MODEL")
    with pytest.raises(SystemExit, match="2"):
        main(["serve"])
    assert "required: MODEL" in capsys.readouterr().err


def test_special_outputs_are_errors_or_work(
    engine: FakeEngine, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, fifo = tmp_path / "loop.npy", tmp_path / "fifo.jsonl"
    loop.symlink_to(loop)
    os.mkfifo(fifo)
    (tmp_path / "target").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "target/out.npy")
    errors = {
        loop: "Too many levels of symbolic links",
        fifo: "not a regular file",
        tmp_path / ("x" * 300 + ".npy"): "File name too long",
        text_file / "out.npy": "Not a directory",
    }
    for out, problem in errors.items():
        assert embed(text_file, "-o", out, "--overwrite") == 2
        stderr = capsys.readouterr().err
        assert problem in stderr and str(out) in stderr and stderr.count("\n") == 1 and not engine.load_options
    assert fifo.is_fifo() and loop.is_symlink()
    longest = tmp_path / ("ü" * 118 + ".npy")  # 240 bytes; with the ending of the rejects, more than 255
    for out in (longest, tmp_path / os.fsdecode(b"n\xffme.jsonl"), tmp_path / "link.npy"):
        assert embed(text_file, "-o", out) == 0
        assert out.stat().st_size > 100
    assert (tmp_path / "target/out.npy").is_file() and (tmp_path / "link.npy").is_symlink()
    assert not list(tmp_path.rglob(".*"))
    assert r"n\udcffme.jsonl" in capsys.readouterr().err


def test_names_that_are_not_utf_8_are_printed(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "\\udcff": "b"}\n')
    assert embed(source, "-o", tmp_path / "out.parquet", "--carry", "\udcff") == 2
    assert embed(source, "-o", tmp_path / "out.parquet", "--column", "\udcfe") == 2
    assert embed(tmp_path / "\udcff.txt") == 2
    assert main(["info", str(tmp_path / "\udcff")]) == 2
    assert capsys.readouterr().err.count("unpadded: error: ") == 4


def test_an_error_of_the_system_has_no_traceback(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(bulk, "make_job", fail)
    assert embed("in.txt") == 2
    assert capsys.readouterr().err == (
        f"unpadded: error: '{tmp_path}' cannot be used: No space left on device; check it and the free disk space\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stderr_does_not_stop_a_command(text_file: Path, tmp_path: Path, minilm: Path) -> None:
    setup = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
    for arguments, status in ((["-o", str(tmp_path / "out.npy")], 0), (["--unknown"], 2)):
        run = ForkedProcess(["embed", str(text_file), "-m", str(minilm), "--device", "cpu", *arguments], setup=setup)
        with run.stderr:
            assert run.wait() == status
    assert np.load(tmp_path / "out.npy").shape == (6, 384)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_reported(text_file: Path, minilm: Path) -> None:
    flags = ["-m", str(minilm), "--device", "cpu", "--quiet"]
    status, stderr = run_cli("embed", str(text_file), *flags, stdout="/dev/full")
    assert status == 2
    assert stderr.startswith("unpadded: error: the output cannot be written: 'stdout'") and stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(tmp_path: Path, minilm: Path) -> None:
    source, pipe = tmp_path / "in.txt", tmp_path / "pipe"
    source.write_text("a line\n" * 2000)
    os.mkfifo(pipe)
    run = ForkedProcess(["embed", str(source), "-m", str(minilm), "--device", "cpu", "--quiet"], stdout=pipe)
    with run.stderr:
        with open(pipe) as stdout:
            assert json.loads(stdout.readline())["index"] == 0
        assert run.stderr.read() == ""
    assert run.wait() == 141


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_no_file(tmp_path: Path, minilm: Path, name: str, status: int) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\n" * 100_000)
    flags = ["-m", str(minilm), "--device", "cpu", "--quiet"]  # a busy machine would report what it waits for
    run = ForkedProcess(["embed", str(source), *flags, "-o", str(out)])
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".out.jsonl.*")))
    run.send_signal(getattr(signal, name))
    with run.stderr as stderr:
        assert stderr.read() == f"unpadded: {'interrupted' if name == 'SIGINT' else f'stopped by {name}'}\n"
    assert run.wait() == status
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_every_format_has_the_vectors_of_the_engine(
    tmp_path: Path, minilm: Path, minilm_engine: unpadded.Engine, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    texts = ["What is the capital of Peru?", "Lima is the capital of Peru.", "a", "word " * 400]
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


def test_rerank_prints_the_order_of_sentence_transformers(
    rerankers: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sentence_transformers import CrossEncoder

    (tmp_path / "a.txt").write_text("a red house\n\nzwölf Boxkämpfer\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n{"body": "日本語 テキスト"}\n')
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"by pipe\nlast line")))
    texts = ["a red house", "zwölf Boxkämpfer", "one", "日本語 テキスト", "by pipe", "last line"]
    model = str(rerankers["bert"])
    original = CrossEncoder(model, device="cpu")
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-", "--column", "body"]
    command = ["rerank", "-m", model, "--device", "cpu", "--query", "a house", *inputs]
    for flags, options in (
        ([], {}),
        (["--top-k", "2", "--prompt", "red: "], {"top_k": 2, "prompt": "red: "}),
        (["--activation", "none", "--quiet"], {"activation_fn": torch.nn.Identity()}),
    ):
        sys.stdin.buffer.seek(0)
        assert main([*command, *flags]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        expected = original.rank("a house", texts, return_documents=True, **options)
        assert [(line["index"], line["text"]) for line in lines] == [
            (one["corpus_id"], one["text"]) for one in expected
        ]
        assert [line["score"] for line in lines] == pytest.approx([one["score"] for one in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "0"], "--top-k is not positive: 0; pass the number of texts to print"),
        (["--column", "body"], "--column 'body' applies to"),
        (["bad.jsonl"], "'bad.jsonl' line 2"),
        (["none.txt"], "'none.txt'"),
        (["-m", "MINILM"], "has no head for scores; load a reranker"),
        (["-m", "bert, 3 labels"], "gives 3 scores per pair, not one"),
    ],
)
def test_an_error_of_rerank_names_the_remedy(
    flags: list[str],
    message: str,
    rerankers: dict[str, Path],
    minilm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a red house\n")
    Path("bad.jsonl").write_text('{"text": "one"}\n{"text": 5}\n')
    folders = {"MINILM": str(minilm)} | {name: str(folder) for name, folder in rerankers.items()}
    command = ["rerank", "-m", folders["bert"], "--query", "q", "a.txt", *(folders.get(flag, flag) for flag in flags)]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and "Traceback" not in printed.err


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
    loaded = json.loads(json.dumps(minilm_engine.describe()))
    assert {name: loaded[name] for name in described.keys() & loaded.keys()} == {
        name: described[name] for name in described.keys() & loaded.keys()
    }
    with safe_open(minilm / "model.safetensors", "np") as file:
        stored = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    used = sum(size for name, size in stored.items() if "pooler" not in name and "position_ids" not in name)
    assert described["parameters"] == used
    assert list(described)[:5] == ["model", "dimensions", "matryoshka", "max_length", "prompts"]
    assert described["dimensions"] == 384
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
