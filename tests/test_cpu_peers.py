"""The comparison with other libraries on a CPU: its workers on a tiny model, its accuracy and its tables."""

import json
import sys
from types import SimpleNamespace

import cpu_peers
import numpy as np
import pytest
import report
import report_peers
from peers import worker


@pytest.mark.slow
def test_small_run_has_every_figure_of_unpadded_and_of_the_reference(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cpu_peers.json"
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", "--small", "--threads", "1", "--rounds", "1", "--out", str(out)])
    cpu_peers.main()
    result = json.loads(out.read_text())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == result
    (model,) = result["models"]
    (run,) = model["runs"]
    assert run["threads"] == 1 and model["not run"] == {}
    assert [row["provider"] for row in run["rows"]] == ["unpadded, float32", "sentence-transformers, float32"]
    for row in run["rows"]:
        for workload, tokens in model["tokens"].items():
            (seconds,) = row["seconds"][workload]
            assert seconds > 0 and row["tokens_per_second"][workload] == pytest.approx(tokens / seconds)
        assert 0 < row["latency_seconds"] < row["seconds"]["paragraphs"][0]
        assert 0 < row["resident_bytes"] <= row["peak_bytes"] and row["load_seconds"] > 0
        found = model["accuracy"][row["provider"]]
        assert 0.99999 < found["min_cosine"] <= found["mean_cosine"] < 1.00001 and found["overlap"] > 0.99
    assert {"torch", "sentence-transformers"} <= set(model["packages"])
    lines = report_peers.cpu_peers(result).splitlines()
    assert [line for line in lines if line.startswith("| unpadded, float32")] == [
        line for line in printed if line.startswith("| unpadded, float32")
    ]


def test_report_compares_unpadded_with_the_fastest_library_in_the_same_precision(tmp_path):
    def row(library, precision, rate, latency):
        return {
            "provider": f"{library}, {precision}",
            "library": library,
            "precision": precision,
            "seconds": {"queries": [1.0, 2.0]},
            "tokens_per_second": {"queries": rate},
            "latency_seconds": latency,
            "load_seconds": 1.26,
            "resident_bytes": 3e8,
            "peak_bytes": 4e8,
            "busy_share": 0.5,
        }

    rows = [row("unpadded", "float32", 900, 0.002), row("unpadded", "bfloat16", 4000, 0.001)]
    rows += [row("OpenVINO", "float32", 1000, 0.003), row("CTranslate2", "float32", 500, 0.001)]
    rows += [row("OpenVINO", "bfloat16", 2000, 0.001)]
    accuracy = {row["provider"]: {"mean_cosine": 0.9987654, "min_cosine": 0.99, "overlap": 0.95} for row in rows}
    model = {
        "model": "M",
        "tokens": {"queries": 10},
        "accuracy": accuracy,
        "packages": {"openvino": "1.0"},
        "not run": {"CTranslate2, int8": "no such thing"},
        "runs": [{"threads": 2, "rows": rows}],
    }
    card = {"cpu": "c", "threads": 2, "packages": {}, "commit": "x"}
    (tmp_path / "cpu_peers.json").write_text(json.dumps({"machine": card, "models": [model]}))
    page = report.page(tmp_path)
    end = "300, 400 | 1.3 | 0.998765 / 0.990000 | 0.950 | 0.50 x |"
    assert f"| unpadded, float32 | 900, **0.90 x** | 2.00, **0.50 x** | {end}" in page
    assert f"| unpadded, bfloat16 | 4,000, **2.00 x** | 1.00, **1.00 x** | {end}" in page
    assert f"| OpenVINO, float32 | 1,000 | 3.00 | {end}" in page
    assert "### M, 2 threads, 2 rounds" in page
    assert "| CTranslate2, int8 | no such thing |" in page and "openvino 1.0" in page


def test_overlap_is_the_share_of_equal_nearest_paragraphs():
    paragraphs = np.eye(20)
    queries = np.arange(20, 0, -1.0)[None]  # the nearest paragraphs are 0 to 9
    reference = {"accuracy_queries": queries, "accuracy_paragraphs": paragraphs}
    moved = {"accuracy_queries": np.roll(queries, 2), "accuracy_paragraphs": 3 * paragraphs}  # 2 to 11
    found = cpu_peers.accuracy(moved, reference)
    assert found == {"mean_cosine": 1.0, "min_cosine": 1.0, "overlap": 0.8}
    turned = reference | {"accuracy_paragraphs": np.concatenate([-paragraphs[:5], paragraphs[5:]])}
    assert cpu_peers.accuracy(turned, reference)["mean_cosine"] == 0.5
    documents = {"documents": paragraphs}
    assert cpu_peers.accuracy(documents, documents) == {"mean_cosine": 1.0, "min_cosine": 1.0}


@pytest.mark.parametrize("streams", [1, 2])
def test_padded_batches_return_the_mean_over_tokens_in_the_order_of_the_texts(tmp_path, streams):
    job = {"tokenizer": str(cpu_peers.checkpoints.MINILM / "tokenizer.json"), "max_length": 8}
    shapes = []

    def forward(ids, mask):
        shapes.append(ids.shape)
        return np.where(mask[:, :, None] == 1, ids[:, :, None] * [1, 0] + [0, 100], np.nan_to_num(1e9)).astype("f4")

    encode = worker.Padded(job, forward, streams)
    texts = ["bread", "the tide rises twice a day and falls twice", "yeast ferments sugar", "salt"]
    vectors = encode(texts, 2)
    assert sorted(shapes) == [(2, 3), (2, 8)]
    for text, vector in zip(texts, vectors, strict=True):
        ids = encode.tokenizer.encode(text).ids
        expected = np.array([np.mean(ids), 100])
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=1e-5)
        np.testing.assert_allclose(encode(text, 1), vector, rtol=1e-6)


def test_the_fastest_batch_is_chosen_by_workload(monkeypatch):
    seconds = {("queries", 8): 2.0, ("queries", 32): 1.0, ("passages", 2): 1.0, ("passages", 8): 3.0}
    monkeypatch.setattr(worker, "timed", lambda encode, texts, batch: (seconds[texts, batch], None))
    job = {
        "warm_up": {name: name for name in ("queries", "passages")},
        "candidates": {"queries": [8, 32], "passages": [2, 8]},
    }
    assert worker.best_batches(lambda texts, batch: None, job) == {"queries": 32, "passages": 2}


def test_a_process_that_fails_is_listed_with_its_last_line(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.exit('first\\nOptionError: dtype is not supported\\n')")
    with pytest.raises(cpu_peers.Failed, match=r"^OptionError: dtype is not supported$"):
        cpu_peers.start(sys.executable, script, {}, "")
    found = {"not run": {}}
    cpu_peers.not_run(found, SimpleNamespace(name="unpadded, int8"), cpu_peers.Failed("reason"))
    assert found["not run"] == {"unpadded, int8": "reason"}
    with pytest.raises(cpu_peers.Failed):  # every cosine is relative to the reference
        cpu_peers.not_run(found, SimpleNamespace(name=cpu_peers.REFERENCE), cpu_peers.Failed("reason"))
