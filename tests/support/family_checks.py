"""Checks of every family: parity of values with a reference, and bits that do not depend on other texts."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import unpadded
from support.checkpoints import MINILM, RandomWeights
from support.devices import HAS_CUDA
from unpadded.cli.benchmark.machine import card
from unpadded.engine import Engine
from unpadded.model.weights import plain_weights

VOCABULARY = 512
LENGTHS = (1, 2, 7, 64, 65, 513, 2048)


@dataclass
class Parity:
    """Results of a family's parity tests, which `pytest --families FILE` writes to a file."""

    references: set[str] = field(default_factory=set)
    real: set[str] = field(default_factory=set)  # names of the checkpoints that are not seeded
    files: set[str] = field(default_factory=set)  # the tests' files
    kernels: set[str] = field(default_factory=set)  # ops of the forward pass that have a CUDA kernel
    texts: int = 0
    longest: int = 0
    error: float = 0.0


PARITY: dict[str, Parity] = {}  # key: family


class RecordOps(TorchDispatchMode):
    """Records the names of the ops of `unpadded` that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "unpadded":
            self.names.add(op.name().removeprefix("unpadded::").removesuffix(".default"))
        return op(*args, **(kwargs or {}))


def write_parity(file: Path, passed: list[str]) -> None:
    """Write PARITY as a result of bench/, with the number of tests that passed.

    passed: the file of each test that passed.
    """
    rows = [
        {
            "family": family,
            "references": sorted(found.references),
            "real": sorted(found.real),
            "kernels": sorted(found.kernels),
            "texts": found.texts,
            "longest": found.longest,
            "error": found.error,
            "files": sorted(found.files),
            "tests": sum(name in found.files for name in passed),
        }
        for family, found in sorted(PARITY.items())
    ]
    file.write_text(json.dumps({"machine": card(Path(__file__).parents[2]), "rows": rows}) + "\n")


def random_ids(lengths, seed=0, vocabulary=VOCABULARY):
    draw = np.random.default_rng(seed)
    return [draw.integers(5, vocabulary, length, dtype=np.int32) for length in lengths]


def seeded(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Return the model in evaluation mode with seeded random parameters."""
    random = RandomWeights(model.config.hidden_size, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(random(*parameter.shape) + (1 if is_scale else 0))
    return model.eval()


def of_transformers(*names: str) -> list[type]:
    """Return classes of transformers; skip the test if the installed version lacks one."""
    if not all(hasattr(transformers, name) for name in names):
        pytest.skip(f"transformers {transformers.__version__} has no {' or '.join(names)}")
    return [getattr(transformers, name) for name in names]


def last_hidden_state(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that runs a model of transformers on one text."""

    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].numpy()

    run.reference = type(model).__name__
    return run


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative error in the Frobenius norm, in float64."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_parity(engine: Engine, reference: Callable[[np.ndarray], np.ndarray], lengths=LENGTHS, **options) -> None:
    """Check fp32 values in one batch and alone, and that every op except linear has a CUDA kernel."""
    spec = engine.checkpoint.spec
    found = PARITY.setdefault(spec.family + (" with experts" if spec.experts else ""), Parity())
    found.references.add(getattr(reference, "reference", "reference from its paper"))
    if engine.checkpoint.folder == MINILM:
        found.real.add("all-MiniLM-L6-v2")
    found.files.add(os.environ["PYTEST_CURRENT_TEST"].split("::")[0])
    texts = random_ids(lengths, vocabulary=spec.vocabulary)
    encoder = engine._pipeline.runner.encoder
    packed, encoder.weights = encoder.weights, plain_weights(encoder.weights)  # as on CUDA
    with RecordOps() as recorded:
        engine.encode(texts[:1], **options)
    encoder.weights = packed
    kernels = recorded.names - {"linear", "rotary_cos_sin"}  # computed by operations of torch on every device
    assert kernels
    for name in kernels:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unpadded::{name}", "CUDA"), name
    found.kernels |= kernels
    for ids, hidden in zip(texts, engine.token_embeddings(texts, **options), strict=True):
        expected = reference(ids)
        # a text beyond the token budget is alone in any case
        alone = engine.token_embeddings([ids], **options) if len(ids) <= engine._pipeline.token_budget else []
        for actual in (hidden, *alone):
            error = relative_error(actual, expected)
            assert error <= 1e-5, len(ids)
            found.error = max(found.error, error)
        found.texts += 1
        found.longest = max(found.longest, len(ids))


def assert_independent(folder: Path, dtype: str, lengths=(1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 513, 900)):
    """Check that texts have the same bits alone, in shuffled batches of several sizes, and alone again."""
    engine = unpadded.load(folder, device="cpu", dtype=dtype)
    texts = random_ids(lengths)
    alone = np.concatenate([engine.encode([text]) for text in texts])
    draw = np.random.default_rng(1)
    for _ in range(5):
        order = draw.permutation(len(texts))
        engine._pipeline.token_budget = int(draw.integers(1, sum(lengths)))
        assert np.array_equal(engine.encode([texts[i] for i in order]), alone[order])
    assert np.array_equal(engine.encode(texts[:1]), alone[:1])


def assert_cuda_agrees(folder: Path, device: str) -> None:
    """Check fp32 vectors, which may come from captured graphs, and hidden states, which do not, against a CPU."""
    exact, engine = (unpadded.load(folder, device=where, dtype="float32") for where in ("cpu", device))
    vocabulary = min(VOCABULARY, exact.checkpoint.spec.vocabulary)
    lengths = (1, 2, 7, 64, 65, 500) if HAS_CUDA else (1, 2, 7, 5)
    texts, others = random_ids(lengths, vocabulary=vocabulary), random_ids((3, 30), 1, vocabulary)
    for batch in (texts, texts[::-1], others):
        assert relative_error(engine.encode(batch), exact.encode(batch)) <= 1e-5
    hidden = zip(engine.token_embeddings(texts), exact.token_embeddings(texts), strict=True)
    assert max(relative_error(*pair) for pair in hidden) <= 1e-5
