"""What every kernel compiles to on each GPU generation: no spills, the tensor cores' instructions, wide loads.

Needs no GPU. Where UNPADDED_TRITON_36 names a directory that holds triton 3.6 (pip install --target), that one is tried
too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
TRITON_36 = os.environ.get("UNPADDED_TRITON_36")
FLOATS = {"fp32", "fp16", "bf16"}
DTYPES = {80: FLOATS, 89: {"fp8"}, 90: {*FLOATS, "fp8"}, 100: {*FLOATS, "fp8"}}
TENSOR_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
FP8_INSTRUCTION = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
PRODUCTS = ("_attention_kernel", "_linear_kernel", "_route_kernel", "_expert_linear_kernel")
STREAMS = tuple(f"_{name}_kernel" for name in ("add_layer_norm", "rms_norm", "activation", "rotary", "quantize_rows"))
# A row a text, from one token each: nothing to stream.
NO_STREAM = ("_token_kernel",)


@pytest.fixture(
    scope="module",
    params=[
        "installed",
        pytest.param("3.6", marks=pytest.mark.skipif(not TRITON_36, reason="UNPADDED_TRITON_36 is not set")),
    ],
)
def rows(request):
    """One object for each kernel, dtype, case and generation, as tests/aot.py describes them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), *([TRITON_36] if request.param == "3.6" else [])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(ROOT / "tests/aot.py"), *map(str, DTYPES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result = json.loads(ran.stdout)
    assert request.param == "installed" or result["triton"].startswith("3.6"), result["triton"]
    print(table(result))
    return result["rows"]


def table(result):
    lines = [f"triton {result['triton']}: warps, registers, stack, shared, programs a multiprocessor, wide loads, mma"]
    for row in result["rows"]:
        lines.append(
            f"{row['kernel']:<24}{row['case']:<22}{row['dtype']} sm_{row['capability']:<4}{row['warps']:>2}"
            f"{row['registers']:>5}{row['stack']:>5}{row['shared']:>8}{row['programs_per_multiprocessor']:>4}"
            f"{row['wide_loads']:>4}{tensor_instructions(row):>5}"
        )
    return "\n".join(lines)


def tensor_instructions(row):
    return row[(FP8_INSTRUCTION if row["dtype"] == "fp8" else TENSOR_INSTRUCTION)[row["capability"]]]


def test_every_kernel_dtype_and_generation_is_there(rows):
    names = {row["kernel"] for row in rows}
    sources = "".join(path.read_text() for path in (ROOT / "kernels/unpadded_kernels").glob("*.py"))
    assert names == {word.split("(")[0] for word in sources.split("def ") if "_kernel(" in word.split("\n")[0]}
    for capability, dtypes in DTYPES.items():
        assert {row["dtype"] for row in rows if row["capability"] == capability} == dtypes


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack"] or row["LDL"] or row["STL"]] == []


def test_products_of_16_and_8_bits_run_on_the_tensor_cores(rows):
    products = [row for row in rows if row["kernel"] in PRODUCTS and row["dtype"] != "fp32"]
    assert products
    assert [row for row in products if not tensor_instructions(row)] == []


def test_the_wgmmas_of_a_product_follow_one_another(rows):
    """ptxas may run them one by one, each behind an arrive of its own and with its latency (C7510 to C7515)."""
    products = [row for row in rows if row["capability"] == 90 and tensor_instructions(row)]
    assert products
    assert [row for row in products if row["WARPGROUP.ARRIVE"] >= tensor_instructions(row)] == []


def test_loads_are_128_bits_wide(rows):
    assert [row for row in rows if row["kernel"] not in NO_STREAM and not row["wide_loads"]] == []


def test_exponentials_of_full_attention_run_beside_its_products_on_sm_90(rows):
    """Tensor cores add up a block's values during the softmax of the next, a third of it at least."""
    attention = [row for row in rows if row["kernel"] == "_attention_kernel" and row["capability"] == 90]
    # 96 is no power of two, so it goes through pointers and runs sm_80's tile
    full = [row for row in attention if row["dtype"] != "fp32" and "," not in row["case"] and "96" not in row["case"]]
    assert full
    # a block is 128 x 64 scores
    assert [row for row in full if row["exponentials_between_wgmmas"] * row["warps"] * 32 < 128 * 64 / 3] == []


def test_kernels_that_stream_rows_are_not_bound_by_instructions(rows):
    """Issuing takes at most 4/5 of what memory takes for the rows' tensors, each once, on an H200.

    A multiprocessor issues for 4 warps a cycle, and its share of 4.3 TB/s is 18.6 bytes a cycle (132, 1.755 GHz).
    """
    streams = [row for row in rows if row["kernel"] in STREAMS and row["capability"] == 90 and row["dtype"] != "fp32"]
    assert {row["kernel"] for row in streams} == set(STREAMS)

    def share(row):
        return row["instructions"] * row["warps"] * row["programs"] / 4 / (row["bytes"] / 18.6)

    assert [(row["kernel"], row["case"], share(row)) for row in streams if share(row) > 0.8] == []


def test_two_programs_of_attention_share_a_multiprocessor_of_sm_90(rows):
    """One computes its softmax while the other's products run."""
    attention = [row for row in rows if row["kernel"] == "_attention_kernel" and row["capability"] == 90]
    wide = ("head_dim 96", "head_dim 128")
    small = [row for row in attention if row["dtype"] != "fp32" and not row["case"].startswith(wide)]
    assert small and all(row["programs_per_multiprocessor"] >= 2 for row in small)
