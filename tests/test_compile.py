"""Properties of the compiled kernels on each GPU generation: no spills, tensor core instructions, wide loads.

Needs no GPU. Compiled kernels are kept in pytest's cache until a kernel, tests/support/aot.py or triton changes. If
UNPADDED_TRITON_36 names a folder with triton 3.6 (pip install --target), that version is tested too.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
AOT = ROOT / "tests/support/aot.py"
TRITON_36 = os.environ.get("UNPADDED_TRITON_36", "")
FLOATS = ("fp16", "bf16", "fp32")
JOBS = [f"{dtype}:{capability}" for capability in (80, 90, 100) for dtype in FLOATS]
TENSOR_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
MATMULS = ("_attention_kernel", "_linear_kernel", "_route_kernel", "_expert_linear_kernel", "_vocabulary_max_kernel")
STREAMS = tuple(f"_{name}_kernel" for name in ("norm", "activation", "rotary"))


@pytest.fixture(scope="module")
def compiled(pytestconfig) -> Callable[[str, list[str]], list[dict]]:
    """Return a function of a folder with triton ("" for the installed one) and jobs that returns their rows."""
    cache, results = getattr(pytestconfig, "cache", None), {}  # -p no:cacheprovider leaves no cache

    def rows(folder, jobs):
        version = next(iter(distributions(name="triton", path=[folder] if folder else sys.path))).version
        digest = hashlib.sha256()
        for path in (AOT, *sorted((ROOT / "kernels").rglob("*.py"))):
            digest.update(path.read_bytes())
        name, key = f"aot/triton-{version}", digest.hexdigest()
        stored = results.get(name) or (cache and cache.get(name, None)) or {}
        results[name] = stored = stored if stored.get("key") == key else {"key": key}
        missing = [job for job in jobs if job not in stored]
        if missing:
            stored.update(compile_jobs(folder, missing))
            if cache:
                cache.set(name, stored)
        print(table(version, rows := [row for job in jobs for row in stored[job]]))
        return rows

    return rows


def compile_jobs(folder, jobs):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), *([folder] if folder else [])])
    environment |= {"PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(AOT), *jobs]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    results = json.loads(ran.stdout)
    assert all(results[job] for job in jobs)
    return results


@pytest.fixture(
    scope="module",
    params=[
        # 16 seconds of CPU time
        pytest.param(("", ["fp16:90"]), id="fp16 on sm_90"),
        pytest.param(("", JOBS), id="all", marks=pytest.mark.slow),
        pytest.param(
            (TRITON_36, JOBS),
            id="triton 3.6",
            marks=[pytest.mark.slow, pytest.mark.skipif(not TRITON_36, reason="UNPADDED_TRITON_36 is not set")],
        ),
    ],
)
def rows(request, compiled):
    """Return one object per kernel, case, dtype and generation, as tests/support/aot.py describes it."""
    return compiled(*request.param)


def table(version, rows):
    lines = [f"triton {version}: warps, registers, stack, shared, programs per multiprocessor, wide loads, mma"]
    for row in rows:
        lines.append(
            f"{row['kernel']:<24}{row['case']:<22}{row['dtype']} sm_{row['capability']:<4}{row['warps']:>2}"
            f"{row['registers']:>5}{row['stack']:>5}{row['shared']:>8}{row['programs_per_multiprocessor']:>4}"
            f"{row['wide_loads']:>4}{tensor_instructions(row):>5}"
        )
    return "\n".join(lines)


def tensor_instructions(row):
    return row[TENSOR_INSTRUCTION[row["capability"]]]


def test_every_kernel_is_compiled(rows):
    names = {row["kernel"] for row in rows}
    sources = "".join(path.read_text() for path in (ROOT / "kernels/unpadded_kernels").rglob("*.py"))
    assert names == {word.split("(")[0] for word in sources.split("def ") if "_kernel(" in word.split("\n")[0]}


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack"] or row["LDL"] or row["STL"]] == []


def test_every_kernel_fits_a_multiprocessor(rows):
    """Its registers and shared memory: 227 KB on sm_90 and sm_100."""
    assert [row for row in rows if row["programs_per_multiprocessor"] < 1] == []


def test_matmuls_of_16_and_8_bits_run_on_the_tensor_cores(rows):
    matmuls = [row for row in rows if row["kernel"] in MATMULS and row["dtype"] != "fp32"]
    assert matmuls
    assert [row for row in matmuls if not tensor_instructions(row)] == []


def test_the_wgmmas_of_a_matmul_are_not_serialized(rows):
    """ptxas may put an arrive before each of them, which exposes its latency (C7510 to C7515)."""
    matmuls = [row for row in rows if row["capability"] == 90 and tensor_instructions(row)]
    assert matmuls
    assert [row for row in matmuls if row["WARPGROUP.ARRIVE"] >= tensor_instructions(row)] == []


def test_loads_are_128_bits_wide(rows):
    assert [row for row in rows if not row["wide_loads"]] == []


def test_kernels_that_stream_rows_are_not_bound_by_instructions(rows):
    """Issuing takes at most 4/5 of the time in which an H200's memory transfers each tensor once.

    A multiprocessor issues for 4 warps per cycle; its share of 4.3 TB/s is 18.6 bytes per cycle (132, 1.755 GHz).
    """
    streams = [row for row in rows if row["kernel"] in STREAMS and row["capability"] == 90 and row["dtype"] != "fp32"]
    assert {row["kernel"] for row in streams} == set(STREAMS)

    def share(row):
        return row["instructions"] * row["warps"] * row["programs"] / 4 / (row["bytes"] / 18.6)

    assert [(row["kernel"], row["case"], share(row)) for row in streams if share(row) > 0.8] == []


def test_two_programs_of_attention_share_a_multiprocessor_of_sm_90(rows):
    """One computes its softmax while the matmuls of the other run."""
    attention = [row for row in rows if row["kernel"] == "_attention_kernel" and row["capability"] == 90]
    wide = ("head_dim 96", "head_dim 128")
    small = [row for row in attention if row["dtype"] != "fp32" and not row["case"].startswith(wide)]
    assert small and all(row["programs_per_multiprocessor"] >= 2 for row in small)
