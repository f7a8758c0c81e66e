"""Bulk jobs over real files with a real model: reading, writing, and resuming after a kill."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from support.forks import ForkedProcess
from support.serving import HANG_SECONDS, wait_until

import unpadded
from unpadded.bulk import RejectedRow, Row, read_rows
from unpadded.bulk.dataset_output import open_dataset_output
from unpadded.bulk.formats import expand_inputs
from unpadded.bulk.writers import OutputColumns
from unpadded.cli.main import main

ROOT = Path(__file__).parents[1]
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
TEXTS = [" ".join(WORDS[start : start + 3 + start % 7]) for start in range(0, 1500, 4)]  # 375 English texts


@pytest.fixture
def engine(minilm_engine: unpadded.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> unpadded.Engine:
    """The engine that `--model loaded` refers to."""
    monkeypatch.setattr(unpadded, "load", lambda model, **options: minilm_engine, raising=False)
    monkeypatch.chdir(tmp_path)
    return minilm_engine


def embed(*arguments: str | Path) -> int:
    return main(["embed", "-m", "loaded", *map(str, arguments)])


def write_jsonl(path: Path, texts: list[str], invalid: dict[int, bytes] | None = None) -> Path:
    lines = [json.dumps({"text": text, "doc": f"d{i}", "n": i}).encode() for i, text in enumerate(texts)]
    for index, line in (invalid or {}).items():
        lines[index] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def vectors_of(table: pa.Table) -> np.ndarray:
    vectors = table["embedding"].combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(table), -1)


def write_every_format(folder: Path) -> list[str]:
    """Write the same nine texts in every input format, with a column of ids where the format has columns."""
    texts = ["plain", "zwölf Boxkämpfer", 'with "quotes", commas', "日本語", *TEXTS[:5]]
    names = [f"d{i}" for i in range(len(texts))]
    lines = "".join(json.dumps({"doc": name, "text": text}) + "\n" for name, text in zip(names, texts, strict=True))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pd.DataFrame({"doc": names, "text": texts}).to_csv(folder / "c.csv", index=False)
    (folder / "d.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (folder / "c.csv").read_bytes()))
    pq.write_table(pa.table({"doc": names, "text": texts}), folder / "e.parquet", row_group_size=2)
    (folder / "f.txt").write_text("\n".join(texts))
    (folder / "g.txt.gz").write_bytes(gzip.compress("\r\n".join(texts).encode()))
    return texts


def test_a_folder_reads_the_same_texts_from_files_of_every_format(tmp_path: Path) -> None:
    texts = write_every_format(tmp_path)
    for hidden in ("_manifest.json", ".hidden.txt", "notes.md", "picture.png"):
        (tmp_path / hidden).write_bytes(b"\xff not UTF-8")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/z.txt").write_text("last")
    files = expand_inputs([str(tmp_path)])
    assert [Path(name).name for name in files] == sorted(
        ["a.jsonl", "b.jsonl.gz", "c.csv", "d.csv.gz", "z.txt", "e.parquet", "f.txt", "g.txt.gz"],
        key=lambda name: "deeper/z.txt" if name == "z.txt" else name,
    )
    found = [row for row in read_rows(files) if isinstance(row, Row)]
    assert [row.number for row in found] == list(range(7 * len(texts) + 1))
    assert sorted(row.text for row in found) == sorted([*texts * 7, "last"])
    assert expand_inputs([str(tmp_path / "*.csv*")]) == [str(tmp_path / "c.csv"), str(tmp_path / "d.csv.gz")]


def test_reading_resumes_at_any_row(tmp_path: Path) -> None:
    write_every_format(tmp_path)
    files = expand_inputs([str(tmp_path / "*.*v*"), str(tmp_path / "*.jsonl*"), str(tmp_path / "e.parquet")])
    rows = [row for row in read_rows(files, extra_columns=["doc"]) if isinstance(row, Row)]
    assert len(rows) == 5 * 9 and [row.extra_values for row in rows[:9]] == [[f"d{i}"] for i in range(9)]
    for index, row in enumerate(rows):
        assert list(read_rows(files, extra_columns=["doc"], start=row.next_position)) == rows[index + 1 :]


def test_a_csv_field_may_be_long_and_have_several_lines(tmp_path: Path) -> None:
    long = "word " * 50_000
    (tmp_path / "in.csv").write_text(f'n,body\r\n1,"two\nlines"\r\n\r\n2,"{long}"\r\n3,a,b\r\n4,last\r\n', newline="")
    first, second, rejected, last = read_rows([str(tmp_path / "in.csv")], "body")
    assert isinstance(first, Row) and first.text == "two\nlines"
    assert isinstance(second, Row) and second.text == long
    assert isinstance(rejected, RejectedRow) and rejected.row == 6 and "3 fields for 2 columns" in rejected.error
    assert isinstance(last, Row) and last.text == "last" and last.number == 3


INVALID_ROWS = {
    "json.jsonl": (b'"fine"\n{"text": \n"fine"\n', 2, "not JSON"),
    "field.jsonl": (b'"fine"\n{"body": "b"}\n"fine"\n', 2, "no field 'text'"),
    "number.jsonl": (b'"fine"\n{"text": 12}\n"fine"\n', 2, "not a text"),
    "deep.jsonl": (b'"fine"\n' + b"[" * 100_000 + b'\n"fine"\n', 2, "not JSON"),
    "surrogate.jsonl": (b'"fine"\n"a \\ud800 alone"\n"fine"\n', 2, "not UTF-8"),
    "mixed.txt": (b"\xef\xbb\xbffine\nZ\xfcrich\nfine\n", 2, "not UTF-8"),
    "mixed.csv": ("text,é\nfine,\nZ".encode() + b"\xfcrich,\nfine,\n", 3, "not UTF-8"),
    "short.csv": (b"n,text\n1,fine\n2\n3,fine\n", 3, "1 fields for 2 columns"),
    "null.parquet": (pa.array(["fine", None, "fine"]), 1, "is null"),
    "latin.parquet": (
        pa.Array.from_buffers(
            pa.string(),
            3,
            [None, pa.py_buffer(np.array([0, 4, 10, 14], np.int32)), pa.py_buffer(b"fineZ\xfcrichfine")],
        ),
        1,
        "not UTF-8",
    ),
}


@pytest.mark.parametrize("name", INVALID_ROWS)
def test_an_invalid_row_is_reported_or_skipped(
    engine: unpadded.Engine, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, row, problem = INVALID_ROWS[name]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        pq.write_table(pa.table({"text": content}), name)
    assert embed(name, "-o", "out.npy") == 2
    where = f"{name!r} {'row' if name.endswith('.parquet') else 'line'} {row}"
    stderr = capsys.readouterr().err
    assert problem in stderr and where in stderr and stderr.count("\n") == 1

    assert embed(name, "-o", "out.npy", "--on-error", "skip") == 0
    assert "1 skipped" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load("out.npy"), engine.encode(["fine", "fine"]))
    (rejected,) = map(json.loads, Path("out.npy.rejects.jsonl").read_text().splitlines())
    assert rejected.keys() == {"file", "row", "error"} and (rejected["file"], rejected["row"]) == (name, row)
    assert problem in rejected["error"]

    assert embed(name, "-o", "parts/", "--on-error", "skip") == 0
    assert json.loads(Path("parts/_rejects.jsonl").read_text()) == rejected
    assert pq.read_table("parts")["id"].to_pylist() == [0, 2]


def test_a_truncated_gzip_file_is_an_error_even_if_invalid_rows_are_skipped(
    engine: unpadded.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.jsonl.gz").write_bytes(gzip.compress("\n".join(["{", *map(json.dumps, TEXTS)]).encode())[:-20])
    assert embed("in.jsonl.gz", "-o", "out.npy", "--on-error", "skip") == 2
    assert "'in.jsonl.gz'" in capsys.readouterr().err
    assert os.listdir() == ["in.jsonl.gz"]
    assert embed("in.jsonl.gz", "-o", "parts/", "--on-error", "skip") == 2
    assert os.listdir("parts") == []  # the reject that was written before the error is removed


def test_a_dataset_has_the_vectors_of_the_engine(engine: unpadded.Engine, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    flags = ["--part-rows", "150", "--id-column", "doc", "--carry", "n", "--dimensions", "96"]
    assert embed(source, "-o", "parts/", *flags) == 0
    expected = engine.embed(TEXTS, dimensions=96)
    names = ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet"]
    assert sorted(os.listdir("parts")) == ["_manifest.json", *names]
    assert [pq.ParquetFile(f"parts/{name}").metadata.num_rows for name in names] == [150, 150, 75]
    assert pq.ParquetFile(f"parts/{names[0]}").metadata.row_group(0).column(1).compression == "ZSTD"

    table = pyarrow.dataset.dataset("parts").to_table()
    assert table.schema.names == ["id", "embedding", "tokens", "truncated", "n"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 96)
    np.testing.assert_array_equal(vectors_of(table), expected.vectors)
    assert table["tokens"].to_pylist() == expected.token_counts.tolist()
    assert table["truncated"].to_pylist() == expected.truncated.tolist()
    assert table["id"].to_pylist() == [f"d{i}" for i in range(len(TEXTS))]
    assert table["n"].to_pylist() == [str(i) for i in range(len(TEXTS))]

    manifest = json.loads(Path("parts/_manifest.json").read_text())
    assert manifest["finished"] and [part["rows"] for part in manifest["parts"]] == [150, 150, 75]
    assert sum(part["tokens"] for part in manifest["parts"]) == expected.token_counts.sum()


@pytest.mark.parametrize("flags", [["-o", "parts/", "--part-rows", "8"], ["-o", "one.parquet"]])
def test_pandas_polars_and_duckdb_read_the_output(engine: unpadded.Engine, tmp_path: Path, flags: list[str]) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    assert embed(write_jsonl(tmp_path / "in.jsonl", TEXTS[:20]), *flags, "--carry", "doc,text") == 0
    path = "parts/*.parquet" if flags[1] == "parts/" else flags[1]
    duck = duckdb.sql(f"select * from '{path}' order by id")
    frames = {"pandas": pd.read_parquet(flags[1]), "polars": polars.read_parquet(path).to_pandas(), "duckdb": duck.df()}
    expected = engine.embed(TEXTS[:20])
    for tool, frame in frames.items():
        assert list(frame.columns) == ["id", "embedding", "tokens", "truncated", "doc", "text"], tool
        np.testing.assert_array_equal(np.stack(list(frame["embedding"])), expected.vectors, tool)
        assert frame["id"].tolist() == list(range(20)) and frame["text"].tolist() == TEXTS[:20], tool
        assert frame["tokens"].tolist() == expected.token_counts.tolist(), tool


def test_parquet_columns_keep_their_types(engine: unpadded.Engine) -> None:
    days = pa.array([0, 19_000, None], pa.date32())
    source = pa.table(
        {"text": TEXTS[:3], "key": pa.array([7, 8, 9], pa.int16()), "day": days, "tags": [["a"], [], None]}
    )
    pq.write_table(source, "in.parquet")
    for out in ("parts/", "one.parquet"):
        assert embed("in.parquet", "-o", out, "--id-column", "key", "--carry", "day,tags") == 0
        table = pq.read_table(out)
        assert table["id"].combine_chunks().equals(source["key"].combine_chunks())
        assert table["day"].combine_chunks().equals(days)
        assert table["tags"].combine_chunks().equals(source["tags"].combine_chunks())


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_vectors_keep_their_precision(engine: unpadded.Engine, tmp_path: Path, precision: Any) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:9])
    ranges = np.stack([np.full(384, -0.2, np.float32), np.full(384, 0.2, np.float32)])
    np.save("ranges.npy", ranges)
    if precision in ("int8", "uint8"):
        assert embed(source, "-o", "parts/", "--precision", precision) == 2
        assert not Path("parts").exists()
    assert embed(source, "-o", "parts/", "--precision", precision, "--ranges", "ranges.npy") == 0
    expected = engine.encode(TEXTS[:9], precision=precision, ranges=ranges)
    vectors = vectors_of(pq.read_table("parts"))
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)


def test_an_empty_input_makes_a_dataset_that_can_be_opened(engine: unpadded.Engine) -> None:
    Path("in.txt").touch()
    assert embed("in.txt", "-o", "parts/") == 0
    table = pq.read_table("parts")
    assert len(table) == 0 and table.schema.field("embedding").type == pa.list_(pa.float32(), 384)


def test_the_summary_reports_padding(engine: unpadded.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("\n".join(TEXTS))
    assert embed("in.txt", "-o", "parts/") == 0
    counts = engine.embed(TEXTS).token_counts
    padded = sum(len(batch) * max(batch) for batch in (counts[i : i + 32] for i in range(0, len(counts), 32)))
    stderr = capsys.readouterr().err
    seconds = re.search(r" in (\d+\.\d\d) s", stderr)
    assert seconds is not None
    less = f"{padded / counts.sum():.1f}x less work than padded batches of 32"
    assert stderr == f"unpadded: {len(TEXTS)} texts, {counts.sum():,} tokens in {seconds[1]} s, {less} -> parts/\n"


class Killed(BaseException):
    """Simulates a kill between two steps."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Raise instead of the sync or rename with this number and all later ones; return a list with their count."""
    steps = [0]

    def counted(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            steps[0] += 1
            if steps[0] >= step:
                raise Killed
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    return steps


def test_resuming_after_a_stop_at_every_step_writes_the_same_bytes(engine: unpadded.Engine, tmp_path: Path) -> None:
    invalid = {2: b"{", 3: b"{", 8: b'{"n": 1}', 11: b"12"}  # 8 rows remain: parts of 3, 3 and 2
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:12], invalid)
    flags = ["--part-rows", "3", "--on-error", "skip", "--carry", "n"]
    with pytest.MonkeyPatch.context() as counting:
        steps = stop_at(counting, 10**6)
        assert embed(source, "-o", "whole/", *flags) == 0
    whole = contents(Path("whole"))
    assert len(whole) == 5 and whole["_rejects.jsonl"].count(b"\n") == 4
    for step in range(1, steps[0] + 1):
        out = f"stopped{step}/"
        with pytest.MonkeyPatch.context() as stopping, pytest.raises(Killed):
            stop_at(stopping, step)
            embed(source, "-o", out, *flags)
        assert embed(source, "-o", out, *flags, "--resume") == 0
        assert contents(Path(out)) == whole, step


def test_resuming_after_ten_kills_at_random_moments_writes_the_same_bytes(tmp_path: Path, minilm: Path) -> None:
    draw = random.Random(0)
    invalid = dict.fromkeys((0, 1, 90, 200, 201, 202, 374), b'{"text": ')
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS, invalid)
    flags = ["-m", str(minilm), "--device", "cpu", "--part-rows", "4", "--on-error", "skip", "--carry", "doc,n"]
    command = ["embed", str(source), *flags, "--resume", "-o"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    small_windows = "import unpadded; unpadded.tokenization.windows.WindowReader.max_texts = 16"
    few_parts = f"{small_windows}\nimport time; from unpadded.bulk.dataset_output import DatasetOutput as D\n"
    few_parts += "finish, parts = D._finish_part, iter(range(8))  # otherwise a run may finish before it is killed\n"
    few_parts += "D._finish_part = lambda self: (next(parts, None) is None and time.sleep(3600), finish(self))"
    assert main([*command, f"{whole}/"]) == 0

    def parts() -> int:
        return len(list(killed.glob("part-*")))

    progress = []
    for kill in range(10):
        before, process = parts(), ForkedProcess([*command, f"{killed}/"], setup=few_parts)
        deadline = time.monotonic() + HANG_SECONDS
        if kill % 5:  # the others are killed while the model loads
            while parts() == before:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        moment = time.monotonic() + draw.uniform(0, 0.1)
        while time.monotonic() < moment and parts() < before + 4:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        with process.stderr:
            assert process.wait() == -signal.SIGKILL
        progress.append(parts())
    assert len(set(progress)) >= 8 and progress[-1] < 92, progress
    process = ForkedProcess([*command, f"{killed}/"], setup=small_windows)
    with process.stderr:
        assert process.wait() == 0
    assert contents(killed) == contents(whole)
    assert len(pq.read_table(killed)) == len(TEXTS) - len(invalid)


def test_a_stopped_job_says_how_to_continue(tmp_path: Path, minilm: Path) -> None:
    source, parts, written = write_jsonl(tmp_path / "in.jsonl", TEXTS[:9]), tmp_path / "parts", tmp_path / "written"
    flags = ["-m", str(minilm), "--device", "cpu", "--part-rows", "4", "--quiet"]
    slow = "import time; from unpadded.bulk.dataset_output import DatasetOutput as D; write = D.write\n"
    slow += f"D.write = lambda self, block: (write(self, block), os.mkdir({str(written)!r}), time.sleep(3600))"
    process = ForkedProcess(["embed", str(source), *flags, "-o", f"{parts}/"], setup=slow)
    wait_until(written.exists)
    assert (parts / ".part.parquet.tmp").exists()
    process.send_signal(signal.SIGTERM)
    with process.stderr as stderr:
        advice = "finished parts are kept; run the same command with --resume to continue"
        assert stderr.read() == f"unpadded: stopped by SIGTERM; {advice}\n"
    assert process.wait() == 143
    assert sorted(os.listdir(parts)) == ["_manifest.json", "part-000000.parquet", "part-000001.parquet"]


def test_two_runs_cannot_write_to_one_dataset(engine: unpadded.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.txt").write_text("\n".join(TEXTS[:3]))
    Path("parts").mkdir()
    with open_dataset_output("parts/", OutputColumns(), part_rows=8, resume=True):
        assert embed("in.txt", "-o", "parts/", "--resume") == 2
        assert "another run is writing the output: 'parts/'" in capsys.readouterr().err
    assert embed("in.txt", "-o", "parts/", "--resume") == 0


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--dimensions", "64"], "settings.dimensions None, this run 64"),
        (["-t", "query"], "settings.task None, this run 'query'"),
        (["--part-rows", "5"], "layout.part_rows 4, this run 5"),
        (["--carry", "n"], "layout.carry [], this run ['n']"),
        (["--precision", "float16"], "settings.precision 'float32', this run 'float16'"),
    ],
)
def test_resuming_with_another_setting_is_an_error(
    engine: unpadded.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], difference: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:10])
    assert embed(source, "-o", "parts/", "--part-rows", "4") == 0
    before = contents(Path("parts"))
    assert embed(source, "-o", "parts/", "--part-rows", "4", "--resume", *flags) == 2
    assert difference in capsys.readouterr().err
    assert contents(Path("parts")) == before


def test_resuming_with_another_input_or_model_is_an_error(
    engine: unpadded.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:10])
    assert embed(source, "-o", "parts/") == 0
    os.utime(source, ns=(0, 0))
    assert embed(source, "-o", "parts/", "--resume") == 2
    assert "inputs[0].modified_ns" in capsys.readouterr().err

    assert embed(source, "-o", "more/") == 0
    manifest = json.loads(Path("more/_manifest.json").read_text())
    manifest["run"]["model_files"]["model.safetensors"]["sha256_of_samples"] = "0" * 64
    Path("more/_manifest.json").write_text(json.dumps(manifest))
    assert embed(source, "-o", "more/", "--resume") == 2
    assert "model_files.model.safetensors.sha256_of_samples" in capsys.readouterr().err


def test_a_dataset_is_not_overwritten(
    engine: unpadded.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:10])
    Path("parts").mkdir()
    assert embed(source, "-o", "parts") == 0
    before = contents(Path("parts"))
    assert embed(source, "-o", "parts") == 2
    assert "pass --resume" in capsys.readouterr().err
    assert embed(source, "-o", "parts", "--resume") == 0
    assert "0 texts, 0 tokens in 0.00 s, 10 embedded by earlier runs -> parts" in capsys.readouterr().err
    assert contents(Path("parts")) == before

    Path("parts/part-000000.parquet").write_bytes(b"")
    assert embed(source, "-o", "parts", "--resume") == 2
    assert "missing or changed: 'parts/part-000000.parquet'" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    assert embed(source, "-o", "other/", "--resume") == 2
    assert "not empty: 'other/' has 'mine.txt'" in capsys.readouterr().err


def test_a_damaged_manifest_or_folder_is_an_error(
    engine: unpadded.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:2])
    assert embed(source, "-o", "parts/") == 0
    capsys.readouterr()
    manifest = json.loads(Path("parts/_manifest.json").read_text())
    (part,) = manifest["parts"]
    nested = '{"a":' * 900 + "0" + "}" * 900
    for content in (
        "[" * 100_000,
        json.dumps(manifest | {"parts": [part | {"next": "x"}]}),
        json.dumps(manifest | {"parts": [{"file": "part-000000.parquet"}]}),
        json.dumps(manifest | {"rejects": "0"}),
        json.dumps(manifest).replace('"format": 1', f'"format": {nested}'),
    ):
        Path("parts/_manifest.json").write_text(content)
        assert embed(source, "-o", "parts/", "--resume") == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("unpadded: error: ") and "'parts/'" in stderr and len(stderr) < 1000

    Path("loop").symlink_to("loop")
    assert embed(source, "-o", "loop/") == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err
    for name in ("open", "scandir"):
        Path(name).mkdir()

        def fail(*arguments: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            patch.setattr(os, "listdir", fail)
            assert embed(source, "-o", f"{name}/") == 2
        assert f"'{name}/' (Permission denied)" in capsys.readouterr().err


def test_the_pages_of_an_output_have_checksums(engine: unpadded.Engine, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:50])
    for out, file in (("one.parquet", "one.parquet"), ("parts/", "parts/part-000000.parquet")):
        assert embed(source, "-o", out, "--carry", "text") == 0
        content = bytearray(Path(file).read_bytes())
        content[pq.read_metadata(file).row_group(0).column(1).data_page_offset + 1000] ^= 1  # within the vectors
        Path("damaged.parquet").write_bytes(content)
        assert embed("damaged.parquet", "-o", "again.npy", "--overwrite") == 0  # only the pages of the texts are read
        with pytest.raises(OSError, match="CRC"):
            pq.ParquetFile("damaged.parquet", page_checksum_verification=True).read()


def test_on_error_may_change_when_a_job_is_resumed(
    engine: unpadded.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped at an invalid row keeps its parts, and --on-error does not affect the rows in them."""
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:20], {17: b"{"})
    assert embed(source, "-o", "parts/", "--part-rows", "4") == 2
    assert sorted(os.listdir("parts"))[:2] == ["_manifest.json", "part-000000.parquet"]
    assert embed(source, "-o", "parts/", "--part-rows", "4", "--resume", "--on-error", "skip") == 0
    assert embed(source, "-o", "whole/", "--part-rows", "4", "--on-error", "skip") == 0
    assert contents(Path("parts")) == contents(Path("whole"))


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        (["in.jsonl", "-o", "out.npy", "--resume"], "'out.npy'", "pass a folder such as -o vectors/"),
        (["in.jsonl", "--part-rows", "4"], "'stdout'", "pass a folder such as -o vectors/"),
        (["in.jsonl", "-o", "parts/", "--part-rows", "0"], "not positive: 0", "pass the number of rows per part"),
        (["in.jsonl", "--on-error", "skip"], "'stdout'", "pass an output with -o"),
        (["-", "-o", "parts/", "--resume"], "'-'", "pass files"),
        (["in.jsonl", "-o", "out.npy", "--carry", "n"], "'n'", "pass -o vectors/ or vectors.parquet"),
        (["in.txt", "-o", "parts/", "--carry", "n"], "no column 'n': 'in.txt' has 'text'", "use one of these"),
        (["in.jsonl", "-o", "parts/", "--carry", "tokens"], "'tokens'", "omit it from --carry"),
        (["in.jsonl", "in.parquet", "-o", "parts/", "--carry", "n"], "'in.parquet', 'in.jsonl'", "in two jobs"),
        (["in.parquet", "-o", "parts/", "--carry", "m"], "'m': 'in.parquet' has 'text', 'n'", "use one of these names"),
        (
            ["in.parquet", "other.parquet", "-o", "parts/", "--carry", "n"],
            "'n' is string in 'other.parquet' and int64 in 'in.parquet'",
            "convert one of them",
        ),
        (["folder", "-o", "folder/parts/"], "'folder/parts/' in 'folder'", "pass another folder"),
        (["folder", "-o", "folder/"], "would replace an input: 'folder/'", "pass another name"),
        (["*.md", "-o", "parts/"], "'*.md'", "check it"),
        (["in.txt", "-o", "out.txt/"], "'out.txt/' (Not a directory)", "check its folder"),
        (["in.parquet.gz", "-o", "parts/"], "'in.parquet.gz'", "decompress it"),
    ],
)
def test_invalid_arguments_are_reported_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    value: str,
    remedy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("in.jsonl"), TEXTS[:2])
    Path("in.txt").write_text("a\n")
    Path("in.parquet.gz").write_bytes(b"")
    Path("out.txt").touch()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), "in.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["1"]}), "other.parquet")
    Path("folder").mkdir()
    Path("folder/in.txt").write_text("a\n")
    before = sorted(tmp_path.rglob("*"))
    assert embed(*arguments) == 2
    *found, error = capsys.readouterr().err.splitlines()
    assert error.startswith("unpadded: error: ") and value in error and remedy in error, error
    assert found in ([], ["unpadded: folder: 1 .txt"])
    assert sorted(tmp_path.rglob("*")) == before
