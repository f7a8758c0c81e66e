"""The README and docs/benchmarks.md: figures come from committed results, and the names they mention exist."""

import re
from pathlib import Path

import make_options
import matplotlib
import pytest
import report

import unpadded
from unpadded.cli.benchmark import plots
from unpadded.cli.main import main

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


def test_the_page_of_options_is_generated_from_the_dataclasses():
    assert make_options.page() == make_options.PAGE.read_text(), "run python docs/make_options.py"


def test_readme_has_figures_of_speed_only_in_its_generated_table():
    outside = README[: README.index(report.BEGIN)] + README[README.index(report.END) :]
    assert re.findall(r"[\d.,]+ ?(?:x faster|times faster|tokens/s|TFLOP|GB/s|ms\b)", outside) == []


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"\b((?:bench|docs|tests|engine|kernels)/[\w/*]+\.\w+)", README)) | {"CONTRIBUTING.md"}
    assert named
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_public_names_that_the_readme_uses_exist():
    names = set(re.findall(r"unpadded\.(\w+)\(", README))
    assert "load" in names
    assert [name for name in names if not hasattr(unpadded, name)] == []
    imports = re.findall(r"^from unpadded.*", README, re.MULTILINE)
    assert imports
    exec("\n".join(imports), {})


def test_flags_that_the_readme_uses_exist(capsys):
    used = re.findall(r"unpadded (embed|info|map|serve|bench) ([^|`]*?)(?:`|\||\n)", README)
    assert {command for command, _ in used} >= {"embed", "map", "serve"}
    for command, arguments in used:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"-[\w-]+", capsys.readouterr().out))
        assert set(re.findall(r"(?<=\s)-[\w-]*\w", f" {arguments}")) <= known, arguments
