"""The whole encoder, ids to pooled vectors, next to what people use: tokens/s, flop/s, share of the floor, peak memory.

    python bench/model.py [--device cuda] [--lengths FILE] [--tokens 65536] [--layers 12] [--out FILE.json]

A NomicBERT of real dimensions with seeded weights, made on the spot, in fp16 on CUDA and fp32 on a CPU. First every
provider's vectors are held against ours in fp32; only then is anything timed, in turns. The floor is the time that the
flops take at the rate of the fastest matrix product measured here. `--lengths` is a file of token counts, the mix of
real documents beside the fixed lengths; by default those of Python's 736 enhancement proposals, cut at 8192. The last
line on stdout is JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ceilings
import checkpoints
import machine
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import unpadded
from unpadded.batch import PackedBatch, pack
from unpadded.engine import Engine
from unpadded_kernels.activation import activation_reference
from unpadded_kernels.embedding import embedding_reference
from unpadded_kernels.layer_norm import add_layer_norm_reference
from unpadded_kernels.pooling import pool_reference
from unpadded_kernels.rotary import rotary_cos_sin_reference, rotary_reference

MAX_LENGTH = 8192
Ids = list[np.ndarray]


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fixed", type=int, nargs="*", default=[128, 512, 2048, 8192], help="lengths of equal texts")
    parser.add_argument("--lengths", type=Path, default=Path(__file__).with_name("lengths.txt"))
    parser.add_argument("--tokens", type=int, default=65536, help="of each workload of equal texts")
    parser.add_argument("--mix-texts", type=int, default=64, help="texts drawn from the lengths file")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)

    draw = np.random.default_rng(0)
    mix = np.minimum(np.array(args.lengths.read_text().split(), np.int64), MAX_LENGTH)
    workloads = {f"{length} tokens": [length] * max(1, args.tokens // length) for length in args.fixed}
    workloads["real documents"] = draw.choice(mix, args.mix_texts, replace=False).tolist()
    rows, latency = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.write_nomic(
            Path(name), names="transformers", tokenizer=False, **checkpoints.REAL | {"layers": args.layers}
        )
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        rate = ceilings.product_rate(device, dtype)
        print(f"{dtype}: matrix products alone reach {rate / 1e12:.3g} TFLOP/s")
        providers = make_providers(folder, device, dtype)
        exact = unpadded.load(folder, device=device, dtype="float32", max_length=MAX_LENGTH)
        for workload, lengths in workloads.items():
            ids = [draw.integers(5, 30000, length, dtype=np.int32) for length in lengths]
            rows += compare(workload, ids, providers, exact, rate, args.rounds, device)
        latency = query_latency(providers["unpadded"], draw, device)
    machine.report({"product_rate": rate, "rows": rows, "latency": latency}, args.out)


def make_providers(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Ids], np.ndarray]]:
    """Name -> ids to mean-pooled vectors. What cannot be made here is left out and said."""
    from transformers import NomicBertModel

    load = partial(unpadded.load, folder, device=device, dtype=dtype, max_length=MAX_LENGTH)
    engine = load()
    model = NomicBertModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    providers: dict[str, Callable[[Ids], np.ndarray]] = {
        "unpadded": partial(engine.encode, prompt=""),
        "transformers, padded": partial(padded, model, device),
        "packed baseline": partial(packed_baseline, engine),
    }
    if device.type == "cuda":
        providers["unpadded, PyTorch's attention"] = partial(load(attention="torch").encode, prompt="")
        providers["unpadded, batch-invariant"] = partial(load(batch_invariant=True).encode, prompt="")
        providers["transformers, compiled"] = partial(padded, torch.compile(model, dynamic=True), device)
        try:
            flash = NomicBertModel.from_pretrained(folder, dtype=dtype, attn_implementation="flash_attention_2")
            providers["transformers, flash-attn"] = partial(padded, flash.to(device).eval(), device)
        except (ImportError, ValueError) as error:
            print(f"transformers with flash-attn does not run here: {error}")
    return providers


@torch.inference_mode()
def padded(model: torch.nn.Module, device: torch.device, ids: Ids) -> np.ndarray:
    """transformers and sentence-transformers as people run them: sorted by length, 32 a batch, padded, mean-pooled."""
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


@torch.inference_mode()
def packed_baseline(engine: Engine, ids: Ids) -> np.ndarray:
    """The same packed plan from library parts: F.linear, PyTorch's variable-length attention, elementwise in torch."""
    runner = engine.runner
    spec, weights = runner.encoder.spec, runner.encoder.weights
    batch: PackedBatch = runner._to_device(pack(ids, spec))
    token_type = None if weights.token_type is None else weights.token_type[0]
    x = embedding_reference(
        batch.input_ids, batch.positions, weights.word, token_type, None, weights.norm, weights.norm_bias, spec.norm_eps
    )
    assert batch.inv_freq is not None
    cos_sin = rotary_cos_sin_reference(batch.positions, batch.inv_freq, batch.cu_seqlens)
    for layer in weights.layers:
        qkv = F.linear(x, layer.qkv).view(-1, 3, spec.heads, spec.head_dim)
        rotary_reference(qkv, cos_sin)
        out = F.linear(varlen_attention(qkv, batch, spec.head_dim**-0.5), layer.out)
        x = add_layer_norm_reference(out, x, layer.attention_norm, layer.attention_norm_bias, spec.norm_eps)
        up = activation_reference(F.linear(x, layer.up), spec.activation)
        down = F.linear(up, layer.down)
        x = add_layer_norm_reference(down, x, layer.mlp_norm, layer.mlp_norm_bias, spec.norm_eps)
    pooled = pool_reference(x, batch.cu_seqlens, "mean", False, spec.hidden, False)
    return pooled.cpu().numpy()


def varlen_attention(qkv: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    longest = batch.max_seqlen
    if qkv.is_cuda:
        q, k, v = qkv.unbind(1)
        cu_seqlens = batch.cu_seqlens
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False, scale=scale)[0].flatten(1)
    texts = (text.permute(1, 2, 0, 3) for text in qkv.split(batch.lengths))
    return torch.cat([F.scaled_dot_product_attention(*text, scale=scale).transpose(0, 1) for text in texts]).flatten(1)


def compare(
    workload: str,
    ids: Ids,
    providers: dict[str, Callable[[Ids], np.ndarray]],
    exact: Engine,
    rate: float,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row a provider: accuracy first, then its speed; a provider that fails says so and the others run."""
    spec = exact.checkpoint.spec
    lengths = np.array([len(row) for row in ids], np.int64)
    tokens = int(lengths.sum())
    linear = 2 * spec.layers * spec.hidden * (4 * spec.hidden + spec.up_rows + spec.intermediate)
    flops = linear * tokens + 4 * spec.layers * spec.hidden * int((lengths**2).sum())
    expected = exact.encode(ids, prompt="")
    rows: dict[str, dict[str, Any]] = {}
    for name, run in providers.items():
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            vectors = run(ids)
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            print(f"  {workload}, {name}: failed: {str(error).splitlines()[0]}")
            continue
        rows[name] = {
            "workload": workload,
            "provider": name,
            "tokens": tokens,
            "least_cosine": float(cosines(vectors, expected).min()),
            "relative_error": float(np.linalg.norm(vectors - expected) / np.linalg.norm(expected)),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "seconds": [],
        }
    for _ in range(rounds):
        for name, row in rows.items():
            start = time.perf_counter()
            providers[name](ids)  # ends on the host, so it has waited for the device
            row["seconds"].append(time.perf_counter() - start)
    for name, row in rows.items():
        seconds = statistics.median(row["seconds"])
        row |= {
            "tokens_per_second": tokens / seconds,
            "flop_per_second": flops / seconds,
            "share_of_floor": flops / seconds / rate,
        }
        print(
            f"  {workload}, {name}: {tokens / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s, "
            f"{row['share_of_floor']:.0%} of the floor, least cosine to fp32 {row['least_cosine']:.6f}"
        )
    return list(rows.values())


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def query_latency(
    run: Callable[[Ids], np.ndarray], draw: np.random.Generator, device: torch.device
) -> dict[str, float]:
    """Seconds of one 32-token query, ids to vector on the host: median and 90th percentile of 100."""
    ids = [draw.integers(5, 30000, 32, dtype=np.int32)]
    seconds = []
    for _ in range(120):
        start = time.perf_counter()
        run(ids)
        seconds.append(time.perf_counter() - start)
    median, p90 = np.percentile(seconds[20:], [50, 90])
    print(f"one query of 32 tokens: {median * 1e3:.2f} ms (90th percentile {p90 * 1e3:.2f} ms)")
    return {"median": float(median), "p90": float(p90)}


if __name__ == "__main__":
    main()
