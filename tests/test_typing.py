"""Static types that users of the API see."""

import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import unpadded

SCRIPT = """
from typing import Any, assert_type

import numpy as np
import torch

import unpadded

engine = unpadded.load("nomic-ai/nomic-embed-text-v1.5", device="cpu")
texts = ["What is TSNE?", "Who is Laurens van der Maaten?"]
scores = engine.encode(texts) @ engine.encode(texts).T
assert_type(engine.encode(texts, task="clustering", show_progress=False), np.ndarray)
assert_type(engine.encode(texts, output="numpy"), np.ndarray)
assert_type(engine.encode(texts, output="torch"), torch.Tensor)
assert_type(engine.encode([[101, 102]], output="list"), list[Any])
found = engine.embed(texts)
assert_type(found[0], np.ndarray)
print(len(found), np.asarray(found).shape, repr(engine), [block.vectors for block in engine.stream(texts)])
engine.encode(texts, batch_size=32)  # E: an unknown keyword
engine.encode(texts, output="tf")  # E: an unknown output
"""


def test_encode_has_one_overload_per_output():
    found = [typing.get_type_hints(overload) for overload in typing.get_overloads(unpadded.Engine.encode)]
    expected = {"numpy": np.ndarray, "torch": torch.Tensor, "list": list[typing.Any]}
    assert {typing.get_args(hints["output"])[0]: hints["return"] for hints in found} == expected


@pytest.mark.slow
def test_mypy_finds_the_types_of_a_users_script(tmp_path):
    mypy = pytest.importorskip("mypy.api")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", mypy.__name__.partition(".")[0], "--config-file", "pyproject.toml", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    wrong = {int(line.split(":")[1]) for line in ran.stdout.splitlines() if ": error:" in line}
    assert wrong == {number for number, line in enumerate(SCRIPT.splitlines(), 1) if "# E:" in line}, ran.stdout
