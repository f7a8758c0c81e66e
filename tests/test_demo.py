"""`make demo` finds the passage that answers each question; both have the same index in demo.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def test_every_question_finds_its_passage() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "bench" / "demo.py")]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    texts = json.loads((ROOT / "bench" / "demo.json").read_text())
    shown = {lines[i].split("  ", 1)[1]: lines[i + 1].strip() for i in range(len(lines)) if lines[i][:2] == "0."}
    for question, passage in zip(texts["questions"], texts["passages"], strict=False):
        assert shown[question] == passage
    (path,) = (line.removeprefix("vectors of the passages: ") for line in lines if line.startswith("vectors of"))
    vectors = np.load(path)
    assert lines[-2].startswith("next: ") and (ROOT / lines[-1].split()[0]).exists()
    assert vectors.shape == (len(texts["passages"]), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
