"""The code of README.md, docs/ and examples/ runs, and the site builds without network access."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import (
    MINILM,
    TOKENIZER_FILES,
    add_sentence_transformers_files,
    change_json,
    write_bert_mlm,
    write_bert_reranker,
    write_colbert,
    write_nomic,
)
from support.snippets import ForkingProcess, read_snippets

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
URL = "http://127.0.0.1:8080"  # the servers' in the documentation
URL_OF_BOTH = "http://127.0.0.1:8081"
SERVE = "unpadded serve nomic-ai/nomic-embed-text-v1.5 --alias text-embedding-3-small --default-task search_document"
SERVE_BOTH = (
    "unpadded serve nomic-ai/nomic-embed-text-v1.5 cross-encoder/ms-marco-MiniLM-L6-v2 --port 8081 --alias rerank-v3.5"
)


@dataclass(frozen=True)
class Site:
    """The process that runs pages and examples, and the URL of a server."""

    process: ForkingProcess
    url: str


def write_hub(folder: Path) -> None:
    """Write a cache of the hub with the models that the documentation names: MiniLM, others small and seeded."""

    def snapshot(name: str) -> Path:
        model = folder / f"models--{name.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text("0")
        (model / "snapshots").mkdir()
        return model / "snapshots/0"

    snapshot("sentence-transformers/all-MiniLM-L6-v2").symlink_to(MINILM)
    bert = snapshot("bert-base-uncased")
    bert.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(MINILM / name, bert)
    (bert / "config.json").write_text('{"model_type": "bert"}')
    nomic = write_nomic(snapshot("nomic-ai/nomic-embed-text-v1.5"), layers=1, hidden=768, heads=12)
    change_json(nomic / "config.json", matryoshka_dimensions=[768, 512, 256, 128, 64], matryoshka_layer_norm=True)
    add_sentence_transformers_files(nomic, normalize=False, max_seq_length=8192)
    snapshot("nomic-ai/nomic-embed-text-v1").symlink_to(nomic)
    reranker = write_bert_reranker(snapshot("cross-encoder/ms-marco-MiniLM-L6-v2"))
    change_json(reranker / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    stars = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
    write_bert_reranker(snapshot("nlptown/bert-base-multilingual-uncased-sentiment"), labels=stars)
    write_colbert(snapshot("colbert-ir/colbertv2.0"), dimensions=128, metadata={"doc_maxlen": 180})
    snapshot("nomic-ai/nomic-embed-text-v1-unsupervised").symlink_to(nomic)
    write_bert_mlm(snapshot("naver/splade-v3"))


@pytest.fixture(scope="module")
def site(pytestconfig: pytest.Config) -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are too long for a socket's address
        folder = Path(name)
        write_hub(folder / "hub")
        process = ForkingProcess(
            folder, {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HOME": name, "OMP_NUM_THREADS": "1"}
        )
        try:
            with serve(process, folder, SERVE) as url:
                yield Site(process, url)
        finally:
            process.close()


@contextlib.contextmanager
def serve(process: ForkingProcess, folder: Path, command: str) -> Iterator[str]:
    """Start a server of the documentation on a free port, and yield its URL."""
    read, write = os.pipe()
    arguments = [*command.split()[1:], "--port", "0"]
    with process.start("cli", folder, arguments, write, write), open(read) as log:
        os.close(write)
        ready = next((line for line in log if '"ready"' in line), None)
        assert ready is not None, "the server did not start"
        yield json.loads(ready)["url"]


@pytest.mark.parametrize("page", [page for page in PAGES if read_snippets(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page: Path, site: Site, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        urls = {URL: site.url}
        if SERVE_BOTH in page.read_text():
            urls[URL_OF_BOTH] = stack.enter_context(serve(site.process, tmp_path, SERVE_BOTH))
        status, printed = site.process.run("page", tmp_path, [str(page), urls])
    assert status == 0, printed


def shell_lines(program: str) -> list[str]:
    """Return the lines of all shell snippets that begin with a program, without comments."""
    code = "\n".join(snippet.code for page in PAGES for snippet in read_snippets(page) if snippet.language == "sh")
    lines = (line.partition("  #")[0].strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.split()[:1] == [program]]


def test_programs_that_snippets_do_not_run_get_existing_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra
        for line in shell_lines("pip")
        for found in re.findall(r"'\.\[([\w,-]+)\]'", line)
        for extra in found.split(",")
    }
    assert {"server", "map", "ray"} <= extras <= project["optional-dependencies"].keys()
    assert not any("unpadded" in line for line in shell_lines("pip")), "the package is not on PyPI"
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in shell_lines("make")} <= set(targets)
    for line in shell_lines("kubectl"):
        assert all((ROOT / name).exists() for name in re.findall(r"-f (\S+)", line))


def test_examples_are_short() -> None:
    assert {path.name: lines for path in EXAMPLES if (lines := len(path.read_text().splitlines())) >= 40} == {}


def run_example(site: Site, folder: Path, name: str, *arguments: str) -> str:
    status, printed = site.process.run("example", folder, [str(ROOT / "examples" / name), *arguments])
    assert status == 0, printed
    return printed


def test_example_kernels(site: Site, tmp_path: Path) -> None:
    assert "torch.Size([3, 768])" in run_example(site, tmp_path, "kernels.py")


def test_example_model_card(site: Site, tmp_path: Path) -> None:
    assert "['1.0000', '1.0000']" in run_example(site, tmp_path, "model_card.py")


def test_example_faiss(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    (tmp_path / "a.md").write_text("# Sea\n\nThe sea rises and falls twice a day because of the moon's gravity.\n")
    (tmp_path / "b.md").write_text("Bread is made of flour, water, salt and yeast, and is baked in an oven.\n\nend\n")
    (tmp_path / "c.md").write_text("A piston moves up and down inside the cylinder of a combustion engine.\n")
    printed = run_example(site, tmp_path, "search_faiss.py", ".", "What causes the tides?")
    assert re.match(r"0\.\d{3}  a\.md: The sea rises", printed) and len(printed.splitlines()) == 3


def test_example_rerank(site: Site, tmp_path: Path) -> None:
    texts = ["The sea rises and falls twice a day.", "Bread is made of flour.", "A piston moves up and down."]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    printed = run_example(
        site, tmp_path, "rerank.py", "cross-encoder/ms-marco-MiniLM-L6-v2", "a.txt", "What is a tide?"
    )
    found = re.findall(r"^(\d\.\d{3})  (.*)$", printed, re.MULTILINE)
    assert sorted(text for _, text in found) == sorted(texts) and found == sorted(found, key=lambda one: -float(one[0]))


def test_example_late_interaction(site: Site, tmp_path: Path) -> None:
    texts = ["The sea rises and falls twice a day.", "Bread is made of flour.", "A piston moves up and down."]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    arguments = "colbert-ir/colbertv2.0", "a.txt", "What is a tide?"
    printed = run_example(site, tmp_path, "late_interaction.py", *arguments)
    found = re.findall(r"^(\d+\.\d{3})  (.*)$", printed, re.MULTILINE)
    assert sorted(text for _, text in found) == sorted(texts) and found == sorted(found, key=lambda one: -float(one[0]))
    assert "3 lines have 15 vectors" in printed


def test_example_late_chunking(site: Site, tmp_path: Path) -> None:
    documents = {"a": "The sea rises twice a day. " * 40 + "It falls as often.\n", "b": "Bread is made of flour.\n"}
    for name, text in documents.items():
        (tmp_path / f"{name}.md").write_text(text)
    printed = run_example(site, tmp_path, "late_chunking.py", ".", "What is a tide?")
    found = re.findall(r"^-?\d\.\d{3}  ([ab])\.md, from character (\d+): (.*)$", printed, re.MULTILINE)
    assert len(found) == 3 and {start for _, start, _ in found} > {"0"}
    assert all(documents[name][int(start) :].startswith(passage) for name, start, passage in found)


def test_example_sparse(site: Site, tmp_path: Path) -> None:
    texts = ["The sea rises and falls twice a day.", "Bread is made of flour.", "A piston moves up and down."]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    printed = run_example(site, tmp_path, "sparse.py", "naver/splade-v3", "a.txt", "What is a tide?")
    found = re.findall(r"^(\d+\.\d{3})  (.*)  \(.+\)$", printed, re.MULTILINE)
    assert sorted(text for _, text in found) == sorted(texts) and found == sorted(found, key=lambda one: -float(one[0]))


def test_example_duckdb(site: Site, tmp_path: Path) -> None:
    texts = {"The sea rises and falls.": 2001, "Bread is made of flour.": 2002, "What a tide is": 1999}
    lines = [json.dumps({"text": text, "year": year}) for text, year in texts.items()]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    docstring = (ROOT / "examples/search_duckdb.py").read_text()
    (command,) = re.findall(r"^unpadded (embed .*)$", docstring, re.MULTILINE)
    assert site.process.run("cli", tmp_path, command.split())[0] == 0
    printed = run_example(site, tmp_path, "search_duckdb.py", "vectors/*.parquet", "What is a tide?")
    assert re.findall(r"^-?0\.\d{3}  (\d+)", printed, re.MULTILINE) == ["2001", "2002"]


def test_example_mteb(site: Site, tmp_path: Path) -> None:
    printed = run_example(site, tmp_path, "evaluate_mteb.py", str(ROOT / "bench/demo.json"))
    assert float(re.search(r"ndcg@10 ([\d.]+)", printed)[1]) == 1


@pytest.mark.parametrize(
    ("name", "package"),
    [("langchain_client.py", "langchain_openai"), ("llama_index_client.py", "llama_index.embeddings.openai_like")],
)
def test_example_clients(name: str, package: str, site: Site, tmp_path: Path) -> None:
    pytest.importorskip(package)
    assert SERVE in (ROOT / "examples" / name).read_text()
    printed = run_example(site, tmp_path, name, f"{site.url}/v1")
    assert len(re.findall(r"^-?\d\.\d{3}  (?:The tide|Bread)", printed, re.MULTILINE)) == 2


@pytest.mark.slow
def test_example_ray(site: Site, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"id": [1, 2], "text": ["The tide is high.", "Bread."]}), tmp_path / "corpus/a.parquet")
    run_example(site, tmp_path, "ray_corpus.py", "corpus", "vectors")
    table = pq.read_table(tmp_path / "vectors").sort_by("id")
    assert table["text"].to_pylist() == ["The tide is high.", "Bread."]
    assert table["embedding"].type == pa.list_(pa.float16(), 384)


def test_the_site_builds_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert pages.keys() >= {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"?(https?://[^\s\">]+)", page)
        assert loaded == [], name
    assert 'id="unpadded.engine.Engine.encode"' in pages["api.html"]


def test_every_code_block_is_closed() -> None:
    for path in PAGES:
        fences = [line.lstrip() for line in path.read_text().splitlines() if line.lstrip().startswith("```")]
        assert all(fence == "```" for fence in fences[1::2]) and len(fences) % 2 == 0, path


def test_llms_txt_has_every_page() -> None:
    listed = re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs/llms.txt").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
