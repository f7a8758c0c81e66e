"""Run the tests of inference of sentence-transformers on its classes and on the drop-ins.

    git clone --branch v6.2.0 https://github.com/huggingface/sentence-transformers DIR
    PYTHONPATH=tests python bench/st_suite.py --suite DIR [--only NAME ...] [--out FILE.json]

The tests run on the installed sentence-transformers; only tests/ and pyproject.toml of DIR are used. Nothing is
downloaded: the models that the tests name are in a hub cache made here, as seeded BERTs, rerankers and SPLADE models,
and as the real all-MiniLM-L6-v2 for tests that need a trained model. Tests that need published values, adapters or
other architectures fail on both classes.
Prints each test that passes on one class only; exits with an error if one passes only on the original. The last line on
stdout is JSON, with the outcomes on both classes by folder of tests/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding
from support import checkpoints

FILES = (
    "base/test_model.py",
    "base/modules/test_dense.py",
    "cross_encoder/evaluation",
    "cross_encoder/test_model.py",
    "cross_encoder/test_multi_process.py",
    "multi_vector_encoder/test_evaluators.py",
    "multi_vector_encoder/test_interpretability.py",
    "multi_vector_encoder/test_model.py",
    "multi_vector_encoder/test_multi_process.py",
    "multi_vector_encoder/test_token_pooling.py",
    "sentence_transformer/evaluation",
    "sentence_transformer/modules/test_pooling.py",
    "sentence_transformer/test_compute_embeddings.py",
    "sentence_transformer/test_model.py",
    "sentence_transformer/test_multi_process.py",
    "sparse_encoder/modules",
    "sparse_encoder/test_model.py",
    "sparse_encoder/test_multi_process.py",
    "sparse_encoder/test_pretrained.py::test_load_and_encode",
    "sparse_encoder/test_reciprocal_rank_fusion.py",
    "sparse_encoder/test_search_engines.py",
    "util",
)
TINY = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
# all-MiniLM-L6-v2 replaces every trained model, whose width may differ.
TRAINED = (
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/paraphrase-distilroberta-base-v1",
    "sentence-transformers/static-retrieval-mrl-en-v1",
)
# Names of the tests of CrossEncoder -> number of labels.
RERANKERS = {
    "BAAI/bge-reranker-base": 1,
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce": 1,
    "cross-encoder-testing/reranker-bert-tiny-gooaq-bce-STv54": 1,
    "cross-encoder/nli-MiniLM2-L6-H768": 3,
    "cross-encoder/stsb-distilroberta-base": 1,
    "cross-encoder-testing/stsb-distilroberta-base": 1,
}
SPLADE = "sparse-encoder-testing/splade-bert-tiny-nq"
INFERENCE_FREE = "sparse-encoder-testing/inference-free-splade-bert-tiny-nq"
MASKED_LM = (
    "distilbert/distilbert-base-uncased",
    "google-bert/bert-base-uncased",
    "hf-internal-testing/tiny-random-bert",
)
COMMITS = {  # commits of TINY that the tests name -> seed of the weights
    "f3cb857cba53019a20df283396bcca179cf051a4": 0,
    "ba33022fdf0b0fc2643263f0726f44d0a07d0e24": 1,
}
# Tests that are expected to pass on the original only, and why.
ORIGINAL_ONLY = {
    "test_transformers_model_property": "the inner model is an UnpaddedModel, not a BertModel",
    "test_router_transformers_model_property": "the inner model is an UnpaddedModel, not a BertModel",
    "test_third_party_module_with_strict_load_signature_round_trips": "no code of a checkpoint is run",
    "test_load_activation_fn_from_config_custom": "no code of a checkpoint is run",
    "test_model_card_save_update_model_id": "weights are saved by copying their source folder, which is deleted",
}
# Replaces the class before the tests import it.
REPLACE = """
import sentence_transformers as library
from sentence_transformers import cross_encoder, multi_vector_encoder, sentence_transformer, sparse_encoder
from unpadded.integrations import sentence_transformers as drop_ins
for package in (cross_encoder, multi_vector_encoder, sentence_transformer, sparse_encoder):
    name = package.__name__.rpartition(".")[2].title().replace("_", "")
    for module in (library, package, package.model):
        setattr(module, name, getattr(drop_ins, name))
"""
RUN = "import sys, pytest; pytest.main(sys.argv[1:])"
OPTIONS = ("-q", "-m", "not custom", "--tb=line", "-p", "no:cacheprovider", "-p", "no:benchmark")


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--suite", type=Path, required=True, help="a checkout of sentence-transformers")
    parser.add_argument("--only", nargs="*", default=FILES, help="files or folders under its tests/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_hub_cache(Path(name) / "hub")
        # Without the package of the checkout, which would be imported instead of the installed one.
        shutil.copytree(args.suite / "tests", Path(name) / "tests")
        shutil.copy(args.suite / "pyproject.toml", name)
        original, drop_in = (run(code, args.only, Path(name)) for code in (RUN, REPLACE + RUN))
    result = compare(original, drop_in)
    harness.report(result, args.out)
    if result["original_only"]:
        raise SystemExit(f"{len(result['original_only'])} tests pass on the original class only")


def run(code: str, files: list[str], home: Path) -> dict[str, str]:
    """Run the tests and return the outcome of each."""
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    report = home / "report.xml"
    command = [sys.executable, "-c", code, *OPTIONS, f"--junitxml={report}", *(f"tests/{name}" for name in files)]
    subprocess.run(command, cwd=home, env=os.environ | environment, check=True)
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome_of(case) for case in cases}


def outcome_of(case: ElementTree.Element) -> str:
    found = {child.tag for child in case} & {"failure", "error", "skipped"}
    return found.pop() if found else "passed"


def compare(original: dict[str, str], drop_in: dict[str, str]) -> dict[str, Any]:
    """Return the counts for each class and the tests that pass on one class only; print those tests."""
    passed = [{test for test, outcome in side.items() if outcome == "passed"} for side in (original, drop_in)]
    original_only, drop_in_only = sorted(passed[0] - passed[1]), sorted(passed[1] - passed[0])
    for name, tests in (("original", original_only), ("drop-in", drop_in_only)):
        for test in tests:
            print(f"passes only on the {name}: {test}")
    expected = [test for test in original_only if test.rpartition("::")[2].partition("[")[0] in ORIGINAL_ONLY]
    return {
        "tests": len(original),
        "original": count(original),
        "drop_in": count(drop_in),
        "original_only": [test for test in original_only if test not in expected],
        "drop_in_only": drop_in_only,
        "expected": expected,
    }


def count(outcomes: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return the number of tests by folder and outcome."""
    found: dict[str, dict[str, int]] = {}
    for test, outcome in outcomes.items():
        folder = found.setdefault(test.split(".")[1], {})
        folder[outcome] = folder.get(outcome, 0) + 1
    return found


def write_hub_cache(hub: Path) -> None:
    """Write the models in the layout of huggingface_hub's cache."""
    for commit, seed in COMMITS.items():
        folder = snapshot(hub, TINY, commit)
        checkpoints.write_bert(folder, heads=2, seed=seed)
        checkpoints.add_sentence_transformers_files(folder, normalize=False)
        # Vectors of trained models are not centered, and some tests detect normalized vectors by their mean.
        tensors = load_file(folder / "model.safetensors")
        tensors["encoder.layer.1.output.LayerNorm.bias"] += 0.05
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, labels in RERANKERS.items():
        checkpoints.write_bert_reranker(snapshot(hub, name), labels=("a", "b", "c")[:labels], heads=2)
    for name in TRAINED:
        shutil.copytree(checkpoints.MINILM, snapshot(hub, name), dirs_exist_ok=True)
    for name in MASKED_LM:
        folder = checkpoints.write_bert_mlm(snapshot(hub, name), heads=2)
    splade: Any = SparseEncoder(str(folder), device="cpu")
    splade[0].model.cls.predictions.bias.data *= 0.85  # the tests expect 50 to 100 weights per text
    splade.encode("a text")  # sets the dimension, which is saved
    splade.save_pretrained(str(snapshot(hub, SPLADE)))
    router = Router.for_query_document([SparseStaticEmbedding(splade.tokenizer)], list(splade))
    SparseEncoder(modules=[router], device="cpu").save_pretrained(str(snapshot(hub, INFERENCE_FREE)))


def snapshot(hub: Path, name: str, commit: str = next(iter(COMMITS))) -> Path:
    """Create and return the folder of a model's commit; the first commit is `main`."""
    model = hub / f"models--{name.replace('/', '--')}"
    folder = model / "snapshots" / commit
    folder.mkdir(parents=True)
    (model / "refs").mkdir(exist_ok=True)
    if not (model / "refs" / "main").exists():
        (model / "refs" / "main").write_text(commit)
    return folder


if __name__ == "__main__":
    main()
