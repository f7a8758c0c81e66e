"""What every family is held to: parity on values with a reference, and a text's bits whatever stands beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from checkpoints import _Draw, _write

import unpadded
from unpadded.engine import Engine

VOCABULARY = 512
LENGTHS = (1, 2, 7, 64, 65, 513, 2048)


def random_ids(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(5, VOCABULARY, length, dtype=np.int32) for length in lengths]


def seeded(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model in evaluation, its parameters drawn anew: norms near 1, matrices with the spread of trained ones."""
    draw = _Draw(model.config.hidden_size, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(draw(*parameter.shape) + (1 if is_scale else 0))
    return model.eval()


def write(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint without a tokenizer."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return _write(folder, config, contiguous, prefix="", shards=1, dtype=torch.float32, tokenizer=0)


def last_hidden_state(model: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Of transformers, one text at a time."""

    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].numpy()

    return run


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Frobenius, in float64."""
    theirs = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_parity(engine: Engine, reference: Callable[[np.ndarray], np.ndarray], lengths=LENGTHS) -> None:
    """In fp32, all lengths in one batch and each alone."""
    texts = random_ids(lengths)
    for ids, hidden in zip(texts, engine.token_embeddings(texts), strict=True):
        expected = reference(ids)
        assert relative_error(hidden, expected) <= 1e-5, len(ids)
        assert relative_error(engine.token_embeddings([ids])[0], expected) <= 1e-5, len(ids)


def assert_independent(folder: Path, dtype: str, lengths=(1, 1, 2, 3, 7, 8, 40, 40, 64, 65, 130, 255, 385, 513, 900)):
    """Alone, then in shuffled batches of several sizes, then alone again: the same bits."""
    engine = unpadded.load(folder, device="cpu", dtype=dtype)
    texts = random_ids(lengths)
    alone = np.concatenate([engine.encode([text]) for text in texts])
    draw = np.random.default_rng(1)
    for _ in range(5):
        order = draw.permutation(len(texts))
        engine.token_budget = int(draw.integers(1, sum(lengths)))
        assert np.array_equal(engine.encode([texts[i] for i in order]), alone[order])
    assert np.array_equal(engine.encode(texts[:1]), alone[:1])
