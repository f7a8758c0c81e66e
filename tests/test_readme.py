"""What the README claims: its figures come from committed results, and its examples name things that exist."""

import importlib.util
import re
from pathlib import Path

import unpadded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load_report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_plots_are_made_from_the_committed_results():
    report = load_report()
    results = ROOT / "bench/results"
    assert report.with_tables(README, report.report(results, ROOT)) == README, "run make bench, or report.py"
    assert {path: path.read_text() for path in results.rglob("*.svg")} == report.plots(results)


def test_no_figure_of_speed_stands_outside_the_tables():
    report = load_report()
    outside = README[: README.index(report.BEGIN)] + README[README.index(report.END) :]
    assert re.findall(r"[\d.,]+ ?(?:x faster|times faster|tokens/s|TFLOP|GB/s|ms\b)", outside) == []


def test_files_that_are_named_exist():
    named = set(re.findall(r"`((?:bench|tests|engine|kernels)/[\w./*]+)`", README))
    assert named
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_public_names_that_are_used_exist():
    names = set(re.findall(r"unpadded\.(\w+)\(", README)) | {"embed"}
    assert {"load", "accelerate"} & names
    assert [name for name in names if not hasattr(unpadded, name)] == []
