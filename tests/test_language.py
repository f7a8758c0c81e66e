"""The English of code and documentation, as CONTRIBUTING.md asks for it."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "bench", "tests")

FIRST_WORDS = ("What", "Whose", "Of", "How", "Where")
# Each has a plain word: fix, reject or raise, supported, next to, cached, exit or crash, maximum, the library's name.
BANNED = re.compile(
    r"\b(mend(s|ed|ing)?|refus(e|es|ed|ing|al)|offered|beside|besides|put by|nobody|no say|on its way|crew|bury|buried|"
    r"dies|died|ours|theirs|says|said|house|lies|stands|judge|whose hand|matrix products?|in turns|an? \w+ an? \w+)\b",
    re.IGNORECASE,
)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def comments(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string literals of more than one word."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    wrong = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for path in python_files(folder)
        for line, text in docstrings(path)
        if text.split()[0] in FIRST_WORDS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_uses_plain_words(folder: str) -> None:
    wrong = [
        f"{path}:{line}: {found[0]}"
        for path in python_files(folder)
        for line, text in (*docstrings(path), *comments(path), *(messages(path) if folder != "tests" else ()))
        for found in BANNED.finditer(text)
        if path != Path(__file__)
    ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_pages_use_plain_words() -> None:
    wrong = [
        f"{path}:{number}: {found[0]}"
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for found in BANNED.finditer(line)
    ]
    assert not wrong, "\n".join(wrong)
