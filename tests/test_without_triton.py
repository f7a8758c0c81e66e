"""Without triton, a CPU imports, loads, encodes and serves; a CUDA tensor raises an error that names the remedy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.checkpoints import write_nomic
from support.serving import ENVIRONMENT, serving

import unpadded
from unpadded_kernels import _triton, activation

TEXTS = ["a short text", "another one, somewhat longer than the first", "third"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("nomic"))


@pytest.fixture(scope="module")
def expected(folder):
    return unpadded.load(folder, device="cpu").encode(TEXTS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a process in which `import triton` fails."""
    path = tmp_path_factory.mktemp("without")
    (path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    return ENVIRONMENT | {"PYTHONPATH": f"{path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}


def test_a_cpu_imports_no_compiler(folder):
    """The first call would take a second longer with torch._dynamo."""
    code = """
import sys, unpadded
unpadded.load(sys.argv[1], device="cpu").encode(["a text"])
print([name for name in ("triton", "torch._dynamo", "sympy") if name in sys.modules])
"""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert ran.stdout.strip() == str(["triton"] if torch.backends.cuda.is_built() else [])


def test_encodes_to_the_same_vectors(folder, expected, environment, tmp_path):
    code = """
import sys, numpy, unpadded
folder, file, *texts = sys.argv[1:]
numpy.save(file, unpadded.load(folder, device="cpu").encode(texts))
assert "triton" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "vectors.npy"), *TEXTS]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), expected)


def test_serves_the_same_vectors(folder, expected, environment):
    with serving(folder, fork=False, env=environment) as server:
        answer = server.post("/v1/embeddings", {"model": folder.name, "input": TEXTS})
    np.testing.assert_allclose([item["embedding"] for item in answer["data"]], expected, atol=1e-6)


def test_a_cuda_tensor_without_triton_raises(cuda, monkeypatch):
    monkeypatch.setattr(_triton, "import_error", ImportError("No module named 'triton'"))
    with pytest.raises(ImportError, match=r"No module named 'triton'.* cuda:\d.*pip install 'triton>=3.6'"):
        activation(torch.ones(2, 4, device=cuda), "gelu")
