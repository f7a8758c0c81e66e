"""Without a GPU, Triton kernels run in the interpreter: same code, on the CPU, in fp32 and fp16."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.checkpoints import MINILM, checkpoint_folder
from support.corpus import PARAGRAPHS
from support.devices import DEVICE, HAS_CUDA

if TYPE_CHECKING:
    import unpadded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoints", type=Path, metavar="DIR", help="real checkpoints, as owner/name or owner--name")
    parser.addoption(
        "--fuzz", type=int, default=120, metavar="N", help="fuzzed requests to each endpoint (default: 120)"
    )
    parser.addoption(
        "--families", type=Path, metavar="FILE", help="write what the parity tests find, if all tests pass"
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    file = session.config.getoption("families")
    if file and exitstatus == 0:
        from support.family_checks import (
            write_parity,  # imports unpadded_kernels, so not before TRITON_INTERPRET is set
        )

        passed = session.config.pluginmanager.get_plugin("terminalreporter").stats["passed"]
        write_parity(file, [report.nodeid.split("::")[0] for report in passed])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_CUDA and "cuda" in item.fixturenames:
            item.add_marker("gpu")
        if not HAS_CUDA and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CUDA device, or where there is none the second of the stand-in's, with buckets of graphs that it can fill."""
    if HAS_CUDA:
        yield "cuda"
        return
    from support.stand_in import stand_in

    from unpadded.execution import cuda_graphs

    monkeypatch.setattr(cuda_graphs, "TOKEN_BUCKETS", (8, 16))
    monkeypatch.setattr(cuda_graphs, "TEXT_BUCKETS", (2, 6))
    with stand_in():
        yield "cuda:1"


@pytest.fixture
def compiled(cuda: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many kernels have been compiled."""
    if not HAS_CUDA:
        from support.stand_in import CUDA

        return lambda: len(CUDA.compiled)
    import triton

    names: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **found: names.append(found["repr"]))
    return lambda: len(names)


@pytest.fixture(params=["pointers", "descriptors"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of sm_80, and those of sm_90 and later wherever they can run."""
    if request.param == "descriptors" and HAS_CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")
    if request.param == "pointers" or not HAS_CUDA:
        generation = 80 if request.param == "pointers" else 90
        for name, module in list(sys.modules.items()):
            if name.startswith("unpadded_kernels.") and hasattr(module, "generation"):
                monkeypatch.setattr(module, "generation", lambda device: generation)
    return str(request.param)


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


@pytest.fixture(scope="session")
def minilm_engine(minilm: Path) -> unpadded.Engine:
    """The real all-MiniLM-L6-v2 in fp32 on the CPU. Tests must not change it: the whole session shares it."""
    import unpadded  # imports unpadded_kernels, so not before TRITON_INTERPRET is set

    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """English paragraphs of 40 characters and more."""
    return PARAGRAPHS


@pytest.fixture
def checkpoint(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """The folder of a real checkpoint by its hub id; the test is skipped without it."""

    def find(name: str) -> Path:
        root = pytestconfig.getoption("checkpoints")
        folder = checkpoint_folder(root, name) if root else None
        if folder is None and name.endswith("/all-MiniLM-L6-v2") and MINILM.is_dir():
            folder = MINILM
        return folder or pytest.skip(f"{name} is not in {root or 'DIR'}; pass --checkpoints DIR")

    return find
