"""The table of bench/heads.py."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]

INTRO = (
    "Seeded checkpoints in the published formats; one process measures the rows of a checkpoint. A pair is a query and "
    "a passage, 20 to 512 tokens together, and each round has new ones. Both libraries run in the same dtype. "
    "sentence-transformers sorts pairs by length and runs with the fastest of several batch sizes. Its default is 32; "
    "that column has the first round, where it fills at least four batches. Errors are relative to the scores of "
    "sentence-transformers in float32."
)
SEVERAL_BATCHES = 4 * 32  # inputs; fewer have more padding per batch than a longer list
HEADER = (
    "call, checkpoint, dtype",
    "inputs x rounds",
    "unpadded",
    "sentence-transformers",
    "batch",
    "speedup",
    "speedup over batches of 32",
    "relative error",
    "that of sentence-transformers",
)


def heads(result: Result) -> str:
    """Return one line per head, checkpoint and dtype, and what did not run."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for own, peer in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        rate, other = (
            f"{row['inputs_per_second']:,.1f} {row['unit']}/s, {row['tokens_per_second']:,.0f} tokens/s"
            for row in (own, peer)
        )
        cells = (
            f"`{own['provider']}`, {own['model']}, {own['dtype']}",
            f"{own['inputs']} x {len(own['seconds'])}",
            rate,
            other,
            str(peer["batch"]),
            f"**{own['speedup']:.2f} x**",
            f"{own['speedup_by_batch']['32']:.2f} x" if own["inputs"] >= SEVERAL_BATCHES else "",
            f"{own['relative_error']:.1e}",
            f"{peer['relative_error']:.1e}",
        )
        lines.append(cells)
    parts = [INTRO, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if spans := result.get("spans"):
        parts.append(
            f"`Engine.encode_spans` of one text of {spans['tokens']} tokens with {spans['spans']} spans takes "
            f"{spans['ratio']:.2f} x the time of `encode` (4 layers x 768, median of {len(spans['seconds'])} rounds)."
        )
    if result["not run"]:
        missing = [("not run", "reason"), ("---", "---"), *result["not run"].items()]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in missing))
    return "\n\n".join(parts)
