"""Measure a whole encoder, from token ids to pooled vectors: tokens/s, flop/s, share of the matmul rate, peak memory.

    PYTHONPATH=tests python bench/model.py [--device cuda] [--dtype float16] [--part headline] [--out FILE.json]

A NomicBERT of real size with seeded weights, in fp16 on CUDA, in fp32 and bf16 on a CPU. The vectors of every provider
for the first texts are compared with unpadded's in fp32, and the rounds are interleaved. The matmul rate is the highest
flop/s of a large matmul on this machine. `--part headline` measures texts of 512 and of 8192 tokens on CUDA, with each
choice of kernels; `--part rest` the other workloads and the latency of a query. `--lengths` is a file of token counts
for the workload of real documents on CUDA; by default those of Python's 736 enhancement proposals, at most 8192. A
provider that cannot run is listed with the reason. The last line on stdout is JSON, even if the run is interrupted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from op_cases import FUSES, with_fusion
from packed_baseline import PackedBaseline
from support import checkpoints

import unpadded
from unpadded.cli.benchmark.comparison import flops, interleave
from unpadded.cli.benchmark.machine import matmul_rate
from unpadded.engine import Engine

LONGEST = 8192
TOKENS = 16 * 32768  # per workload of texts of one length on CUDA: 16 batches
QUERY = 32  # tokens
WARM_UP = 64  # tokens per text on a CPU
INVARIANT, COMPILED = "unpadded, batch-invariant", "transformers, compiled"
HEADLINE = ("512 tokens", "8192 tokens")  # workloads
SMALL = {"layers": 1, "hidden": 64, "heads": 2, "intermediate": 128}
Ids = list[np.ndarray]
Run = Callable[[Ids], np.ndarray]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", help="default: float16 on CUDA, float32 and bfloat16 on a CPU")
    parser.add_argument("--lengths", type=Path, default=harness.ROOT / "bench" / "lengths.txt")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, help="default: 5 on CUDA, 3 on a CPU")
    parser.add_argument("--part", choices=("all", "headline", "rest"), default="all")
    parser.add_argument("--without", action="append", default=[], help="a choice of kernels to leave out")
    parser.add_argument(
        "--small",
        action="store_true",
        help="a tiny model and the workloads of CUDA with short texts, to test this script",
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    draw = np.random.default_rng(0)
    workloads = cuda_workloads(args.lengths, draw) if device.type == "cuda" or args.small else cpu_workloads(draw)
    if args.small:
        workloads = {name: [min(length, 100) for length in lengths[:5]] for name, lengths in workloads.items()}
    if args.part != "all":
        workloads = {
            name: texts for name, texts in workloads.items() if (name in HEADLINE) == (args.part == "headline")
        }
    rounds = args.rounds or (1 if args.small else 5 if device.type == "cuda" else 3)
    with harness.reporting(args.out) as result, tempfile.TemporaryDirectory() as name:
        shape = SMALL if args.small else checkpoints.REAL | {"layers": args.layers}
        folder = checkpoints.write_nomic(Path(name), names="transformers", tokenizer=False, **shape)
        result |= {
            "layers": shape["layers"],
            "matmul_rate": {},
            "rows": [],
            "not run": {},
            "latency": {},
            "batch_invariant_cost": {},
        }
        exact = unpadded.load(folder, device=device, dtype="float32", max_length=LONGEST)
        dtypes = ["float16"] if device.type == "cuda" else ["float32", "bfloat16"]
        for dtype in args.dtype or dtypes[: 1 if args.small else 2]:
            made = makers(folder, device, dtype, args.part, args.small)
            made = {name: make for name, make in made.items() if name.removeprefix("unpadded, ") not in args.without}
            result["matmul_rate"][dtype] = matmul_rate(device, getattr(torch, dtype), 1 if args.small else 20)
            bench(dtype, folder, exact, workloads, made, rounds, args.part, result)


def cuda_workloads(lengths: Path, draw: np.random.Generator) -> dict[str, list[int]]:
    found = np.minimum(np.array(lengths.read_text().split(), np.int64), LONGEST)
    equal = {f"{length} tokens": [length] * (TOKENS // length) for length in (128, 512, 2048, 8192)}
    return equal | {"real documents": draw.choice(found, 64, replace=False).tolist()}


def cpu_workloads(draw: np.random.Generator) -> dict[str, list[int]]:
    return {
        "16 texts, 100 to 2048 tokens": draw.integers(100, 2049, 16).tolist(),
        "32 texts, 8 to 400 tokens": draw.integers(8, 401, 32).tolist(),
        "16 x 512 tokens": [512] * 16,
        "4 x 2048 tokens": [2048] * 4,
        "1 x 8192 tokens": [8192],
    }


def bench(
    dtype: str,
    folder: Path,
    exact: Engine,
    workloads: dict[str, list[int]],
    made: dict[str, Callable[[], Run]],
    rounds: int,
    part: str,
    result: dict[str, Any],
) -> None:
    """Measure every workload in one dtype and add the rows to the result."""
    device, draw = exact._pipeline.runner.device, np.random.default_rng(0)
    rate = result["matmul_rate"][dtype]
    print(f"{dtype}: a large matmul reaches {rate / 1e12:.3g} TFLOP/s")
    providers: dict[str, Run] = {}
    for name, make in made.items():
        try:
            providers[name] = make()
        except Exception as error:  # one provider that raises must not stop the others
            not_run(result, f"{name}, {dtype}", error)
    texts = {
        workload: [draw.integers(5, 30000, length, dtype=np.int32) for length in lengths]
        for workload, lengths in workloads.items()
    }
    compiled = {name: providers.pop(name) for name in [COMPILED] if name in providers}
    for workload, ids in texts.items():
        compare(workload, dtype, ids, providers, exact, rate, rounds, result)
    if part != "headline":
        query_latency(dtype, folder, device, draw, result)
    if not compiled:
        return
    for workload, ids in texts.items():  # last, so that a run interrupted while this compiles has all other rows
        compare(workload, dtype, ids, compiled, exact, rate, rounds, result)


def makers(folder: Path, device: torch.device, dtype: str, part: str, small: bool) -> dict[str, Callable[[], Run]]:
    """Return constructors of the functions from token ids to mean-pooled vectors; those that cannot run here raise."""
    cuda = device.type == "cuda"
    load = partial(unpadded.load, folder, device=device, dtype=dtype, max_length=LONGEST)
    found: dict[str, Callable[[], Run]] = {
        "unpadded": lambda: unpadded_run(load()),
        "transformers, padded": lambda: partial(padded, transformers(folder, device, dtype), device),
        "packed baseline": lambda: PackedBaseline(load()),
    }
    if not cuda and not small:
        return found
    if part != "rest":
        found |= {name: partial(fusing_run, load, fuses) for name, fuses in FUSES.items()}
        found["unpadded, PyTorch's attention"] = lambda: unpadded_run(load(attention="torch"))
    if part != "headline":
        found |= {
            "unpadded, flash-attn": lambda: unpadded_run(load(attention="flash-attn")),
            INVARIANT: lambda: unpadded_run(load(batch_invariant=True)),
            "transformers, flash-attn": lambda: partial(
                padded, transformers(folder, device, dtype, attn_implementation="flash_attention_2"), device
            ),
            COMPILED: lambda: partial(
                padded,
                torch.compile(
                    transformers(folder, device, dtype), dynamic=True, backend="inductor" if cuda else "eager"
                ),
                device,
            ),
        }
    return found


def unpadded_run(engine: Engine) -> Run:
    return partial(engine.encode, prompt="")


def fusing_run(load: Callable[[], Engine], fuses: bool) -> Run:
    """Return the run of an engine of its own, since its CUDA graphs keep the kernels they were captured with."""
    return partial(with_fusion, fuses, unpadded_run(load()))


def transformers(folder: Path, device: torch.device, dtype: str, **options: Any) -> torch.nn.Module:
    from transformers import NomicBertModel

    model = NomicBertModel.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    return model.to(device).eval()


@torch.inference_mode()
def padded(model: torch.nn.Module, device: torch.device, ids: Ids) -> np.ndarray:
    """Run a model as sentence-transformers does: texts sorted by length, batches of 32, padded, mean-pooled."""
    order = np.argsort([-len(row) for row in ids], kind="stable")
    vectors = []
    for start in range(0, len(ids), 32):
        chosen = [torch.from_numpy(ids[i]).long() for i in order[start : start + 32]]
        batch = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in chosen], device=device)
        mask = (torch.arange(batch.shape[1], device=device) < lengths[:, None]).long()
        hidden = model(input_ids=batch, attention_mask=mask).last_hidden_state.float()
        pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        vectors.append(pooled.cpu().numpy())
    return np.concatenate(vectors)[np.argsort(order)]


def compare(
    workload: str,
    dtype: str,
    ids: Ids,
    providers: dict[str, Run],
    exact: Engine,
    rate: float,
    rounds: int,
    result: dict[str, Any],
) -> None:
    """Add one row per provider; one that fails is listed in "not run"."""
    device = exact._pipeline.runner.device
    lengths = np.array([len(row) for row in ids], np.int64)
    tokens, work = int(lengths.sum()), flops(exact.checkpoint.spec, lengths)
    # in fp32 attention of 32,768 tokens takes seconds on a GPU
    checked = max(1, int((lengths.cumsum() <= LONGEST).sum()))
    expected = exact.encode(ids[:checked], prompt="")
    runs = {}
    for name, run in providers.items():
        try:
            run(
                ids if device.type == "cuda" else [row[:WARM_UP] for row in ids]
            )  # on CUDA compiles and captures graphs
            runs[name] = partial(run, ids)
        except Exception as error:
            not_run(result, f"{name}, {dtype}, {workload}", error)
    seconds, vectors, peaks = interleave(runs, rounds, device)
    vectors = {name: rows[:checked] for name, rows in vectors.items()}
    for name in runs:
        median = statistics.median(seconds[name])
        row = {
            "workload": workload,
            "provider": name,
            "dtype": dtype,
            "tokens": tokens,
            "seconds": seconds[name],
            "tokens_per_second": tokens / median,
            "flop_per_second": work / median,
            "share_of_matmul_rate": work / median / rate,
            "min_cosine": float(cosines(vectors[name], expected).min()),
            "relative_error": float(np.linalg.norm(vectors[name] - expected) / np.linalg.norm(expected)),
            "peak_bytes": peaks[name],
        }
        print(
            f"  {workload}, {name}: {tokens / median:,.0f} tokens/s, {work / median / 1e12:.3g} TFLOP/s, "
            f"{row['share_of_matmul_rate']:.0%} of the matmul rate, min cosine to fp32 {row['min_cosine']:.6f}"
        )
        result["rows"].append(row)
    here = [row for row in result["rows"] if (row["workload"], row["dtype"]) == (workload, dtype)]
    rates = {row["provider"]: row["tokens_per_second"] for row in here}
    if INVARIANT in runs and "unpadded" in runs:
        result["batch_invariant_cost"][workload] = 1 - rates[INVARIANT] / rates["unpadded"]
        print(f"  {workload}: batch_invariant costs {result['batch_invariant_cost'][workload]:.1%} of the tokens/s")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def query_latency(
    dtype: str, folder: Path, device: torch.device, draw: np.random.Generator, result: dict[str, Any]
) -> None:
    """Add the latency of one query of 32 tokens, from ids to the vector on the host: median and p90 of 100 runs."""
    ids = [draw.integers(5, 30000, QUERY, dtype=np.int32)]
    modes = {"with graphs": True, "without graphs": False} if device.type == "cuda" else {"": True}
    for name, graphs in modes.items():
        engine = unpadded.load(folder, device=device, dtype=dtype, max_length=LONGEST)
        if not graphs:
            engine._pipeline.runner.graphs = None
        seconds = []
        for _ in range(120):
            start = time.perf_counter()
            engine.encode(ids, prompt="")
            seconds.append(time.perf_counter() - start)
        median, p90 = np.percentile(seconds[20:], [50, 90])
        name = f"{dtype} {name}".strip()
        print(f"one query of {QUERY} tokens, {name}: {median * 1e3:.2f} ms (p90 {p90 * 1e3:.2f} ms)")
        result["latency"][name] = {"median": float(median), "p90": float(p90), "seconds": seconds[20:]}


def not_run(result: dict[str, Any], what: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
    result["not run"][what] = reason
    print(f"  {what}: does not run here: {reason}")


if __name__ == "__main__":
    main()
