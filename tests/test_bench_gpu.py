"""bench/gpu.sh and what it runs: the order and limits of its steps, its results, and the figures of its parts."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import gpu_summary
import model
import model_of_time
import numpy as np
import op_cases
import packed_baseline
import pytest
import smoke
import throughput
import torch
import tune
from support.checkpoints import write_nomic
from torch.utils._python_dispatch import TorchDispatchMode

import unpadded
import unpadded_kernels
from unpadded.execution.pipeline import WINDOW_BATCHES
from unpadded.loading import TOKEN_BUDGET
from unpadded_kernels.tiles import Tile

ROOT = Path(__file__).parents[1]
TESTS = ["kernel-tests", "engine-tests", "memory-tests", "family-tests"]
STEPS = ["smoke", "ceilings", "headline", "matmuls", *TESTS, "kernels", "model", "throughput", "heads", "compiled"]


@pytest.fixture
def gpu_run(tmp_path):
    """Return a function that starts gpu.sh with a python3 that prints its arguments and does what `cases` tell it."""

    def run(cases="", *flags, programs=(), **options):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        summary = f'*gpu_summary*) exec {sys.executable} "$@" ;;'
        script = f'#!/bin/sh\necho "ran $*"\ncase "$*" in {cases} {summary} esac\n'
        for name, text in {"python3": script, **dict.fromkeys(programs, '#!/bin/sh\necho "ran $*"\n')}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "bench/gpu.sh"), "--out", str(tmp_path / "out"), *flags]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    return run


def finished(process):
    printed, errors = process.communicate(timeout=3600)
    assert not errors
    lines = printed.splitlines()
    return lines, [line[3:] for line in lines if line.startswith("==")]


def log(folder, name):
    with tarfile.open(folder / "out/results.tar.gz") as archive:
        return archive.extractfile(f"./{name}.log").read().decode()


def test_gpu_script_continues_after_a_step_that_fails(tmp_path, gpu_run):
    process = gpu_run("*bench/model.py*) exit 3 ;;")
    lines, steps = finished(process)
    assert steps == STEPS
    assert process.returncode == 1 and sum("FAILED with 3" in line for line in lines) == 2
    tests = log(tmp_path, "kernel-tests")
    assert "-n 14 --dist worksteal" in tests
    assert all(str(test.relative_to(ROOT)) in tests for test in (ROOT / "tests").glob("test_kernel_*.py"))
    families = log(tmp_path, "family-tests")
    assert "tests/test_family_gte.py" in families and "tests/test_integration_transformers.py" in families
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.md"]
    last = lines[lines.index(next(line for line in lines if line.startswith("smoke: ok"))) :]
    assert len(last) <= 40 and any("headline: FAILED (3)" in line for line in last)
    assert "headline: FAILED (3)" in (tmp_path / "out/summary.md").read_text()


def test_gpu_script_rejects_unknown_arguments(gpu_run):
    process = gpu_run("", "--fast")
    assert "unknown argument --fast" in process.communicate()[1] and process.returncode == 2


def test_gpu_script_runs_one_process_per_test_file_without_xdist(tmp_path, gpu_run):
    finished(gpu_run("*xdist*) exit 1 ;;"))
    ran = [line for line in log(tmp_path, "kernel-tests").splitlines() if line.startswith("ran")]
    files = [*(ROOT / "tests").glob("test_kernel_*.py"), ROOT / "tests/test_ops.py"]
    assert sorted(line.split()[-1] for line in ran) == sorted(str(file.relative_to(ROOT)) for file in files)
    assert "-k gpu or cuda or captured tests/test_family" in log(tmp_path, "family-tests")


def test_gpu_script_times_no_model_whose_operations_are_wrong(tmp_path, gpu_run):
    wrong = "  attention, texts of 512, float16, unpadded: FAILED: nan"
    _, steps = finished(gpu_run(f'*smoke.py*) echo "{wrong}"; exit 1 ;;', programs=["compute-sanitizer"]))
    skipped = {step.split(":")[0] for step in steps if step.endswith(": skipped")}
    assert skipped == {"headline", "model", "throughput", "heads"}
    assert steps[1] == "sanitizer"
    assert "--dtype float16 --only attention, texts of 512" in log(tmp_path, "sanitizer")


def test_gpu_script_leaves_out_a_choice_of_kernels_that_is_wrong(tmp_path, gpu_run):
    wrong = "  attention, texts of 512, bfloat16, unpadded, triton: FAILED: its process exited with 1"
    _, steps = finished(gpu_run(f'*smoke.py*) echo "{wrong}"; exit 2 ;;', programs=["compute-sanitizer"]))
    assert steps == [*STEPS, "sanitizer"]
    assert "--part headline --without triton" in log(tmp_path, "headline")
    assert "and not triton and not torch.compile" in log(tmp_path, "matmuls")


def test_gpu_script_keeps_its_results_if_it_is_interrupted(tmp_path, gpu_run):
    process = gpu_run("*--benchmark-json*) exec sleep 600 ;;")
    for line in process.stdout:
        if line.startswith("== matmuls"):
            break
    process.send_signal(signal.SIGINT)
    lines, steps = finished(process)
    assert process.returncode == 1 and not steps  # no step after the one that was interrupted
    assert lines[-1].endswith("interrupted: FAILED (130), 0 s")
    assert "ran bench/model.py" in log(tmp_path, "headline")
    assert "interrupted" in (tmp_path / "out/summary.md").read_text()


@pytest.mark.slow
def test_gpu_script_runs_every_step_with_small_shapes(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--out", str(tmp_path), "--small"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stdout
    assert len(list(tmp_path.iterdir())) <= 7  # a GPU machine returns at most eight, one of them the caller's log
    headline, rest, text, matmuls, kernels = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("headline", "model", "throughput", "matmuls", "kernels")
    )
    for row in headline["rows"] + rest["rows"]:
        assert row["min_cosine"] >= 0.99999, row["provider"]
    assert {row["workload"] for row in headline["rows"]} == set(model.HEADLINE)
    assert {row["provider"] for row in headline["rows"]} == {
        *("unpadded", *model.FUSES, "transformers, padded", "packed baseline")
    }
    assert {row["provider"] for row in rest["rows"]} >= {"unpadded", "transformers, compiled"}
    assert "CUDA" in headline["not run"]["unpadded, PyTorch's attention, float32"]
    workloads = [found["workload"] for found in text["models"][-1]["workloads"]]
    assert workloads == ["512 tokens", "50 tokens", "8192 tokens", "real documents"]
    assert {row["extra_info"]["kernel"] for row in matmuls["benchmarks"]} == {"linear and swiglu"}
    assert {row["extra_info"]["kernel"] for row in kernels["benchmarks"]} == {"rms_norm"}
    assert all(row["extra_info"]["share"] > 0 for row in kernels["benchmarks"])
    summary = (tmp_path / "summary.md").read_text()
    lines = summary.split("```")[1].strip().splitlines()
    assert lines == ran.stdout.splitlines()[-len(lines) :] and 20 < len(lines) <= 40
    assert "## Scores of pairs" in summary and any("score, ettin-reranker-150m, float32: " in line for line in lines)
    assert "## Matmuls and attention" in summary and "## Token ids to vectors, by choice of kernels" in summary
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = set(archive.getnames())
        svg = archive.extractfile("./model.svg").read()
    assert {f"./{name}.log" for name in STEPS[:-1]} | {"./smoke.json", "./heads.json", "./predictions.log"} <= names
    assert ElementTree.fromstring(svg) is not None


def test_summary_has_at_most_forty_lines(tmp_path):
    card = {"machine": {"gpu": "NVIDIA H200", "python": "3.12.3", "packages": {"torch": "2.11.0"}, "commit": "x"}}
    rows = [
        {"provider": f"p{i}", "dtype": "float16", "workload": "512 tokens", "tokens_per_second": 2e6, "min_cosine": 1.0}
        for i in range(60)
    ]
    rows[1]["provider"] = "long name " * 20
    (tmp_path / "headline.json").write_text(json.dumps(card | {"rows": rows}))
    (tmp_path / "model.json").write_text("{")  # the process was killed while it wrote
    (tmp_path / "steps.txt").write_text("smoke 0 31\nheadline 124 85\nmodel skipped 0\n")
    (tmp_path / "kernel-tests.log").write_text("FAILED tests/a.py::b\n==== 1 failed, 7 passed in 3.21s ====\n")
    wrong = {"case": "attention", "dtype": "bfloat16", "provider": "unpadded, triton", "failed": "relative error nan"}
    (tmp_path / "smoke.json").write_text(json.dumps({"rows": [wrong]}))
    lines = gpu_summary.summary(tmp_path)
    assert len(lines) == 40 and lines[-1] == "... and 27 more lines"
    assert lines[:3] == [
        "NVIDIA H200; Python 3.12.3, torch 2.11.0; commit x",
        "smoke: ok, 31 s | headline: out of time, 85 s | model: skipped, 0 s",
        "operations: 0 of 1 correct, maximum relative error 0.0e+00",
    ]
    assert "  WRONG: attention, bfloat16, unpadded, triton: relative error nan" in lines
    assert "kernel-tests: 1 failed, 7 passed in 3.21s" in lines and "  FAILED tests/a.py::b" in lines
    assert "p0, float16: 512 tokens 2.000 M tokens/s; cosine 1.000000" in lines
    assert "long name " * 17 + "long name" in lines  # 180 characters, less the space at the end
    assert gpu_summary.summary(tmp_path / "missing") == []


def test_smoke_runs_the_operations_after_one_that_crashes(tmp_path, monkeypatch):
    child = tmp_path / "python"
    child.write_text(f"#!{sys.executable}\n" + CHILD)
    child.chmod(0o755)
    monkeypatch.setattr(smoke.sys, "executable", str(child))
    rows = list(smoke.check("float16", ["a", "crash", "b", "broken", "c"], 20))
    assert [(row["case"], row["provider"], row.get("failed")) for row in rows] == [
        ("a", "unpadded", None),
        ("a", "unpadded, triton", None),
        ("crash", "unpadded", None),
        ("crash", "unpadded, triton", "its process exited with 9"),
        ("b", "unpadded", None),  # without the choice that crashed
        ("broken", "unpadded", "CUDA error"),
        ("c", "unpadded", None),
    ]
    with pytest.raises(SystemExit, match="exited with 5 outside of any operation"):
        list(smoke.check("float16", ["exit"], 20))


# A process of smoke.py: argv ends with --only and the names.
CHILD = """
import json, os, sys
def put(**row): print(json.dumps(row | {"dtype": "float16"}), flush=True)
for case in sys.argv[sys.argv.index("--only") + 1:]:
    if case == "exit": os._exit(5)
    for provider in ["unpadded", "unpadded, triton"]:
        if provider in sys.argv: continue
        put(case=case, provider=provider)
        if (case, provider) == ("crash", "unpadded, triton"): os._exit(9)
        if case == "broken":
            put(case=case, provider=provider, error=0, failed="CUDA error")
            os._exit(77)
        put(case=case, provider=provider, error=0.0)
"""


@pytest.fixture
def wrong_case(monkeypatch):
    """Replace one case by another whose kernel returns NaN and whose other choice raises."""

    def fail(x):
        raise KeyError("no such kernel")

    found = {"unpadded": lambda x: x * math.nan, "unpadded, triton": fail, "reference": lambda x: x}
    monkeypatch.setitem(op_cases.CASES, "embedding", lambda: op_cases.Case((torch.ones(3),), 1, True, found))


def test_smoke_reports_wrong_results_and_errors(wrong_case, capsys):
    smoke.run(str(op_cases.DTYPE).removeprefix("torch."), ["embedding", "rms_norm"], 20, [])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = [row for row in rows if row.keys() & {"error", "failed"}]
    assert [row.get("failed") for row in done] == ["relative error nan", "KeyError: 'no such kernel'", None]


@pytest.mark.parametrize(
    ("failed", "code"),
    [
        ([], None),
        (["embedding, unpadded"], 1),
        (["attention, texts of 512, unpadded"], 1),
        (["embedding, unpadded, triton"], 2),
        (["expert_mlp, unpadded"], 2),
    ],
)
def test_smoke_exits_by_what_the_model_needs(monkeypatch, capsys, failed, code):
    rows = [dict(zip(("case", "provider"), name.split(", unpadded"), strict=True)) for name in failed]
    rows = [row | {"provider": f"unpadded{row['provider']}", "failed": "wrong"} for row in rows]
    monkeypatch.setattr(smoke, "check", lambda dtype, names, limit: rows)
    monkeypatch.setattr(smoke, "DTYPES", ("float16",))
    monkeypatch.setattr(sys, "argv", ["smoke.py"])
    if code is None:
        return smoke.main()
    with pytest.raises(SystemExit) as caught:
        smoke.main()
    assert caught.value.code == code


def test_cases_have_every_operation():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name())
            return function(*args, **(kwargs or {}))

    called = set()
    with Names():
        for name in set(op_cases.CASES) - {"attention, texts of 512", "linear, down"}:
            case = op_cases.CASES[name]()
            for provider in [case.providers[name] for name in case.providers if name.startswith("unpadded")]:
                provider(*case.arguments)
    # rotary_cos_sin has no kernel: it runs its reference on every device
    operations = {f"unpadded::{name}" for name in unpadded_kernels.__all__} - {"unpadded::rotary_cos_sin"}
    assert operations == {name for name in called if name.startswith("unpadded::")}


def test_cudnn_computes_the_same_attention(monkeypatch):
    """On a CPU another kernel of PyTorch's runs in its place, on the same views."""
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    case = op_cases.CASES["attention, texts of 128"]()
    assert op_cases.relative_error(op_cases._cudnn_attention, case) < 1e-5


@pytest.mark.parametrize("lengths", [(128,), (100, 7), (1, 7, 64, 127, 128, 129, 300, 513)])
def test_cases_of_attention_fill_the_batch(lengths):
    cu_seqlens = op_cases.packed(*lengths)
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == op_cases.TOKENS
    found = cu_seqlens.diff().tolist()
    assert found[:-1] == [lengths[i % len(lengths)] for i in range(len(found) - 1)] and min(found) > 0


def test_tune_ranks_by_the_geometric_mean_of_ratios(monkeypatch):
    times = {1: {"short": 1.0, "long": 100.0}, 2: {"short": 0.5, "long": 110.0}, 3: {"short": 1.3, "long": 80.0}}
    table = {"key": 1}
    monkeypatch.setattr(tune, "time_of", lambda case, provider: times[table["key"]][case])
    rows = list(tune.run(tune.Sweep(("short", "long"), "unpadded", table, "key", (1, 2, 3, 4))))
    assert [row["tile"] for row in rows] == [1, 2, 3, 4] and table == {"key": 1}
    assert [row.get("seconds") for row in rows] == [times[1], times[2], times[3], None]
    ratios = [1, math.sqrt(0.5 * 1.1), math.sqrt(1.3 * 0.8)]
    assert [row["ratio"] for row in rows[:3]] == pytest.approx(ratios)  # by the sum of seconds the last were fastest
    assert rows[3]["failed"].startswith("KeyError")
    del times[1]
    rows = list(tune.run(tune.Sweep(("short", "long"), "unpadded", table, "key", (2,))))
    assert "failed" in rows[0] and "ratio" not in rows[1] and tune.timing(rows[1]).startswith("?; 500,000.0, ")


def test_tune_leaves_out_tiles_that_lost_when_compiled(monkeypatch):
    monkeypatch.setattr(op_cases, "DTYPE", torch.float16)
    sweeps = tune.sweeps(90)
    for name, sweep in sweeps.items():
        own = sweep.table[sweep.key]
        for tile in (tile for tile in sweep.candidates if isinstance(tile, Tile)):
            # accumulators per thread; attention's block_m is that of the tile map
            assert tile.block_m * tile.block_n * (1 + (name == "linear, gated")) <= 128 * 32 * tile.num_warps
            assert tile.tma and (name != "attention" or tile.block_m == own.block_m)
    assert sum(len(sweep.candidates) for sweep in sweeps.values()) <= 16


@pytest.mark.slow
def test_tune_tries_tiles_in_place_of_those_of_the_table(tmp_path):
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "tests"))
    names = ["--only", "rows", "linear, gated"]
    command = [sys.executable, ROOT / "bench/tune.py", "--out", tmp_path / "tune.json", *names]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sweeps = json.loads((tmp_path / "tune.json").read_text())["sweeps"]
    assert [row["tile"] for row in sweeps["rows"]] == [1024, 512]
    for rows in sweeps.values():
        assert rows[0]["ratio"] == 1 and all(min(row["seconds"].values()) > 0 for row in rows)


def test_throughput_on_cuda_has_enough_windows_and_batches(monkeypatch):
    monkeypatch.setattr(throughput, "TextSampler", lambda engine: SimpleNamespace(sample=list))
    lengths = ROOT / "bench/lengths.txt"
    workloads = throughput.texts({"float16": None}, torch.device("cuda"), lengths, False)
    assert len(workloads) == 4
    for name, texts in workloads.items():
        batches = 1.02 * sum(texts) / TOKEN_BUDGET["cuda"]
        assert batches >= 16 and batches >= 8 * WINDOW_BATCHES, name


def test_model_compares_the_first_texts_with_float32(capsys):
    """In fp32 attention of all long texts would take longer than the measurement."""
    compared = []
    lengths = (5000, 3000, 200, 100)
    vectors = np.random.default_rng(0).standard_normal((4, 8))
    spec = SimpleNamespace(layers=1, hidden=8, up_rows=16, intermediate=8, experts=None)

    def exact(ids, prompt):
        compared.append([len(row) for row in ids])
        return vectors[: len(ids)]

    runner = SimpleNamespace(device=torch.device("cpu"))
    engine = SimpleNamespace(
        encode=exact, _pipeline=SimpleNamespace(runner=runner), checkpoint=SimpleNamespace(spec=spec)
    )
    result = {"rows": [], "not run": {}}
    wrong = np.concatenate((vectors[:1], -vectors[1:2], vectors[2:]))
    runs = {"right": lambda ids: vectors[: len(ids)], "wrong": lambda ids: wrong[: len(ids)]}
    model.compare("w", "float32", [np.zeros(n) for n in lengths], runs, engine, 1.0, 1, result)
    assert compared == [[5000, 3000]]
    assert [row["min_cosine"] for row in result["rows"]] == pytest.approx([1, -1])


def test_packed_baseline_computes_the_engines_vectors_in_several_batches(tmp_path):
    folder = write_nomic(tmp_path, tokenizer=False)
    engine = unpadded.load(folder, device="cpu", token_budget=16)
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 30000, length, dtype=np.int32) for length in (3, 9, 16, 1, 7)]
    found = packed_baseline.PackedBaseline(engine)(ids)
    np.testing.assert_allclose(found, engine.encode(ids, prompt=""), atol=1e-5)


# us per token of NomicBERT with the library's matmuls, by a review of the kernels in 2026-11
REVIEWED = {
    "H100": ({"qkv": 0.068, "rotary": 0.028, "out": 0.025, "add_layer_norm": 0.040, "gate-up": 0.174}, 0.578, 1.215),
    "H200": ({"rotary": 0.020, "add_layer_norm": 0.028, "activation": 0.056, "down": 0.083}, 0.534, 1.171),
}


@pytest.mark.parametrize("gpu", REVIEWED)
def test_model_of_time_sums_to_the_reviewed_prediction(gpu):
    ops, at_512, at_8192 = REVIEWED[gpu]
    short, long = (model_of_time.predict(gpu, length) for length in (512, 8192))
    assert sum(row["predicted"] for row in short) == pytest.approx(at_512, abs=1e-3)
    assert sum(row["predicted"] for row in long) == pytest.approx(at_8192, abs=1e-3)
    found = {row["op"]: row["predicted"] for row in short}
    assert {op: found[op] for op in ops} == pytest.approx(ops, abs=6e-4)
    bounds = {row["op"]: row["bound"] for row in short}
    assert bounds["rotary"] == "bytes" and bounds["attention"] == "flops"
    assert sum(row["predicted"] for row in model_of_time.predict(gpu, 512, "triton")) < at_512 - 0.03


def test_model_of_time_joins_measurements(tmp_path, monkeypatch, capsys):
    row = {"extra_info": {"kernel": "linear, down", "provider": "unpadded, library", "rows": 1000}}
    result = {"machine_info": {"card": {"gpu": "NVIDIA H200"}}, "benchmarks": [row | {"stats": {"median": 1e-5}}]}
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    command = ["model_of_time.py", "--kernels", "library", "--lengths", "512", "--measured"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "kernels.json")])
    model_of_time.main()
    printed = capsys.readouterr().out
    assert "NVIDIA H200, texts of 512 tokens, library: predictions" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("  down"))
    assert line.split() == ["down", "flops", "0.083", "0.120"]  # 12 layers of 10 us per 1000 tokens
    (tmp_path / "kernels.json").write_text(json.dumps(result | {"machine_info": {"card": {}}}))
    with pytest.raises(ValueError, match="not measured on a GPU"):
        model_of_time.main()


def test_model_of_time_knows_no_other_gpu():
    with pytest.raises(ValueError, match="no prediction for this GPU: 'NVIDIA A100'; use one of H100, H200"):
        model_of_time.predict("NVIDIA A100", 512)
