"""Bulk jobs with many rows: the estimated number of texts, and memory that does not grow with the rows."""

from __future__ import annotations

import gzip
import io
import json
import logging
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.forks import ENVIRONMENT
from support.serving import wait_until
from tqdm import tqdm

import unpadded
from unpadded.bulk import Row, read_rows
from unpadded.bulk.progress import EstimatedTexts, ReadProgress, periodic_reports
from unpadded.bulk.rows import ReadPosition
from unpadded.cli.main import main

ROWS = 1500  # per file
SMALL_GZIP_READS = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="gzip reads blocks of 128 KiB, which is more than these files"
)


def write_files(folder: Path, ending: str) -> list[str]:
    """Write three files of ROWS texts each; the last has longer texts."""
    draw = np.random.default_rng(0)
    names = []
    for number in range(3):
        texts = [bytes(draw.integers(97, 123, 1600 if number == 2 else 480, np.uint8)).decode() for _ in range(ROWS)]
        path = folder / f"{number}{ending}"
        if ending == ".parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=512)
        else:
            lines = ["text", *texts] if ending == ".csv" else [json.dumps({"text": text}) for text in texts]
            content = "".join(f"{line}\n" for line in lines).encode()
            path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
        names.append(str(path))
    return names


def hints(names: list[str], start: ReadPosition) -> list[int]:
    """Return the length hint at each text and after the last one."""
    progress = ReadProgress(names)
    rows = read_rows(names, start=start, progress=progress)
    texts = EstimatedTexts((row.text for row in rows if isinstance(row, Row)), progress)
    assert operator.length_hint(texts) == 0
    found = [operator.length_hint(texts) for _ in texts]
    return [*found, operator.length_hint(texts)]


@pytest.mark.parametrize(
    "ending", [".txt", ".jsonl", pytest.param(".jsonl.gz", marks=SMALL_GZIP_READS), ".csv", ".parquet"]
)
def test_the_number_of_texts_is_estimated_from_the_bytes_read(tmp_path: Path, ending: str) -> None:
    names = write_files(tmp_path, ending)
    for start, count in (
        (ReadPosition(), 3 * ROWS),
        (ReadPosition(2 * ROWS, 1, ROWS), ROWS),
        (ReadPosition(2 * ROWS, 2), ROWS),
    ):
        found = hints(names, start)
        assert len(found) == count + 1 and found[-1] == count
        # The short texts of the first two files make the estimate too high, by less than a factor of two.
        assert all(count / 2 < hint < 2 * count for hint in found[count // 3 :])
    assert max(hints(names[:1], ReadPosition())[ROWS // 2 :]) < 1.02 * ROWS


def test_standard_input_has_no_estimate() -> None:
    progress = ReadProgress(["-"])
    texts = EstimatedTexts(iter(["a", "b"]), progress)
    assert [operator.length_hint(texts) for _ in texts] == [0, 0]


def test_a_report_while_the_first_batch_is_counted_has_no_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("unpadded.bulk.progress.REPORT_SECONDS", 0.01)

    class Texts(EstimatedTexts):
        def __length_hint__(self) -> int:
            caplog.clear()
            wait_until(lambda: caplog.messages)
            return 6

    with caplog.at_level(logging.INFO, "unpadded"), periodic_reports(Texts([], ReadProgress(["-"]))) as advance:
        advance(3, 7)
    assert caplog.messages[0].startswith("computing the first batch")


@pytest.mark.parametrize(("columns", "where"), [(120, "terminal"), (40, "terminal"), (120, "notebook")])
def test_the_progress_bar_has_a_total_and_both_rates(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, columns: int, where: str
) -> None:
    drawn = io.StringIO()
    bars = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            bars.append(self)
            super().__init__(**options | {"disable": False, "file": drawn, "mininterval": 0, "ncols": columns})

    monkeypatch.setattr("unpadded.engine.tqdm", Bar)
    if where == "terminal":
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    else:
        Bar.__module__ = "tqdm.notebook"
    monkeypatch.setenv("COLUMNS", str(columns))
    engine = unpadded.load(minilm, device="cpu", token_budget=64)
    monkeypatch.setattr(unpadded, "load", lambda model, **options: engine)
    source = tmp_path / "in.txt"
    source.write_text("".join(f"text number {i}\n" for i in range(40)))
    assert main(["embed", "-m", "loaded", str(source), "-o", str(tmp_path / "out.npy")]) == 0
    lines = drawn.getvalue().split("\r")
    assert any("first batch" in line for line in lines)
    if columns == 120:
        first = next(line for line in lines if "/40 [" in line and "tokens/s" in line)
        assert "text/s" in first and "<" in first  # elapsed < remaining time
    else:
        assert all(len(line) <= 40 for line in lines)
        assert any(re.fullmatch(r" *\d+%\|.*\|00:\d\d, [\d,]+ tokens/s *", line) for line in lines), lines
    assert bars[0].n == bars[0].total == 40


JOBS = """
import re
import sys
from itertools import islice
from types import SimpleNamespace
import numpy as np
import unpadded.bulk.job
from unpadded.bulk import make_job, run_job

def embedded(texts):
    return SimpleNamespace(
        vectors=np.ones((len(texts), 256), np.float32), token_counts=np.ones(len(texts), np.int64),
        truncated=np.zeros(len(texts), bool))

class Engine:
    def stream(self, texts, **options):
        texts = iter(texts)
        while block := list(islice(texts, 4096)):
            yield embedded(block)

unpadded.bulk.job.describe_run = unpadded.bulk.job.describe_vectors = lambda *arguments: {}
for rows, out in ((20_000, sys.argv[1]), (200_000, sys.argv[2])):
    with open("in.jsonl", "w") as file:
        file.write('{"text": 1}\\n' * (rows // 2) + '"fine"\\n' * (rows // 2 - 1) + "{\\n")
    totals = run_job(make_job(["in.jsonl"], output=out, on_error="skip", part_rows=None), Engine)
    assert totals.texts == rows // 2 - 1 and totals.skipped == rows // 2 + 1, totals
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("ending", [".npy", "/"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, ending: str) -> None:
    """The larger job writes 100 MB of vectors and rejects half of its rows, nearly all before the first vector."""
    outs = [f"small{ending}", f"large{ending}"]
    ran = subprocess.run(
        [sys.executable, "-c", JOBS, *outs], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    few, many = map(int, ran.stdout.split())
    assert few < 400e3 and many - few < 25e3, (few, many)
    rejects = tmp_path / (f"large{ending}.rejects.jsonl" if ending != "/" else "large/_rejects.jsonl")
    assert rejects.read_bytes().count(b"\n") == 100_001
    if ending == ".npy":
        assert np.load(tmp_path / "large.npy", mmap_mode="r").shape == (99_999, 256)
