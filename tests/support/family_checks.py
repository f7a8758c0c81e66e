"""What every family is held to: parity on values with a reference, and a text's bits whatever stands beside it."""

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
from support.checkpoints import _Draw, _write
from support.devices import HAS_CUDA
from unpadded.cli.benchmark.machine import card
from unpadded.engine import Engine
from unpadded.model.weights import plain_weights

VOCABULARY = 512
LENGTHS = (1, 2, 7, 64, 65, 513, 2048)


@dataclass
class Parity:
    """What the parity tests of a family found so far; `pytest --families FILE` writes it down."""

    references: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)  # of the tests
    kernels: set[str] = field(default_factory=set)  # ops in its forward pass that have a CUDA kernel of ours
    texts: int = 0
    longest: int = 0
    error: float = 0.0


PARITY: dict[str, Parity] = {}  # by family


class OpsSeen(TorchDispatchMode):
    """The names of our ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "unpadded":
            self.names.add(op.name().removeprefix("unpadded::").removesuffix(".default"))
        return op(*args, **(kwargs or {}))


def write_parity(file: Path, passed: list[str]) -> None:
    """PARITY as a result of bench/, with the number of tests that passed; `passed`: the file of each."""
    rows = [
        {
            "family": family,
            "references": sorted(found.references),
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
    """The model in evaluation, its parameters drawn anew: norms near 1, matrices with the spread of trained ones."""
    draw = _Draw(model.config.hidden_size, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(draw(*parameter.shape) + (1 if is_scale else 0))
    return model.eval()


def of_transformers(*names: str) -> list[type]:
    """Its classes of these names; the test is skipped where it is too old to have them."""
    if not all(hasattr(transformers, name) for name in names):
        pytest.skip(f"transformers {transformers.__version__} has no {' or '.join(names)}")
    return [getattr(transformers, name) for name in names]


def write(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint without a tokenizer."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return _write(folder, config, contiguous, prefix="", shards=1, dtype=torch.float32, tokenizer=0)


def last_hidden_state(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Of transformers, one text at a time."""

    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].numpy()

    run.reference = type(model).__name__
    return run


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Frobenius, in float64."""
    theirs = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_parity(engine: Engine, reference: Callable[[np.ndarray], np.ndarray], lengths=LENGTHS, **options) -> None:
    """In fp32, all lengths in one batch and each alone; what runs and is not a plain product has a CUDA kernel."""
    spec = engine.checkpoint.spec
    found = PARITY.setdefault(spec.family + (" with experts" if spec.experts else ""), Parity())
    found.references.add(getattr(reference, "reference", "reference from its paper"))
    found.files.add(os.environ["PYTEST_CURRENT_TEST"].split("::")[0])
    texts = random_ids(lengths, vocabulary=spec.vocabulary)
    encoder = engine._pipeline.runner.encoder
    own, encoder.weights = encoder.weights, plain_weights(encoder.weights)  # as on CUDA
    with OpsSeen() as seen:
        engine.encode(texts[:1], **options)
    encoder.weights = own
    kernels = seen.names - {"linear"}  # the library's product
    assert kernels
    for name in kernels:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unpadded::{name}", "CUDA"), name
    found.kernels |= kernels
    for ids, hidden in zip(texts, engine.token_embeddings(texts, **options), strict=True):
        expected = reference(ids)
        # beyond the budget a text is alone in either case
        alone = engine.token_embeddings([ids], **options) if len(ids) <= engine._pipeline.token_budget else []
        for ours in (hidden, *alone):
            error = relative_error(ours, expected)
            assert error <= 1e-5, len(ids)
            found.error = max(found.error, error)
        found.texts += 1
        found.longest = max(found.longest, len(ids))


def assert_independent(folder: Path, dtype: str, lengths=(1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 513, 900)):
    """Alone, then in shuffled batches of several sizes, then alone again: the same bits."""
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
    """In fp32: vectors, from captured graphs where one holds the batch, and every token's state, without."""
    exact, engine = (unpadded.load(folder, device=where, dtype="float32") for where in ("cpu", device))
    vocabulary = min(VOCABULARY, exact.checkpoint.spec.vocabulary)
    lengths = (1, 2, 7, 64, 65, 500) if HAS_CUDA else (1, 2, 7, 5)
    texts, others = random_ids(lengths, vocabulary=vocabulary), random_ids((3, 30), 1, vocabulary)
    for batch in (texts, texts[::-1], others):
        assert relative_error(engine.encode(batch), exact.encode(batch)) <= 1e-5
    hidden = zip(engine.token_embeddings(texts), exact.token_embeddings(texts), strict=True)
    assert max(relative_error(*pair) for pair in hidden) <= 1e-5
