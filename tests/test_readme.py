"""The README and docs/benchmarks.md: figures come from committed results, and the names they mention exist."""

import re
from pathlib import Path

import matplotlib
import pytest
import report

import unpadded
from unpadded.cli.benchmark import plots

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
README = (ROOT / "README.md").read_text()


def test_tables_are_generated_from_the_committed_results():
    remedy = "run bench/report.py bench/results --page docs/benchmarks.md --readme README.md"
    assert report.with_summary(README, report.summary(RESULTS)) == README, remedy
    assert report.page(RESULTS) == (ROOT / "docs/benchmarks.md").read_text(), remedy


@pytest.mark.parametrize("name", ["throughput.svg", "model.svg"])
def test_plots_are_generated_from_the_committed_results(name, tmp_path):
    committed = (ROOT / "docs" / name).read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"docs/{name} was drawn by another version than matplotlib {matplotlib.__version__}")
    plots.save(report.figures(RESULTS)[name], tmp_path / name)
    assert (tmp_path / name).read_text() == committed


def test_readme_has_figures_of_speed_only_in_its_generated_table():
    outside = README[: README.index(report.BEGIN)] + README[README.index(report.END) :]
    assert re.findall(r"[\d.,]+ ?(?:x faster|times faster|tokens/s|TFLOP|GB/s|ms\b)", outside) == []


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:bench|docs|tests|engine|kernels)/[\w./*]+)`", README))
    assert named
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_public_names_that_the_readme_uses_exist():
    names = set(re.findall(r"unpadded\.(\w+)\(", README)) | {"embed"}
    assert {"load", "accelerate"} & names
    assert [name for name in names if not hasattr(unpadded, name)] == []
