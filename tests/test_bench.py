"""The benchmarks on tiny settings: their figures are correct, and a part that fails does not stop the others."""

import base64
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import busy
import check
import harness
import head_models
import heads
import numpy as np
import plots
import pytest
import report
import report_heads
import server
import torch
from support.checkpoints import add_sentence_transformers_files, write_bert, write_bert_reranker

import unpadded
from unpadded.cli.benchmark import PROVIDERS, TEXTS, comparison, conclusion, machine
from unpadded.cli.benchmark.comparison import flops
from unpadded.cli.benchmark.providers import Model, make_providers
from unpadded.cli.benchmark.workloads import DOCUMENTS, TextSampler
from unpadded.cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return add_sentence_transformers_files(write_bert(tmp_path_factory.mktemp("bert")), max_seq_length=128)


@pytest.fixture(scope="module")
def engine(folder):
    return unpadded.load(folder, device="cpu")


def lengths_of(engine, texts):
    return engine.embed(texts, prompt="").token_counts


def test_sampled_texts_have_the_lengths_of_their_workload(engine):
    sampler = TextSampler(engine)
    queries = sampler.workload("queries", 200)
    assert len(set(queries)) == 200
    lengths = lengths_of(engine, queries)
    assert lengths.max() <= 32 and 18 <= np.median(lengths) <= 22
    assert 30 <= np.median(lengths_of(engine, sampler.workload("paragraphs", 300))) <= 50
    assert lengths_of(engine, sampler.workload("documents", 2)).tolist() == pytest.approx([128, 128], abs=6)
    wanted = [10, 40, 100]
    lengths = lengths_of(engine, sampler.sample(wanted))
    assert all(0 <= w - length < 6 for w, length in zip(wanted, lengths, strict=True)), lengths
    assert TextSampler(engine).workload("queries", 200) == queries


def test_document_lengths_are_quantiles_of_the_committed_lengths():
    lengths = np.sort(np.array((ROOT / "bench/lengths.txt").read_text().split(), np.int64).clip(max=8192))
    quantiles = (np.arange(TEXTS["documents"]) + 0.5) / TEXTS["documents"]
    assert tuple(lengths[(quantiles * len(lengths)).astype(int)]) == DOCUMENTS


def test_flops_count_matmuls_and_attention(engine):
    spec = engine.checkpoint.spec
    matmuls = 2 * 128 * (4 * 128 + 2 * 512)
    assert flops(spec, np.array([10, 3])) == spec.layers * (13 * matmuls + 4 * 128 * (100 + 9))


def test_bench_command_compares_providers_on_the_same_texts(folder, engine, tmp_path, capsys):
    texts = ["The tide rises twice a day.", "Bread", "Yeast ferments sugar and gives off gas. " * 9]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    out = tmp_path / "out.json"
    flags = ["--column", "body", "--against", "sentence-transformers,transformers", "--also", "bfloat16"]
    end = ["--rounds", "2", "--out", str(out), "--device", "cpu"]
    assert main(["bench", str(folder), str(tmp_path / "texts.jsonl"), *flags, *end]) == 0
    result = json.loads(out.read_text())
    (found,) = result["workloads"]
    rows = {row["provider"]: row for row in found["rows"]}
    assert result["not run"] == {} and set(rows) == {
        "unpadded, float32",
        "unpadded, bfloat16",
        "sentence-transformers",
        "transformers",
    }
    assert (found["texts"], found["tokens"]) == (3, lengths_of(engine, texts).sum())
    for row in rows.values():
        median = statistics.median(row["seconds"])
        assert len(row["seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(found["tokens"] / median)
        reference = statistics.median(rows["sentence-transformers"]["seconds"])
        assert row["speedup"] == pytest.approx(reference / median)
        assert row["min_cosine"] >= (0.999 if row["provider"] == "unpadded, bfloat16" else 0.99999)
    for own in found["unpadded"].values():
        assert sum(own["stages"].values()) == pytest.approx(1) and min(own["stages"].values()) > 0
        assert list(own["stages"]) == ["tokenize", "copy", "forward", "output"]
    printed = capsys.readouterr().out
    assert f"your texts: 3 texts, {found['tokens']:,} tokens" in printed and "forward pass alone" not in printed
    speedup = rows["unpadded, float32"]["speedup"]
    assert printed.endswith(f"\nunpadded is {speedup:.1f}x as fast as sentence-transformers on your texts here\n")
    alone = {"workloads": [found | {"rows": [rows["unpadded, float32"] | {"speedup": None}]}]}
    rate = rows["unpadded, float32"]["tokens_per_second"]
    assert conclusion(alone) == f"unpadded embeds {rate:,.0f} tokens/s on your texts here"


@pytest.mark.parametrize(("device", "warm_up"), [("cpu", [16]), ("cuda", [20])])
def test_every_run_is_warmed_up_in_full_on_cuda(engine, monkeypatch, device, warm_up):
    encoded = []

    def encode(texts):
        encoded.append(len(texts))
        return np.ones((len(texts), 2))

    def interleave(runs, rounds, device):
        measured.append(list(encoded))
        seconds = {name: [1.0] for name in runs}
        return seconds, {name: run() for name, run in runs.items()}, dict.fromkeys(runs)

    measured = []
    monkeypatch.setattr(comparison, "interleave", interleave)
    monkeypatch.setattr(Model, "device", torch.device(device))
    model = Model("m", {"float32": engine}, None)
    comparison.compare("w", ["a text"] * 20, model, {"unpadded, float32": encode}, {}, 1)
    assert measured == [warm_up]


def test_bench_command_rejects_unknown_names(folder, capsys):
    assert main(["bench", str(folder), "--against", "word2vec"]) == 2
    assert "word2vec" in capsys.readouterr().err
    assert main(["bench", str(folder), "--workloads", "haiku"]) == 2
    assert "haiku; use some of queries" in capsys.readouterr().err


def test_a_provider_that_fails_does_not_stop_the_others(folder, engine, monkeypatch):
    def broken(model):
        raise KeyError("no such thing")

    monkeypatch.setitem(PROVIDERS, "broken", broken)
    model = Model(str(folder), {"float32": engine}, engine._pipeline.runner.encoder.weights.word.dtype)
    made, reasons = make_providers(model, ["broken", "transformers"])
    assert set(made) == {"unpadded, float32", "transformers"}
    assert reasons == {"broken": "KeyError: 'no such thing'"}


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_backends_of_sentence_transformers_run_if_optimum_is_installed(folder, engine, backend):
    model = Model(str(folder), {"float32": engine}, torch.float32)
    made, reasons = make_providers(model, [f"sentence-transformers-{backend}"])
    if reasons:
        assert "requires installing Optimum" in reasons[f"sentence-transformers-{backend}"]
        return
    texts = ["Bread", "Yeast ferments sugar and gives off gas."]
    expected = made["unpadded, float32"](texts)
    np.testing.assert_allclose(made[f"sentence-transformers-{backend}"](texts), expected, atol=1e-2)


@pytest.mark.parametrize("pooling", ["cls", "lasttoken"])
def test_padded_transformers_uses_the_pooling_of_the_checkpoint(tmp_path, pooling):
    folder = add_sentence_transformers_files(write_bert(tmp_path), pooling=pooling)
    loaded = unpadded.load(folder, device="cpu")
    made, _ = make_providers(
        Model(str(folder), {"float32": loaded}, loaded._pipeline.runner.encoder.weights.word.dtype), PROVIDERS
    )
    texts = ["Bread", "Yeast ferments sugar and gives off gas."]
    for name in ("transformers", "sentence-transformers"):
        np.testing.assert_allclose(made[name](texts), made["unpadded, float32"](texts), atol=1e-5)


def test_bar_chart_draws_every_value_in_the_color_of_its_name(tmp_path):
    groups = {"a & b": {"x": 2.0, "y": 1.0}, "c": {"x": 0.5}}
    (axes,) = plots.bar_chart("t", groups, "{:.1f} x").axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0, 0.5]
    first, second, third = (bar.get_facecolor() for bar in axes.patches)
    assert first == third != second
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y", "x"]
    for name in ("first.svg", "second.svg"):
        plots.save(plots.bar_chart("t", groups, "{:.1f} x"), tmp_path / name)
    drawn = (tmp_path / "first.svg").read_text()
    assert drawn == (tmp_path / "second.svg").read_text()
    texts = "".join(ElementTree.fromstring(drawn).itertext())
    assert "a & b" in texts and "2.0 x" in texts


def test_line_chart_draws_points_in_the_order_of_x():
    (axes,) = plots.line_chart("t", {"x": [(512, 2.0), (128, 1.0), (8192, 4.0)]}, "tokens", "tokens/s").axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[128, 1], [512, 2], [8192, 4]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "512", "8192"]
    assert axes.get_ylim()[0] == 0


def test_a_commit_is_dirty_by_changes_of_code_and_not_by_results(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    for name in ("bench/results/model.json", "README.md", "engine/a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "Add")
    (tmp_path / "bench/results/model.json").write_text("2")
    (tmp_path / "README.md").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{7,}", machine.card(tmp_path)["commit"])
    (tmp_path / "engine/a.py").write_text("2")
    assert machine.card(tmp_path)["commit"].endswith("-dirty")


def test_an_interrupted_benchmark_reports_its_results_so_far(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), harness.reporting(tmp_path / "out.json") as result:
        result["rows"] = [1]
        raise KeyboardInterrupt
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["rows"] == [1] and stored["machine"]["threads"] >= 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == stored


def test_a_report_skips_what_an_interrupted_run_did_not_write(tmp_path):
    card = {"machine": {"cpu": "c", "threads": 2, "packages": {}, "commit": "x"}}
    (tmp_path / "model.json").write_text(json.dumps(card))
    ceilings = {"flop_per_second": {"float32": 4e11}, "copy_bytes_per_second": 4e10}
    (tmp_path / "ceilings.json").write_text(json.dumps(card | ceilings))
    text = report.page(tmp_path)
    assert "model.json: the run stopped before it wrote 'rows'" in text and "0.4 TFLOP/s" in text
    assert report.figures(tmp_path) == {}


@pytest.fixture
def run_check(tmp_path, monkeypatch):
    """Return a function that runs check.py on one pair with the given ratios."""

    def run(ratios, *flags):
        ratios = iter(ratios)
        monkeypatch.setattr(check, "pairs", lambda folder, small: {"pair": None})
        monkeypatch.setattr(check, "ratio", lambda pair, rounds: next(ratios))
        monkeypatch.setattr(sys, "argv", ["check.py", "--ratios", str(tmp_path / "ratios.json"), *flags])
        check.main()

    return run


def test_check_fails_if_a_ratio_is_too_low_twice(run_check, tmp_path):
    run_check([3.0])  # stores
    (stored,) = json.loads((tmp_path / "ratios.json").read_text()).values()
    assert stored["ratios"] == {"pair": 3.0}
    run_check([2.6])
    run_check([2.0, 2.9])  # too low only once
    with pytest.raises(SystemExit, match="pair dropped by more than 15%"):
        run_check([2.5, 2.4])
    run_check([2.4, 2.3], "--update")
    run_check([2.1])


def test_check_compares_adjacent_runs(monkeypatch):
    slow = iter([1, 1, 5, 5, 1, 1, 1, 1])  # noise that lasts for two runs slows both sides
    clock = [0.0]

    def run(seconds):
        clock[0] += seconds * next(slow, 1)

    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    assert check.ratio((lambda: run(1), lambda: run(2)), 3) == 2


def test_heads_are_compared_on_pairs_of_20_to_512_tokens(tmp_path, capsys):
    head, device = heads.HEADS["score"], torch.device("cpu")
    write_bert_reranker(tmp_path)
    args = SimpleNamespace(inputs=24, rounds=2, seconds=1.0)
    own, peer = heads.measure(head, tmp_path, device, "float32", 1e15, args)
    assert own["relative_error"] <= own["maximum_error"] == 1e-5 and peer["relative_error"] == 0
    assert own["speedup"] > 0 and own["speedup_by_batch"].keys() == {1, 4, 32} and peer["batch"] in (1, 4, 32)
    assert len(set(own["tokens"])) == 2 and own["inputs"] == 24 and own["tokens"] == peer["tokens"]
    assert peer["inputs_per_second"] == 24 / statistics.median(peer["seconds"])
    with pytest.raises(heads.TooSlow, match="0 pairs a round"):
        heads.measure(head, tmp_path, device, "float32", 1e6, args)
    engine = unpadded.load(tmp_path, device="cpu")
    pairs = heads.draw_pairs(TextSampler(engine), np.random.default_rng(0), 200)
    counts = heads.pair_token_counts(engine, pairs)
    assert 12 <= counts.min() <= 40 and 490 <= counts.max() <= 512 and 230 <= counts.mean() <= 300
    assert len({query for query, _ in pairs}) == 7 and len({passage for _, passage in pairs}) == 200


def test_spans_are_compared_with_encode():
    found = heads.measure_spans(torch.device("cpu"), small=True)
    assert 240 <= found["tokens"] <= 256 and 20 <= found["spans"] <= 60 and len(found["seconds"]) == heads.SPAN_ROUNDS
    ratios = [spans / whole for whole, spans in found["seconds"]]
    assert found["ratio"] == statistics.median(ratios) and min(ratios) > 0
    result = {"rows": [], "not run": {}, "spans": found}
    assert f"with {found['spans']} spans takes {found['ratio']:.2f} x" in report_heads.heads(result)


def test_token_vectors_are_compared_on_documents_of_20_to_300_tokens(tmp_path):
    head = heads.HEADS["tokens"]
    head_models.write_colbert(tmp_path, True)
    args = SimpleNamespace(inputs=16, rounds=1, seconds=1.0)
    own, peer = heads.measure(head, tmp_path, torch.device("cpu"), "float32", 1e15, args)
    assert own["relative_error"] <= own["maximum_error"] == 1e-5 and peer["relative_error"] == 0
    engine = unpadded.load(tmp_path, device="cpu")
    documents = heads.draw_documents(TextSampler(engine), np.random.default_rng(0), 200)
    counts = engine.encode_tokens(documents).token_counts
    assert np.array_equal(counts, heads.document_token_counts(engine, documents))
    assert 14 <= counts.min() <= 30 and 290 <= counts.max() <= 300 and 140 <= counts.mean() <= 180


def test_sparse_weights_are_compared_on_texts_of_20_to_300_tokens(tmp_path):
    head, device = heads.HEADS["sparse"], torch.device("cpu")
    head.models["cuda"]["splade-v3"](tmp_path, True)
    own, peer = heads.measure(head, tmp_path, device, "float32", 1e15, SimpleNamespace(inputs=4, rounds=1, seconds=1.0))
    assert own["relative_error"] <= own["maximum_error"] == 1e-5 and peer["relative_error"] == 0
    assert own["speedup"] > 0 and own["inputs"] == 4 and own["unit"] == "texts"
    engine = unpadded.load(tmp_path, device="cpu")
    texts = head.inputs(TextSampler(engine), np.random.default_rng(0), 200)
    counts = head.token_counts(engine, texts)
    assert 20 <= counts.min() <= 30 and 290 <= counts.max() <= 300
    assert 10 <= np.diff(engine.encode_sparse(texts[:8]).indptr).mean() <= 1000


class Stub(BaseHTTPRequestHandler):
    """A server that returns vector i for text "i", a wrong vector for "7", and 429 for every third request."""

    protocol_version = "HTTP/1.1"
    requests, lock = 0, threading.Lock()

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        with Stub.lock:
            Stub.requests += 1
            full = Stub.requests % 3 == 0
        rows = [np.full(4, float(text) + (text == "7"), np.float32) for text in texts]
        data = [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in rows]
        body = json.dumps({"data": data}).encode()
        self.send_response(429 if full else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class ThreadClock(threading.local):
    """The time of each thread: a millisecond per look at it, and what it sleeps."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(server, "time", ThreadClock())
    Stub.requests = 0
    http = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    http.daemon_threads = False
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    target = server.Infinity.__new__(server.Infinity)
    target.port = http.server_port
    yield target
    http.shutdown()
    thread.join()
    http.server_close()


def test_the_load_counts_statuses_and_wrong_vectors(stub):
    rows = np.repeat(np.arange(20, dtype=np.float32)[:, None], 4, axis=1)
    load = server.Load([str(i) for i in range(20)], rows, np.full(20, 5), "base64")
    found = load.run(stub, 3, 0.5, [1, 4])
    assert sum(found["statuses"].values()) == Stub.requests
    assert abs(found["statuses"][429] - Stub.requests / 3) < 1
    assert 0 < found["wrong vectors"] < found["statuses"][200]
    assert sum(by_size["requests"] for by_size in found["by size"].values()) == found["statuses"][200]
    assert set(found["by size"]) == {1, 4} and found["p50, ms"] <= found["p99, ms"]


def test_the_load_keeps_its_request_rate(stub):
    load = server.Load(["1"] * 9, np.ones((9, 4), np.float32), np.full(9, 5), "base64")
    assert sum(load.run(stub, 4, 0.49, [1], per_second=40)["statuses"].values()) == 20


def test_busy_measures_every_path_with_devices_of_fixed_speed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "busy.json"
    monkeypatch.setattr(sys, "argv", ["busy.py", "--small", "--devices", "2", "--out", str(out)])
    busy.main()
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    limits = ["this machine", "slower devices", "16 cores, simulated"]
    cases = [("stream", 1, 50), ("stream", 1, 512), ("64 clients", 1, 50)]
    cases += [("stream to processes", 2, length) for length in (50, 512)]
    assert [(row["path"], row["devices"], row["tokens per text"], row["limits"]) for row in result["rows"]] == [
        (*case, limit) for case in cases for limit in limits
    ]
    for row in result["rows"]:
        assert 0 < row["least busy device"] <= row["busy"] <= 1 and row["batches"] >= 12
        rate = row["devices"] * row["device, tokens/s"]
        assert row["tokens/s"] == pytest.approx(row["busy"] * rate, abs=6e-4 * rate)  # busy has three decimals


def test_a_stand_in_computes_one_batch_after_another(tmp_path):
    clock = np.memmap(tmp_path / "clock", busy.CLOCK, "w+", shape=())
    clock["speed"], clock["origin"] = 1000, time.perf_counter()
    device = busy.StandIn(tmp_path / "clock", torch.device("cpu", 3))
    ids = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    first, second = device.launch(ids, None), device.launch(ids[1:], None)
    rows = np.concatenate([first(), second()])
    starts, ends = rows[:, busy.START], rows[:, busy.END]
    assert ends[0] - starts[0] == pytest.approx(4e-3, rel=0.1) and ends[2] - starts[2] == pytest.approx(1e-3, rel=0.4)
    assert starts[0] == starts[1] and starts[2] >= ends[1]
    assert rows[:, [busy.DEVICE, busy.LENGTH, busy.CHECKSUM]].tolist() == [[3, 3, 18], [3, 1, 8], [3, 1, 8]]


def test_infinity_that_does_not_start_raises(tmp_path):
    program = tmp_path / "infinity_emb"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="infinity did not start"), server.Infinity(program, tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25)"),
        ("cpu family\t: 6\nmodel name\t: Xeon\nflags\t\t: amx_tile\n", "Xeon with AMX"),
        ("model name\t: AMD EPYC\n", "AMD EPYC"),
    ],
)
def test_a_processor_is_named_with_what_its_speed_depends_on(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine._cpu_name() == expected
