"""Spans of texts: the vectors of pooled token embeddings, sections of long texts, cuts at sentences, clear errors."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import add_sentence_transformers_files, write_bert, write_nomic
from test_tokenizer import AWKWARD, PROSE, trained
from test_tokenizer_settings import roberta

import unpadded
from unpadded.errors import InputError, OptionError, OutputError
from unpadded.execution.batcher import run_windows
from unpadded.execution.results import Spans
from unpadded.model.batch import SpannedIds
from unpadded.tokenization.spans import COVER, OVERLAP, sentence_spans

SMALL = {"hidden": 64, "heads": 1}
KINDS = ["wordpiece", "bpe", "roberta", "unigram"]
PROMPT = "search_document: "
TEXT = PROSE.strip()
PLACES = [(40, 90), (0, 12), (len(TEXT) - 30, len(TEXT)), (60, 200), (8, 9), (0, len(TEXT))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models with WordPiece, byte-level BPE (also RoBERTa's, with tokens without characters) and Unigram."""
    root = tmp_path_factory.mktemp("models")
    found = {"wordpiece": write_nomic(root / "wordpiece", **SMALL)}
    for kind in KINDS[1:]:
        backend = roberta() if kind == "roberta" else trained(kind)
        size = backend.get_vocab_size()
        found[kind] = write_nomic(root / kind, vocabulary=size, tokenizer=False, **SMALL)
        backend.save(str(found[kind] / "tokenizer.json"))
        (found[kind] / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizer"}))
    return found


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> unpadded.Engine:
    return unpadded.load(folders["wordpiece"], device="cpu", token_budget=300)


@pytest.fixture(scope="module")
def short(folders: dict[str, Path]) -> unpadded.Engine:
    """Return an engine whose sections have 42 tokens, of which they share 20."""
    return unpadded.load(folders["wordpiece"], device="cpu", max_length=42)


def characters(engine: unpadded.Engine, prompt: str, text: str) -> list[set[int]]:
    """Return the characters of the text in each token of prompt + text, in order; tokens of the prompt have none."""
    full, found = prompt + text, []
    for start, end in engine.tokenizer.backend.encode(full, add_special_tokens=False).offsets:
        first = next((at for at in range(start, end) if not full[at].isspace()), end - 1)
        found.append({at - len(prompt) for at in range(first, end) if at >= len(prompt)})
    return found


def by_hand(engine: unpadded.Engine, text: str, spans: list[tuple[int, int]], prompt: str = "") -> np.ndarray:
    """Return the means of the token embeddings of spans, in fp64."""
    (hidden,) = engine.token_embeddings([text], prompt=prompt)
    owners, rows = characters(engine, prompt, text), []
    own = [index for index, known in enumerate(owners) if known]
    for span in spans:
        tokens = [index for index in own if owners[index] & set(range(*span))]
        first, last = tokens[0] + 1, tokens[-1] + 2  # after [CLS]
        first -= tokens[0] == 0
        last += tokens[-1] == len(owners) - 1
        rows.append(hidden[first:last].astype(np.float64).mean(axis=0))
    return np.stack(rows)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", PROMPT, "query:"])
def test_spans_equal_pooled_token_embeddings(kind: str, prompt: str, folders: dict[str, Path]) -> None:
    engine = unpadded.load(folders[kind], device="cpu")
    found = engine.encode_spans([TEXT], spans=[PLACES], prompt=prompt, normalize=False)
    assert found.bounds.tolist() == [list(span) for span in PLACES] and found.text_index.tolist() == [0] * len(PLACES)
    assert error(found.vectors, by_hand(engine, TEXT, PLACES, prompt)) <= 1e-6
    for text in AWKWARD[2:-1]:
        spans = list(itertools.pairwise([*range(0, len(text), max(1, len(text) // 4)), len(text)]))
        owners = set().union(*characters(engine, prompt, text))
        spans = [span for span in spans if owners & set(range(*span))]
        found = engine.encode_spans(text, spans=spans, prompt=prompt, normalize=False)
        assert error(found.vectors, by_hand(engine, text, spans, prompt)) <= 1e-6, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_of_a_whole_text_equals_encode(kind: str, folders: dict[str, Path]) -> None:
    engine = unpadded.load(folders[kind], device="cpu")
    texts = [text for text in [*AWKWARD, "  tide \n"] if text.strip()]
    spans = [[(0, len(text))] for text in texts]
    for options in ({}, {"dimensions": 32}, {"normalize": True}):
        found, expected = engine.encode_spans(texts, spans=spans, **options), engine.embed(texts, **options)
        assert np.array_equal(found.vectors, expected.vectors) and found.vectors.dtype == np.float32
        assert np.array_equal(found.token_counts, expected.token_counts)
        assert found.text_index.tolist() == list(range(len(texts)))
    automatic = engine.encode_spans(texts, span_tokens=8000)
    assert np.array_equal(automatic.vectors, engine.encode(texts))


def test_the_prompt_is_context_and_in_no_span(engine: unpadded.Engine) -> None:
    whole = [(0, len(TEXT))]
    plain, task = (engine.encode_spans(TEXT, spans=whole, task=task) for task in (None, "search_document"))
    assert plain.token_counts - task.token_counts == 1, "[CLS] is not next to the text"
    assert np.array_equal(engine.encode_spans(TEXT, spans=whole, prompt=PROMPT).vectors, task.vectors)
    assert engine.encode_spans(TEXT, spans=[(7, 30)], task="search_document").token_counts == [6]
    inner = [engine.encode_spans(TEXT, spans=[(7, 30)], prompt=prompt) for prompt in ("", PROMPT)]
    assert inner[0].token_counts == inner[1].token_counts and not np.allclose(inner[0].vectors, inner[1].vectors)


def sections_by_definition(engine: unpadded.Engine, text: str, spans: list[tuple[int, int]], prompt: str) -> np.ndarray:
    """Return the mean of each span in the section with most context: [spans, hidden]."""
    ids = engine.tokenizer.backend.encode(prompt + text).ids
    owners = characters(engine, prompt, text)
    prompt_ids = [id_ for id_, known in zip(ids[1:-1], owners, strict=True) if not known]
    body, owners = ids[1 + len(prompt_ids) : -1], owners[len(prompt_ids) :]
    size = engine.checkpoint.max_length - 2 - len(prompt_ids)
    step = size - min(OVERLAP, size // 2)
    starts = [0]
    while starts[-1] + size < len(body):
        starts.append(starts[-1] + step)
    rows = []
    for span in spans:
        tokens = [index for index, known in enumerate(owners) if known & set(range(*span))]
        first, last = tokens[0], tokens[-1] + 1
        context = {start: min(first - start, start + size - last) for start in starts}
        best = max(context, key=lambda start: context[start])
        if context[best] < 0:  # in no section
            best = max(0, min(len(body) - size, (first + last - size) // 2))
        (hidden,) = engine.token_embeddings([[ids[0], *prompt_ids, *body[best : best + size], ids[-1]]])
        begin = 1 + len(prompt_ids) + first - best
        end = begin + last - first + (last == len(body))
        rows.append(hidden[begin * (first > 0 or prompt != "") : end].astype(np.float64).mean(axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("prompt", ["", PROMPT, "query:"])
def test_a_span_of_a_long_text_has_the_section_with_most_context(short: unpadded.Engine, prompt: str) -> None:
    draw = np.random.default_rng(0)
    for repeats in (1, 2, 4):
        text = (TEXT + " ") * repeats
        words = [at for at in range(len(text) - 1) if text[at] == " "] + [0, len(text) - 1]
        starts, lengths = draw.choice(words, 50), draw.integers(2, 90, 50)
        pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
        spans = [(start, min(start + length, len(text))) for start, length in pairs]
        spans += [(0, 5), (len(text) - 20, len(text) - 1)]
        counts = [sum(bool(known & set(range(*span))) for known in characters(short, prompt, text)) for span in spans]
        spans = [span for span, count in zip(spans, counts, strict=True) if 1 <= count <= 34]
        found = short.encode_spans(text, spans=spans, prompt=prompt, normalize=False)
        assert len(spans) >= 40 and max(found.token_counts) > 20, "some are longer than the overlap"
        assert error(found.vectors, sections_by_definition(short, text, spans, prompt)) <= 1e-6


def test_sections_share_512_tokens(engine: unpadded.Engine) -> None:
    text = "tide " * 20000
    plan = engine._pipeline.span_plan((256, 0))
    (window,) = engine._pipeline.reader.windows([(text, ())], plan)
    size, step = 8190, 8190 - 512
    lengths = [8192, 8192, 20000 - 2 * step + 2]
    assert [len(section) for section in window.sequences] == lengths
    firsts = [section.sources[:, 0].tolist() for section in window.sequences]
    # A section has spans from the middle of what it shares: a span of 256 tokens has at least 128 on both sides.
    assert firsts == [list(range(31)), list(range(31, 61)), list(range(61, 79))]
    assert 31 * 256 - size <= 128 <= 31 * 256 - step


def test_bits_do_not_depend_on_other_texts_or_spans(engine: unpadded.Engine, short: unpadded.Engine) -> None:
    texts = [TEXT, "The tide.", TEXT * 3, "The tide.", TEXT]
    spans = [PLACES, [(4, 8)], [(900, 980), (3, 20)], [(0, 3), (4, 8)], PLACES]
    for model in (engine, short):
        if model is short:
            spans = [[span for span in known if span[1] - span[0] < 90] for known in spans]
        together = model.encode_spans(texts, spans=spans)
        alone = [
            model.encode_spans(text, spans=[span]).vectors
            for text, known in zip(texts, spans, strict=True)
            for span in known
        ]
        assert np.array_equal(together.vectors, np.concatenate(alone))
        assert together.text_index.tolist() == [index for index, known in enumerate(spans) for _ in known]
        assert together.bounds.tolist() == [list(span) for known in spans for span in known]
        model._pipeline.reader.max_texts = 2
        assert np.array_equal(model.encode_spans(iter(texts), spans=iter(spans)).vectors, together.vectors)
        del model._pipeline.reader.max_texts


def test_equal_texts_with_equal_spans_are_computed_once(engine: unpadded.Engine) -> None:
    plan = engine._pipeline.span_plan(None)
    items = [("The tide.", [(0, 3)]), ("The tide.", [(0, 3)]), ("The tide.", [(4, 8)])]
    (window,) = engine._pipeline.reader.windows(items, plan)
    assert window.first_sequences == [0, 0, 1]


def test_several_devices(engine: unpadded.Engine, folders: dict[str, Path]) -> None:
    with unpadded.load(folders["wordpiece"], device="cpu,cpu", token_budget=300) as two:
        expected, found = (one.encode_spans([TEXT, "tide"] * 4, span_tokens=20) for one in (engine, two))
        assert np.array_equal(found.vectors, expected.vectors) and len(found.vectors) == 36


def test_calls_share_batches(engine: unpadded.Engine) -> None:
    """As the server does: windows of spans through the batcher, next to other calls."""
    pipeline = engine._pipeline
    plan, batcher = pipeline.span_plan(None), pipeline.batcher()

    async def call(text: str, spans: list[tuple[int, int]]) -> Spans:
        windows = pipeline.reader.windows([(text, spans)], plan)
        return pipeline.collect_spans(await run_windows(batcher, windows, pipeline.work(plan)), plan)

    async def calls() -> list[Spans]:
        vectors = asyncio.gather(*(engine.aencode("tide") for _ in range(3)))
        found = await asyncio.gather(*(call(TEXT, [span]) for span in PLACES))
        await vectors
        return found

    found = asyncio.run(calls())
    batcher.close()
    expected = engine.encode_spans(TEXT, spans=PLACES)
    assert np.array_equal(np.concatenate([one.vectors for one in found]), expected.vectors)
    assert [one.bounds.tolist() for one in found] == [[list(span)] for span in PLACES]


def test_memory_is_bounded_however_many_spans_overlap(engine: unpadded.Engine) -> None:
    spans = [(0, len(TEXT) - number) for number in range(300)]
    (window,) = engine._pipeline.reader.windows([(TEXT, spans)], engine._pipeline.span_plan(None))
    assert len(window.sequences) > 20
    for section in window.sequences:
        assert isinstance(section, SpannedIds)
        assert np.diff(section.spans).sum() <= COVER * len(section)
    found = engine.encode_spans(TEXT, spans=spans)
    assert found.bounds.tolist() == [list(span) for span in spans]
    assert np.array_equal(found.vectors[::50], engine.encode_spans(TEXT, spans=spans[::50]).vectors)
    (few,) = engine._pipeline.reader.windows([(TEXT, spans[:6])], engine._pipeline.span_plan(None))
    assert len(few.sequences) == 1


def cut(text: str, span_tokens: int, overlap: int = 0) -> list[str]:
    """Return the spans of a text whose tokens are its words and marks."""
    starts = [match.start() for match in re.finditer(r"[a-zA-Z0-9]+|\S", text)]
    return [text[slice(*span)] for span in sentence_spans(text, starts, span_tokens, overlap)]


def test_texts_are_cut_at_the_ends_of_sentences() -> None:
    text = 'One two. Three!  Four five? "Six." Seven…\nEight\n\nnine 3.14 ten'
    sentences = ["One two. ", "Three!  ", "Four five? ", '"Six." ', "Seven…\n", "Eight\n\n", "nine 3.14 ten"]
    assert cut(text, 1000) == [text]
    assert cut(text, 6) == ["One two. Three!  ", "Four five? ", '"Six." Seven…\n', "Eight\n\nnine 3.14 ten"]
    assert cut(text, 5) == ["One two. Three!  ", *sentences[2:4], "Seven…\nEight\n\n", sentences[-1]]
    assert cut("日本。語は！「か？」 x", 5) == ["日本。", "語は！", "「か？」 x"]  # noqa: RUF001
    assert cut("", 4) == [] and cut("  a. b", 9) == ["  a. b"]


def test_a_long_sentence_is_cut_between_tokens() -> None:
    text = "a b. c d e f g h i j. k l. m"
    assert cut(text, 4) == ["a b. ", "c d e f ", "g h i j", ". k l. ", "m"]
    assert cut("a b c d e f g", 3) == ["a b c ", "d e f ", "g"]


def test_spans_overlap_by_whole_sentences_if_they_fit() -> None:
    text = "a b. c d. e f. g h. i j."
    assert cut(text, 9, 3) == ["a b. c d. e f. ", "e f. g h. i j."]
    assert cut(text, 9, 5) == ["a b. c d. e f. ", "e f. g h. i j."]
    assert cut(text, 9, 6) == ["a b. c d. e f. ", "c d. e f. g h. ", "e f. g h. i j."]
    assert cut(text, 9, 2) == ["a b. c d. e f. ", "f. g h. i j."], "no sentence begins in two tokens: exactly those"
    assert cut("a b c d e f g", 4, 2) == ["a b c d ", "c d e f ", "e f g"]
    assert cut("a. b c. d e f g h.", 6, 3) == ["a. b c. ", "d e f g h."], "less overlap rather than a cut sentence"
    assert cut("a. b c. d e f g.", 6, 3) == ["a. b c. ", ". d e f g."]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("span_tokens", "overlap"), [(1, 0), (7, 3), (40, 12), (40, 0)])
def test_cut_spans_cover_the_text(kind: str, span_tokens: int, overlap: int, folders: dict[str, Path]) -> None:
    engine = unpadded.load(folders[kind], device="cpu", max_length=span_tokens + 2)
    texts = [*AWKWARD, TEXT * 2, " \n" + TEXT + "\n "]
    found = engine.encode_spans(texts, span_tokens=span_tokens, overlap=overlap)
    for index, text in enumerate(texts):
        bounds = found.bounds[found.text_index == index]
        if not engine.tokenizer.backend.encode(text, add_special_tokens=False).ids:
            assert len(bounds) == 0
            continue
        assert bounds[0, 0] == 0 and bounds[-1, 1] == len(text)
        assert (np.diff(bounds, axis=0) > 0).all() and (bounds[1:, 0] <= bounds[:-1, 1]).all()
        assert overlap > 0 or (bounds[1:, 0] == bounds[:-1, 1]).all()
        tokens = characters(engine, "", text)
        for start, end in bounds[1:].tolist():
            shared = sum(bool(known & set(range(start, end))) for known in tokens)
            assert shared <= span_tokens + 30, "a character may have several tokens"
    if (span_tokens, kind) == (40, "wordpiece"):  # others may have several tokens per character
        again = engine.encode_spans(texts, spans=[found.bounds[found.text_index == i] for i in range(len(texts))])
        assert np.array_equal(again.vectors, found.vectors) and np.array_equal(again.token_counts, found.token_counts)
        assert max(found.token_counts) <= 42


def test_texts_without_tokens_or_spans_have_no_rows(engine: unpadded.Engine) -> None:
    found = engine.encode_spans(["", "tide", " \n "], span_tokens=5)
    assert found.text_index.tolist() == [1] and found.bounds.tolist() == [[0, 4]]
    found = engine.encode_spans(["tide", TEXT, "the tide"], spans=[[], [], [(4, 8)]])
    assert found.text_index.tolist() == [2] and np.array_equal(
        found.vectors, engine.encode_spans("the tide", spans=[(4, 8)]).vectors
    )
    (window,) = engine._pipeline.reader.windows([(TEXT, [])], engine._pipeline.span_plan(None))
    assert [len(section) for section in window.sequences] == [2], "only special tokens are computed"
    for empty in (engine.encode_spans([]), engine.encode_spans([], spans=[]), engine.encode_spans("tide", spans=[])):
        assert empty.vectors.shape == (0, 64) and empty.bounds.shape == (0, 2) and len(empty.token_counts) == 0
    assert unpadded.Spans is Spans


@pytest.mark.parametrize(
    ("texts", "spans", "message"),
    [
        (["the tide"], [[(0, 3), (4, 4)]], r"span 1 of text 0 is not a range of 1 to 8190 tokens: \(4, 4\)"),
        (["the tide"], [[(5, 5)]], r"span 0 of text 0 is not .* \(5, 5\)"),
        (["the tide"], [[(0, 9)]], r"span 0 of text 0 is not .* \(0, 9\) .*pass 0 <= start < end <= 8"),
        (["a", "the tide"], [[(0, 1)], [(-1, 3)]], r"span 0 of text 1 is not .* \(-1, 3\)"),
        (["the tide"], [[(5, 4)]], r"span 0 of text 0 is not .* \(5, 4\)"),
        (["the tide"], [[(0, 3), (3, 4)]], r"span 1 of text 0 is not .* \(3, 4\) has 0; pass"),
        (["the tide"], [[(0, 3, 4)]], r"text 0 is not a string with pairs of integers: 'the tide' with .*3, 4"),
        (["the tide"], [[(0.0, 3.0)]], "text 0 is not a string with pairs of integers"),
        (["the tide"], [(0, 3)], "text 0 is not a string with pairs of integers"),
        (["the tide", "b"], [[(0, 3)]], "text 1 is not a string with pairs of integers: 'b' with None"),
        (["the tide"], [[(0, 3)], [(0, 1)]], "text 1 is not a string with pairs of integers: None with"),
        (["a", 5], [[(0, 1)], [(0, 1)]], "text 1 is not a string with pairs of integers: 5 with"),
        ([[5, 6]], None, r"text 0 is not a string with pairs of integers: \[5, 6\]"),
        (["a", "\ud800b"], None, "text 1 contains a lone surrogate"),
        ({"a": "b"}, None, "texts are not a sequence: dict"),
    ],
)
def test_bad_spans_raise(texts: object, spans: object, message: str, engine: unpadded.Engine) -> None:
    with pytest.raises(InputError, match=message):
        engine.encode_spans(texts, spans=spans)  # type: ignore[arg-type]


def test_a_span_longer_than_a_section_raises(short: unpadded.Engine) -> None:
    words = " ".join(["tide"] * 60)
    assert short.encode_spans(words, spans=[(0, 199)]).token_counts == [41]  # with [CLS]
    assert short.encode_spans(words, spans=[(5, 204)]).token_counts == [40]
    with pytest.raises(InputError, match=r"span 1 of text 0 is not a range of 1 to 40 tokens: \(0, 204\) has 41"):
        short.encode_spans(words, spans=[(0, 4), (0, 204)])


def test_bad_options_raise(engine: unpadded.Engine, short: unpadded.Engine, tmp_path: Path) -> None:
    for options in ({"span_tokens": 41}, {"span_tokens": 0}, {"span_tokens": 9, "overlap": 9}, {"overlap": -1}):
        with pytest.raises(OptionError, match=r"span_tokens and overlap are out of range: .* <= 40, the tokens"):
            short.encode_spans(TEXT, **{"span_tokens": 40} | options)
    with pytest.raises(OptionError, match="dimensions are out of range"):
        engine.encode_spans(TEXT, dimensions=65)
    with pytest.raises(TypeError, match="long_text"):
        engine.encode_spans(TEXT, long_text="mean")  # type: ignore[call-arg]
    for pooling, name in (("cls", "cls"), ("lasttoken", "last")):
        folder = write_bert(tmp_path / pooling, **SMALL)
        add_sentence_transformers_files(folder, pooling=pooling)
        with pytest.raises(OptionError, match=f"{pooling} has {name} pooling, spans are means of tokens; use encode"):
            unpadded.load(folder, device="cpu").encode_spans(TEXT)


def test_a_token_without_word_embedding_raises(tmp_path: Path) -> None:
    engine = unpadded.load(write_nomic(tmp_path, vocabulary=2000, **SMALL), device="cpu")
    assert len(engine.encode_spans("a b").vectors) == 1
    with pytest.raises(InputError, match="text 0 contains the token 'tide', whose id"):
        engine.encode_spans("the tide")


def test_a_vector_that_is_not_finite_raises(engine: unpadded.Engine) -> None:
    pipeline = engine._pipeline
    plan = pipeline.span_plan((256, 0))
    (window,) = pipeline.reader.windows([("tide", ()), ("the tide", ())], plan)
    rows = [np.zeros((1, 64), np.float32), np.full((1, 64), np.nan, np.float32)]
    with pytest.raises(OutputError, match="the vector of text 1 is not finite"):
        pipeline.collect_spans([(window, rows)], plan)


def test_progress_counts_texts_and_tokens(short: unpadded.Engine) -> None:
    pipeline = short._pipeline
    plan, seen = pipeline.span_plan((20, 0)), []
    texts = [TEXT, "tide", TEXT * 2]
    list(pipeline.rows(((text, ()) for text in texts), plan, lambda *counts: seen.append(counts)))
    assert sum(count for count, _ in seen) == 3 and sum(tokens for _, tokens in seen) > 400
