"""Run every operation once at NomicBERT's shapes and compare it with its reference, in fp16 and bf16.

    PYTHONPATH=engine:kernels:tests python bench/smoke.py [--only NAME ...] [--dtype float16] [--out FILE.json]

One process per dtype, both at the same time. If an operation crashes its process, breaks the CUDA context or runs
longer than --limit seconds, another process runs the operations after it, without that choice of kernels. Exit code:
0 if all are correct, 1 if one that every forward pass of NomicBERT runs is not, 2 if only others are not. The last line
on stdout is JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import op_cases
import torch

# What every forward pass of NomicBERT runs.
NOMIC_BERT = (
    *("linear and swiglu", "rotary", "attention, texts", "attention, mixed", "add_layer_norm"),
    *("embedding", "mean_pool", "matryoshka"),
)
DTYPES = ("float16", "bfloat16") if op_cases.CUDA else ("float32",)
BROKEN = 77  # exit code of a process whose CUDA context is unusable


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=list(op_cases.CASES), help="operations by name (default: all)")
    parser.add_argument("--dtype", action="append", help=f"default: {' and '.join(DTYPES)}")
    parser.add_argument("--limit", type=int, default=20, help="seconds for one operation (default: 20)")
    parser.add_argument("--without", action="append", default=[], help="a provider that does not run")
    parser.add_argument("--child", action="store_true", help="run in this process and print one JSON object per run")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - op_cases.CASES.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; use some of {', '.join(op_cases.CASES)}")
    if args.child:
        run(args.dtype[0], args.only, args.limit, args.without)
        return
    with harness.reporting(args.out) as result, ThreadPoolExecutor() as pool:
        result["rows"] = rows = []
        list(pool.map(lambda dtype: rows.extend(check(dtype, args.only, args.limit)), args.dtype or DTYPES))
        failed = [(row["case"], row["provider"]) for row in rows if "failed" in row]
        print(f"{len(rows) - len(failed)} of {len(rows)} results are correct")
    if failed:
        needed = any(case.startswith(NOMIC_BERT) and provider == "unpadded" for case, provider in failed)
        raise SystemExit(1 if needed else 2)


def check(dtype: str, names: Sequence[str], limit: int) -> Iterator[dict[str, Any]]:
    """Yield one row per operation and provider, from as many processes as it takes."""
    left = list(names)
    command = [sys.executable, __file__, "--child", "--dtype", dtype, "--limit", str(limit), "--only"]
    while left:
        running = None  # the row of a run that has begun and not ended
        with subprocess.Popen([*command, *left], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                row = json.loads(line)
                left = left[left.index(row["case"]) :]
                running = None if row.keys() & {"error", "failed"} else row
                if running is None:
                    print_row(row)
                    yield row
        if child.returncode == 0:
            return
        if running is not None:
            row = running | {"failed": f"its process exited with {child.returncode}"}
            print_row(row)
            yield row
            if row["provider"] != "unpadded":
                command[2:2] = ["--without", row["provider"]]
        elif child.returncode != BROKEN:
            raise SystemExit(f"a process for {dtype} exited with {child.returncode} outside of any operation")
        left = left[1:]


def print_row(row: dict[str, Any]) -> None:
    result = f"FAILED: {row['failed']}" if "failed" in row else f"relative error {row['error']:.1e}"
    print(f"  {row['case']}, {row['dtype']}, {row['provider']}: {result}", flush=True)


def run(dtype: str, names: Sequence[str], limit: int, without: Sequence[str]) -> None:
    """Print one object before each run of an operation by a provider of this project, and its result after it."""
    op_cases.DTYPE = getattr(torch, dtype)
    for name in names:
        row: dict[str, Any] = {"case": name, "dtype": dtype, "provider": "unpadded"}
        print(json.dumps(row), flush=True)  # its inputs are computed by operations, too
        torch.manual_seed(0)
        case = op_cases.CASES[name]()
        for provider in (found for found in case.providers if found.startswith("unpadded") and found not in without):
            row = {"case": name, "dtype": dtype, "provider": provider}
            print(json.dumps(row), flush=True)
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
            try:
                row["error"] = op_cases.relative_error(case.providers[provider], case)
                if not row["error"] <= op_cases.TOLERANCE:
                    row["failed"] = f"relative error {row['error']:.2g}"
            except Exception as error:  # compilers and launches raise errors of any type
                row["failed"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            print(json.dumps(row), flush=True)
            if "failed" in row and op_cases.CUDA:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    os._exit(BROKEN)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
