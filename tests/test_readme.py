"""README.md and the generated pages of docs/: figures come from committed results, and files they name exist."""

import re
import tomllib
from pathlib import Path

import make_options
import matplotlib
import plots
import pytest
import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
README = (ROOT / "README.md").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()


def test_tables_are_generated_from_the_committed_results():
    remedy = "run bench/report.py bench/results --page docs/benchmarks.md --readme README.md --models docs/models.md"
    assert report.with_table(README, report.summary(RESULTS)) == README, remedy
    models = (ROOT / "docs/models.md").read_text()
    assert report.with_table(models, report.models(RESULTS)) == models, remedy
    assert report.page(RESULTS) == (ROOT / "docs/benchmarks.md").read_text(), remedy


@pytest.mark.parametrize("name", ["throughput.svg", "model.svg"])
def test_plots_are_generated_from_the_committed_results(name, tmp_path):
    committed = (ROOT / "docs" / name).read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"docs/{name} was drawn by another version than matplotlib {matplotlib.__version__}")
    plots.save(report.figures(RESULTS)[name], tmp_path / name)
    assert (tmp_path / name).read_text() == committed


def test_the_readme_is_short_and_has_five_speedups_of_clean_commits():
    assert len(README.splitlines()) <= 150 and "-dirty" not in README
    assert len(re.findall(r"\*\*[\d.]+ x\*\*", README)) == 5


def test_the_page_of_options_is_generated_from_the_dataclasses():
    assert make_options.page() == make_options.PAGE.read_text(), "run python docs/make_options.py"


def test_pages_have_figures_of_speed_only_in_generated_tables():
    pages = [README, *(path.read_text() for path in ROOT.glob("docs/*.md") if path.name != "benchmarks.md")]
    outside = re.sub(f"{report.BEGIN}.*{report.END}", "", "\n".join(pages), flags=re.DOTALL)
    assert re.findall(r"[\d.,]+ ?(?:x faster|times (?:as fast|faster)|tokens/s|TFLOP|GB/s|ms\b)", outside) == []


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"\b((?:bench|docs|tests|engine|kernels)/[\w/*]+\.\w+)", README)) | {"CONTRIBUTING.md"}
    assert named
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_extras_in_error_messages_exist():
    """The package is not on PyPI, so a message that names an extra calls `install_command`."""
    sources = "\n".join(
        path.read_text() for folder in ("engine", "kernels", "bench") for path in ROOT.glob(f"{folder}/**/*.py")
    )
    extras = set(re.findall(r"install_command\('([\w-]+)'\)", sources))
    assert {"parquet", "server"} <= extras <= EXTRAS and "unpadded[" not in sources
