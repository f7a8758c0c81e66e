"""sentence-transformers' own tests of dense inference, against its class and against ours.

    git clone --branch v6.2.0 https://github.com/huggingface/sentence-transformers DIR
    PYTHONPATH=tests python bench/st_suite.py --suite DIR [--only NAME ...] [--out FILE.json]

The models that its tests name come from a hub cache made here, so nothing is downloaded: seeded BERTs, and the real
all-MiniLM-L6-v2 where a test needs a trained model. A test that needs what a seeded model cannot give (published
values, adapters, other architectures) fails on both sides. test_multi_process.py starts some fifty processes a side,
which takes minutes on 2 cores. Prints each test that passes on one side only, and exits with an error if ours is the
side that fails. The last line on stdout is JSON.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
from safetensors.torch import load_file, save_file
from support import checkpoints

FILES = (
    "base/test_model.py",
    "base/modules/test_dense.py",
    "sentence_transformer/evaluation",
    "sentence_transformer/modules/test_pooling.py",
    "sentence_transformer/test_compute_embeddings.py",
    "sentence_transformer/test_model.py",
    "sentence_transformer/test_multi_process.py",
    "util",
)
TINY = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
# The real model stands for every trained one; its width is not theirs.
TRAINED = (
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/paraphrase-distilroberta-base-v1",
    "sentence-transformers/static-retrieval-mrl-en-v1",
)
COMMITS = {  # of TINY, as its tests name them: commit -> seed
    "f3cb857cba53019a20df283396bcca179cf051a4": 0,
    "ba33022fdf0b0fc2643263f0726f44d0a07d0e24": 1,
}
# By their nature different here, and why.
DIFFERENT = {
    "test_transformers_model_property": "the transformers model inside is ours, no BertModel",
    "test_third_party_module_with_strict_load_signature_round_trips": "trust_remote_code runs nothing",
    "test_model_card_save_update_model_id": "weights are saved by copying the folder they came from, and it is gone",
}
# Run in the suite's folder. What their tests import is replaced before they do.
REPLACE = """
import sentence_transformers
from sentence_transformers import sentence_transformer
from unpadded.integrations.sentence_transformers import SentenceTransformer
for module in (sentence_transformers, sentence_transformer, sentence_transformer.model):
    module.SentenceTransformer = SentenceTransformer
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
        theirs, ours = (run(code, args.suite, args.only, Path(name)) for code in (RUN, REPLACE + RUN))
    result = compare(theirs, ours)
    harness.report(result, args.out)
    if result["theirs_only"]:
        raise SystemExit(f"{len(result['theirs_only'])} tests pass on their class and not on ours")


def run(code: str, suite: Path, files: list[str], home: Path) -> dict[str, str]:
    """The outcome of each test."""
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    report = home / "report.xml"
    command = [sys.executable, "-c", code, *OPTIONS, f"--junitxml={report}", *(f"tests/{name}" for name in files)]
    subprocess.run(command, cwd=suite, env=os.environ | environment, check=True)
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome_of(case) for case in cases}


def outcome_of(case: ElementTree.Element) -> str:
    found = {child.tag for child in case} & {"failure", "error", "skipped"}
    return found.pop() if found else "passed"


def compare(theirs: dict[str, str], ours: dict[str, str]) -> dict[str, Any]:
    """Counts of each side, and the tests on which they part."""
    only = {
        "theirs_only": sorted(test for test in theirs if theirs[test] == "passed" and ours.get(test) != "passed"),
        "ours_only": sorted(test for test in ours if ours[test] == "passed" and theirs.get(test) != "passed"),
    }
    for side, tests in only.items():
        for test in tests:
            print(f"{side.removesuffix('_only')} alone pass {test}")
    expected = [test for test in only["theirs_only"] if test.rpartition("::")[2].partition("[")[0] in DIFFERENT]
    only["theirs_only"] = [test for test in only["theirs_only"] if test not in expected]
    return {
        "tests": len(theirs),
        "theirs": dict(Counter(theirs.values())),
        "ours": dict(Counter(ours.values())),
        **only,
        "different": expected,
    }


def write_hub_cache(hub: Path) -> None:
    """The models under their names, as huggingface_hub keeps what it has downloaded."""
    for commit, seed in COMMITS.items():
        folder = snapshot(hub, TINY, commit)
        checkpoints.write_bert(folder, heads=2, seed=seed)
        checkpoints.add_sentence_transformers_files(folder, normalize=False)
        # a trained model's vectors are not centered: by their means the tests tell those that are normalized
        tensors = load_file(folder / "model.safetensors")
        tensors["encoder.layer.1.output.LayerNorm.bias"] += 0.05
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TRAINED:
        shutil.copytree(checkpoints.MINILM, snapshot(hub, name, next(iter(COMMITS))), dirs_exist_ok=True)


def snapshot(hub: Path, name: str, commit: str) -> Path:
    """The empty folder of a model's commit; the first one is `main`."""
    model = hub / f"models--{name.replace('/', '--')}"
    folder = model / "snapshots" / commit
    folder.mkdir(parents=True)
    (model / "refs").mkdir(exist_ok=True)
    if not (model / "refs" / "main").exists():
        (model / "refs" / "main").write_text(commit)
    return folder


if __name__ == "__main__":
    main()
