"""Late chunking: texts with spans -> sections of tokens, each with the spans whose vectors are computed from it.

A section is the prompt and consecutive tokens of a text between special tokens, at most `max_length` in all. A longer
text has several, which overlap. A span is computed from the section whose middle is nearest to its own, which
maximizes min(tokens before, tokens after). A token belongs to a span if their characters intersect, not counting
whitespace before a word. Special tokens belong to the spans that start with the first token of a text, unless there is
a prompt, and to those that end with its last one.
"""

import operator
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Encoding

from unpadded.errors import InputError, OptionError
from unpadded.model.batch import SpannedIds

SpannedText: TypeAlias = tuple[str, tuple[tuple[int, int], ...]]  # with the characters of its spans
Cut: TypeAlias = tuple[int, int] | None  # tokens of a span and of an overlap; None if spans are given

SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][”’」』）]*\s*|[\r\n]\s*")  # noqa: RUF001
# Tokens that sections share, at most half of one: a span of 256 tokens has at least 128 on both sides, and a text of
# many sections of 8192 has 7 % more tokens to compute. The published code of late chunking shares 256.
OVERLAP = 512
# Tokens of a section's spans per token of it; more spans have another section with the same tokens. Pooling copies
# their hidden states, and so needs no more memory than attention (`memory.bytes_per_token`).
COVER = 8


def checked_spans(item: Any, index: int) -> SpannedText:
    """Return a text and its spans; InputError unless they are a string and pairs of integers."""
    text, spans = item
    try:
        return str.__str__(text), tuple((operator.index(start), operator.index(end)) for start, end in spans)
    except (TypeError, ValueError):
        found = f"{text!r:.40} with {spans!r:.40}"
        raise InputError(f"text {index} is not a string with pairs of integers: {found}; pass (start, end)") from None


def read_sections(
    item: SpannedText, index: int, encoding: Encoding, prompt: str, limit: int, special: list[list[int]], cut: Cut
) -> list[SpannedIds]:
    """Return the sections of a text that have spans, or one without tokens of the text.

    encoding: of prompt + text, of whose tokens `limit` fit. special: ids before and after them. index: named in errors.
    """
    text, spans = item
    full, prefix, offsets = prompt + text, len(prompt), encoding.offsets
    ends = [max(end, 1) - prefix for _, end in offsets]
    before = min(bisect_right(ends, 0), limit - 1)  # tokens of the prompt
    prompt_ids, ids, ends = encoding.ids[:before], encoding.ids[before:], ends[before:]
    # A token of whitespace only has its last character.
    starts = [max(0, min(end - len(full[start:end].lstrip()), end - 1) - prefix) for start, end in offsets[before:]]
    total, size = len(ids), limit - before
    if cut is not None:
        if not 0 <= cut[1] < cut[0] <= size:
            found = f"{cut[0]} and {cut[1]}; pass 0 <= overlap < span_tokens <= {size}, the tokens of a text that fit"
            raise OptionError(f"span_tokens and overlap are out of range: {found}")
        spans = sentence_spans(text, starts, *cut)

    step = size - min(OVERLAP, size // 2)
    final = max(0, -(-(total - size) // step))  # number of the last section
    covered: Counter[int] = Counter()
    rows: dict[tuple[int, int], list[tuple[int, ...]]] = {}  # of the spans of each section
    for place, (low, high) in enumerate(spans):
        first, last = bisect_right(ends, low), bisect_left(starts, high)
        last = last if cut is None else min(last, first + size)  # a character may have several tokens
        if not 0 <= low < high <= len(text) or not 0 < last - first <= size:
            raise InputError(
                f"span {place} of text {index} is not a range of 1 to {size} tokens: {(low, high)} has "
                f"{max(0, last - first)}; pass 0 <= start < end <= {len(text)}, and shorter spans if needed"
            )
        begin = step * max(0, min(final, (first + last - size + step - 1) // (2 * step)))
        if first < begin or last > begin + size:  # longer than the overlap: it is the middle of its own section
            begin = max(0, min(total - size, (first + last - size) // 2))
        covered[begin] += last - first
        shift = len(special[0]) + before - begin
        start = first + shift if first or before else 0
        end = last + shift + (len(special[1]) if last == total else 0)
        section = begin, covered[begin] // ((COVER - 1) * min(size, total))
        rows.setdefault(section, []).append((start, end, place, low, high, end - start))
    sections = []
    for (begin, _), of_section in (rows or {(total, 0): []}).items():
        table = np.array(of_section, np.int64).reshape(-1, 6)
        row = np.array([*special[0], *prompt_ids, *ids[begin : begin + size], *special[1]], np.int32)
        sections.append(SpannedIds(row, table[:, :2].astype(np.int32), table[:, 2:]))
    return sections


def sentence_spans(text: str, starts: list[int], span_tokens: int, overlap: int) -> tuple[tuple[int, int], ...]:
    """Return spans that cover a text, each of the sentences that fit into `span_tokens` tokens.

    A longer sentence is cut between tokens. A span begins with the first sentence that begins in the last `overlap`
    tokens of the one before, or with all of these if none does, or with as many as leave space for the next sentence.
    starts: the first character of each token.
    """
    total = len(starts)
    sentences = sorted({0, *(bisect_left(starts, found.end()) for found in SENTENCE_END.finditer(text)), total})
    spans: list[tuple[int, int]] = []
    start, end = -1, 0
    while end < total:
        low, at = max(end - overlap, start + 1), bisect_right(sentences, end)
        if sentences[at - 1] == end and sentences[at] <= end + span_tokens:  # the next sentence fits, so it is not cut
            low = max(low, sentences[at] - span_tokens)
        start = sentences[bisect_left(sentences, low)]
        start = start if start < end else low
        fitting = sentences[bisect_right(sentences, start + span_tokens) - 1]
        end = fitting if fitting > end else start + span_tokens
        if end == total or starts[start] < starts[end]:  # otherwise it has some of the tokens of one character
            spans.append((starts[start] if spans else 0, starts[end] if end < total else len(text)))
    return tuple(spans)
