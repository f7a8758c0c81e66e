"""Options and fixtures of all tests. Without a GPU, Triton kernels run in the interpreter in fp32 and fp16."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.checkpoints import MINILM, checkpoint_folder
from support.corpus import PARAGRAPHS
from support.devices import DEVICE, HAS_CUDA

if TYPE_CHECKING:
    import unpadded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--checkpoints", type=Path, metavar="DIR", help="folder of real checkpoints, named owner/name or owner--name"
    )
    parser.addoption(
        "--fuzz", type=int, default=120, metavar="N", help="number of fuzzed requests per endpoint (default: 120)"
    )
    parser.addoption(
        "--families",
        type=Path,
        metavar="FILE",
        help="write the errors that the parity tests measure to FILE, if all tests pass",
    )


def pytest_configure() -> None:
    """Let processes that tests start receive SIGINT, which a shell ignores for commands that it runs in background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch, so that the random tensors of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return NaN, so that a kernel that leaves part of its output unwritten fails."""
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a CUDA device; without a GPU the second device of the stand-in, with graphs for small batches."""
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
    """Return a function that counts the kernels compiled so far."""
    if not HAS_CUDA:
        from support.stand_in import CUDA

        return lambda: len(CUDA.compiled)
    import triton

    names: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **found: names.append(found["repr"]))
    return lambda: len(names)


@pytest.fixture(params=["pointers", "descriptors"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the kernels of sm_80 and, where they can run, those of sm_90 and later."""
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
    """Return random rows, [5, 192] fp16, with a stride of 2**29 elements: the last row is beyond int32 offsets."""
    tokens, width, stride = 5, 192, 2**29
    size = (tokens - 1) * stride + width
    if HAS_CUDA:
        storage = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:  # a sparse file: only the pages of the five rows use memory
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    far = storage.as_strided((tokens, width), (stride, 1))
    far.copy_(torch.randn(tokens, width))
    return far


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of the real all-MiniLM-L6-v2."""
    assert MINILM.is_dir(), MINILM
    return MINILM


@pytest.fixture(scope="session")
def minilm_engine(minilm: Path) -> unpadded.Engine:
    """Load the real all-MiniLM-L6-v2 in fp32 on the CPU. All tests share it, so they must not change it."""
    import unpadded  # imports unpadded_kernels, so not before TRITON_INTERPRET is set

    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="session")
def rerankers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of `write_rerankers` by name."""
    from support.rerankers import write_rerankers  # imports transformers' models

    return write_rerankers(tmp_path_factory.mktemp("rerankers"))


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Return English paragraphs of at least 40 characters."""
    return PARAGRAPHS


@pytest.fixture
def checkpoint(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """Return a function from a hub id to the folder of that real checkpoint; it skips the test if there is none."""

    def find(name: str) -> Path:
        root = pytestconfig.getoption("checkpoints")
        folder = checkpoint_folder(root, name) if root else None
        if folder is None and name.endswith("/all-MiniLM-L6-v2") and MINILM.is_dir():
            folder = MINILM
        return folder or pytest.skip(f"{name} is not in {root or 'DIR'}; pass --checkpoints DIR")

    return find


@pytest.fixture
def cohere() -> Any:
    return pytest.importorskip("cohere")


@pytest.fixture
def connection() -> Iterator[dict[str, Any]]:
    """Arguments of Cohere's clients, which do not close connections that they make themselves."""
    with pytest.importorskip("httpx").Client(timeout=600) as client:
        yield {"api_key": "none", "httpx_client": client}
