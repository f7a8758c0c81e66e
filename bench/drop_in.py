"""Speed of each drop-in next to the code that it replaces: one line changed, the same vectors.

    PYTHONPATH=tests python bench/drop_in.py [--layers 12] [--rounds 3] [--out results/NAME.json]

transformers: a NomicBERT of real width with seeded weights and a batch of 32 paragraphs; its class against
UnpaddedModel and against the accelerated model. sentence-transformers: `encode` of paragraphs by all-MiniLM-L6-v2 with
real weights. nomic: the local mode of its client against the same computed by transformers, text by text, because the
client itself runs a quantized copy of other weights. Exits with an error if a cosine is below 0.99999. The last line on
stdout is JSON.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from support import checkpoints

import unpadded
from unpadded.cli.benchmark.comparison import interleave
from unpadded.cli.benchmark.workloads import TextSampler

MIN_COSINE = 0.99999
BATCH = 32


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--texts", type=int, default=512, help="paragraphs for sentence-transformers (default: 512)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the NomicBERT (default: 12)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    texts = TextSampler(unpadded.load(checkpoints.MINILM, device="cpu")).workload("paragraphs", args.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints.write_nomic(folder, names="transformers", **checkpoints.REAL | {"layers": args.layers})
        rows = [
            *transformers_forward(folder, texts[:BATCH], args.rounds),
            sentence_transformers_encode(texts, args.rounds),
            nomic_text(folder, texts[:BATCH], args.rounds),
        ]
    harness.report({"rows": rows}, args.out)
    if any(row["min_cosine"] < MIN_COSINE for row in rows):
        raise SystemExit(f"a cosine is below {MIN_COSINE}")


def transformers_forward(folder: Path, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Run the example of the model card: tokenizer, forward pass, mean pooling, normalization."""
    from transformers import AutoModel, AutoTokenizer

    from unpadded.integrations.accelerate import accelerate
    from unpadded.integrations.transformers import UnpaddedModel

    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")

    def embeddings(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            model_output = model(**encoded)
        mask = encoded["attention_mask"].unsqueeze(-1).float()
        mean = (model_output[0] * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return F.normalize(mean, p=2, dim=1).numpy()

    original = AutoModel.from_pretrained(folder).eval()
    packed = UnpaddedModel.from_pretrained(folder)
    accelerated = accelerate(AutoModel.from_pretrained(folder).eval())
    tokens = int(encoded["attention_mask"].sum())
    shape = f"{len(texts)} texts, {tokens} of {encoded['attention_mask'].numel()} positions are tokens"
    return [
        compare(
            f"transformers, {line} ({shape})",
            {"original": lambda: embeddings(original), "unpadded": lambda model=model: embeddings(model)},
            rounds,
        )
        for line, model in (("UnpaddedModel.from_pretrained(...)", packed), ("accelerate(model)", accelerated))
    ]


def sentence_transformers_encode(texts: list[str], rounds: int) -> dict[str, Any]:
    import sentence_transformers

    from unpadded.integrations.sentence_transformers import SentenceTransformer

    folder = str(checkpoints.MINILM)
    original = sentence_transformers.SentenceTransformer(folder, device="cpu")
    drop_in = SentenceTransformer(folder, device="cpu")
    return compare(
        f"sentence-transformers, SentenceTransformer(...).encode ({len(texts)} paragraphs)",
        {"original": lambda: original.encode(texts), "unpadded": lambda: drop_in.encode(texts)},
        rounds,
    )


def nomic_text(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    from transformers import AutoModel, AutoTokenizer

    from unpadded import embed

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def one_by_one() -> np.ndarray:
        rows = []
        for text in texts:
            encoded = tokenizer(f"search_document: {text}", truncation=True, max_length=2048, return_tensors="pt")
            with torch.no_grad():
                rows.append(F.normalize(model(**encoded)[0].mean(1), dim=1)[0])
        return torch.stack(rows).numpy()

    def drop_in() -> np.ndarray:
        output = embed.text(texts, model=str(folder), task_type="search_document", device="cpu")
        return np.array(output["embeddings"])

    return compare(
        f"nomic, embed.text ({len(texts)} paragraphs)", {"original": one_by_one, "unpadded": drop_in}, rounds
    )


def compare(drop_in: str, providers: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return one row of the report, and print it."""
    for run in providers.values():
        run()
    times, results, _ = interleave(providers, rounds, torch.device("cpu"))
    rows = {name: result / np.linalg.norm(result, axis=1, keepdims=True) for name, result in results.items()}
    min_cosine = float((rows["original"].astype(np.float64) * rows["unpadded"]).sum(1).min())
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = seconds["original"] / seconds["unpadded"]
    change = f"{seconds['original']:.3f} s -> {seconds['unpadded']:.3f} s, {ratio:.2f} x"
    print(f"{drop_in}: min cosine {min_cosine:.7f}; {change}")
    return {"drop_in": drop_in, "min_cosine": min_cosine, "ratio": ratio, "seconds": times}


if __name__ == "__main__":
    main()
