"""Without a GPU, Triton kernels run in the interpreter: same code, on the CPU, in fp32 and fp16."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import MINILM

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of unpadded_kernels

DEVICE = "cuda" if HAS_CUDA else "cpu"
# The interpreter stores bfloat16 as uint16 and computes on the bit pattern.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Absolute and relative, against the fp32 reference of the same inputs: a few units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def packed(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of texts of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN, so a kernel that leaves part of its output unwritten fails."""
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def far_tokens(tmp_path: Path) -> torch.Tensor:
    """[5, 192] fp16 of random rows, 2**29 elements from one to the next: the last lies past what int32 counts."""
    tokens, width, stride = 5, 192, 2**29
    size = (tokens - 1) * stride + width
    if HAS_CUDA:
        storage = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:  # a sparse file: only the pages of the five rows take room
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    far = storage.as_strided((tokens, width), (stride, 1))
    far.copy_(torch.randn(tokens, width))
    return far


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    assert MINILM.is_dir(), MINILM
    return MINILM
