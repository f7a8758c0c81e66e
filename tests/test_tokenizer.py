"""Text to ids, against the tokenizer of transformers and against truncating all tokens of a text."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from unpadded.errors import CheckpointError, InputError, OptionError
from unpadded.tokenization.tokenizer import Tokenizer
from unpadded.tokenization.tokenizer_files import VOCABULARY_BYTES

PROSE = (
    "Whether I shall turn out to be the hero of my own life, or whether that station will be held by anybody else, "
    "these pages must show. To begin my life with the beginning of my life, I record that I was born (as I have been "
    "informed and believe) on a Friday, at twelve o'clock at night. It was remarked that the clock began to strike, "
    "and I began to cry, simultaneously. L'été, à Zürich, coûte 1.234.567,89 €; naïve façade - 3.14159e-10 [1] {x: y} "
    "https://a.b/c?d=e#f "
)
AWKWARD = [
    "",
    "   \n\t ",
    "word",
    "日本語のテキストと中文字符没有空格한국어 문장 ไทย",
    "😀👩‍👩‍👧 ok 🇨🇭🇫🇷",
    "e\u0301te\u0301 A\u030angstro\u0308m İstanbul straße ﬁne",
    "a\x00b\x01c\u200bd\ufeffe\u2028f\x85g\u00a0h",
    "a [SEP] b[SEP]c [sep] [MASK][CLS]",
    "x" * 150 + " " + "y" * 99,
    "don't...stop---now!!!???",
    "\u0301" * 20 + "b",
    PROSE,
]
FRAGMENTS = [
    *("[SEP]", "[MASK]", "[", "SEP]", "  ", "\n", "\x00", "\u200b", "e\u0301", "\u0301" * 30, "\x01" * 20, "日本語"),
    *("😀", "👩‍👩‍👧", "ﬁ", "x" * 130, "n't", "...", "İ", "한국어", "1234567" * 9, "'s", "!!'s", " " * 12),
    *("<m>", " " * 40 + "<m>" + " " * 40, "tik-tok", "<|-+-|>", "ti\u0301k" + "\x01" * 40 + "-tok"),
]


def awkward_text(rng: random.Random, pieces: int) -> str:
    def piece() -> str:
        start = rng.randrange(len(PROSE))
        return rng.choice(FRAGMENTS) if rng.random() < 0.5 else PROSE[start : start + rng.randrange(30)]

    return "".join(piece() for _ in range(pieces))


def whole_ids(backend: tokenizers.Tokenizer, text: str, prompt: str, max_length: int, truncation: str) -> list[int]:
    """Return the ids by definition: tokenize everything, then drop tokens."""
    full = backend.encode(prompt + text)
    if len(full) <= max_length or truncation == "right":
        return [full.ids[0], *full.ids[1:-1][: max_length - 2], full.ids[-1]]
    body = full.ids[1:-1]
    kept = sum(start < len(prompt.rstrip()) for start, _ in full.offsets[1:-1])
    return [full.ids[0], *body[:kept], *body[len(body) - (max_length - 2 - kept) :], full.ids[-1]]


def add_tokens(backend: tokenizers.Tokenizer) -> None:
    """Add tokens of every kind: including surrounding spaces, of several words, matched after normalization."""
    backend.add_special_tokens([AddedToken("<m>", lstrip=True, rstrip=True), AddedToken("<|-+-|>")])
    backend.add_tokens([AddedToken("tik-tok", normalized=True)])


def trained(kind: str) -> tokenizers.Tokenizer:
    """Train a tokenizer of another kind than BERT's."""
    special = ["<s>", "</s>", "<unk>"]
    corpus = [PROSE, *AWKWARD]
    if kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        if kind == "grouped digits":
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{3}|\p{L}+|\s+|."), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    backend.train_from_iterator(corpus, trainer)
    add_tokens(backend)
    ids = [(token, backend.token_to_id(token)) for token in special[:2]]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return backend


class RecordingBackend:
    """A `tokenizers` object that records the texts of every call."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.calls: list[list[str]] = []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch(self, texts: list[str], **options: bool) -> list[tokenizers.Encoding]:
        self.calls.append(texts)
        return self.backend.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> list[tokenizers.Encoding]:
        self.calls.append(texts)
        return self.backend.encode_batch_fast(texts, **options)


@pytest.fixture(scope="module")
def bert(minilm: Path) -> Tokenizer:
    return Tokenizer.from_folder(minilm)


@pytest.fixture(scope="module")
def bert_backend(minilm: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend


def ids_of(rows) -> list[list[int]]:
    return [row.ids.tolist() for row in rows]


@pytest.mark.parametrize("max_length", [3, 9, 64, 512])
def test_right_truncation_equals_transformers(bert: Tokenizer, minilm: Path, max_length: int) -> None:
    reference = AutoTokenizer.from_pretrained(minilm)
    texts = [*AWKWARD, PROSE * 20, "中" * 5000]
    rows = bert.encode(texts, max_length=max_length)
    assert ids_of(rows) == reference(texts, truncation=True, max_length=max_length)["input_ids"]
    lengths = map(len, reference(texts, verbose=False)["input_ids"])
    assert [row.truncated for row in rows] == [length > max_length for length in lengths]
    assert {row.ids.dtype for row in rows} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("prompt", "truncation"),
    [("", "right"), ("tik-", "right"), ("", "left"), ("search_query: ", "left"), ("e", "left"), ("tik-", "left")],
)
@pytest.mark.parametrize("kind", ["bert", "bert with added tokens", "bytes", "unigram", "grouped digits"])
def test_slices_do_not_change_ids(
    kind: str, prompt: str, truncation: str, bert_backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpadded.tokenization.truncation.CHARACTERS_PER_TOKEN", 1)
    backend = bert_backend
    if kind == "bert with added tokens":
        backend = tokenizers.Tokenizer.from_str(bert_backend.to_str())
        add_tokens(backend)
    elif kind != "bert":
        backend = trained(kind)
    tokenizer = Tokenizer(backend, Path("trained"))
    rng = random.Random(f"{kind} {prompt} {truncation}")
    count = 6 if kind == "grouped digits" else 30  # its texts are tokenized entirely
    texts = [awkward_text(rng, rng.choice([5, 60, 400])) for _ in range(count)]
    for max_length in (24, 90, 300):
        rows = tokenizer.encode(texts, prompt=prompt, max_length=max_length, truncation=truncation)
        expected = [whole_ids(backend, text, prompt, max_length, truncation) for text in texts]
        assert ids_of(rows) == expected
        assert [row.truncated for row in rows] == [len(backend.encode(prompt + text)) > max_length for text in texts]


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("fragment", ["[SEP]", "<|-+-|>", "e\u0301\u0323", "a" * 120, "\x01", " ", "中", "a-b "])
def test_a_slice_can_end_anywhere_in_a_fragment(
    fragment: str, truncation: str, bert_backend: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpadded.tokenization.truncation.CHARACTERS_PER_TOKEN", 1)
    backend = tokenizers.Tokenizer.from_str(bert_backend.to_str())
    add_tokens(backend)
    tokenizer = Tokenizer(backend, Path("added"))
    for shift in range(12):
        text = "o " * shift + fragment * 60 + " o" * shift
        for max_length in (4, 6, 8, 20):
            (row,) = tokenizer.encode([text], max_length=max_length, truncation=truncation)
            assert row.ids.tolist() == whole_ids(backend, text, "", max_length, truncation), (shift, max_length)


@pytest.mark.parametrize("truncation", ["right", "left", "error"])
def test_cost_does_not_grow_with_the_text(bert: Tokenizer, minilm: Path, truncation: str) -> None:
    backend = RecordingBackend(bert.backend)
    tokenizer = Tokenizer(backend, minilm)
    characters = []
    for length in (20_000, 1_200_000):
        backend.calls.clear()
        text = (PROSE * (length // len(PROSE) + 1))[:length]
        if truncation == "error":
            with pytest.raises(InputError, match="more than 512 tokens"):
                tokenizer.encode([text], max_length=512, truncation=truncation)
        else:
            tokenizer.encode([text], max_length=512, prompt="search_query: ", truncation=truncation)
        characters.append(sum(len(text) for texts in backend.calls for text in texts))
    # the error names the length of the shorter text, which is tokenized entirely for it
    assert characters[1] <= characters[0] and characters[1] < 512 * 6 + 1000


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, " " * 1_000_000, "中" * 1_000_000, "[SEP]" * 200_000, "\x00" * 1_000_000]
)
def test_a_text_of_a_million_characters(bert: Tokenizer, bert_backend: tokenizers.Tokenizer, text: str) -> None:
    body = bert_backend.encode(text[:20_000] if text[0] in "中[" else text, add_special_tokens=False).ids
    (row,) = bert.encode([text], max_length=128)
    assert row.ids.tolist() == [101, *body[:126], 102]


def test_left_truncation_keeps_the_prompt_and_the_end(bert: Tokenizer) -> None:
    (prompt,) = bert.encode(["search_query:"], max_length=512)
    (end,) = bert.encode(["these are the last words"], max_length=512)
    (row,) = bert.encode(
        [PROSE * 50 + " these are the last words"], prompt="search_query: ", max_length=11, truncation="left"
    )
    assert row.ids.tolist() == [*prompt.ids[:-1], *end.ids[1:]][:5] + end.ids[1:].tolist()
    assert row.truncated


def test_right_truncation_keeps_the_prompt(bert: Tokenizer) -> None:
    (prompt,) = bert.encode(["search_query:"], max_length=512)
    (row,) = bert.encode([PROSE * 50], prompt="search_query: ", max_length=8)
    assert row.ids[: len(prompt.ids) - 1].tolist() == prompt.ids[:-1].tolist()


def test_truncation_error_names_text_and_length(bert: Tokenizer) -> None:
    texts = ["fits", "one two three four", PROSE * 5000]
    with pytest.raises(InputError, match=r"text 11 is too long: more than 5 tokens;"):
        bert.encode(texts, max_length=5, truncation="error", indices=range(10, 10 + len(texts)))
    with pytest.raises(InputError, match=r"text 0 is too long: more than 512 tokens"):
        bert.encode(texts[2:], max_length=512, truncation="error")
    assert ids_of(bert.encode(texts[:2], max_length=6, truncation="error")) == ids_of(
        bert.encode(texts[:2], max_length=64)
    )


@pytest.mark.parametrize("text", [None, 3, b"bytes", ("a", "pair"), ["a", "pair"]])
def test_an_input_that_is_not_a_string_raises(bert: Tokenizer, text: object) -> None:
    with pytest.raises(InputError, match=f"text 1001 is not a string: {type(text).__name__}; pass strings"):
        bert.encode(["fine", text], max_length=64, indices=[7, 1001])


@pytest.mark.parametrize("before", ["", "é", "x" * 100_000])
def test_a_lone_surrogate_raises(bert: Tokenizer, before: str) -> None:
    text = f"{before}\ud83d rest"
    with pytest.raises(InputError, match=rf"text 7 .* lone surrogate: U\+D83D at character {len(before)}; repair"):
        bert.encode(["fine", "fine", text], max_length=64, indices=[5, 6, 7])
    repaired = text.encode("utf-8", "replace").decode()
    assert len(bert.encode([repaired], max_length=64)) == 1


def test_invalid_options_raise(bert: Tokenizer) -> None:
    with pytest.raises(OptionError, match="truncation is unknown: 'middle'; use one of right, left, error"):
        bert.encode(["a"], max_length=8, truncation="middle")
    with pytest.raises(OptionError, match="of 6 tokens, special tokens take 2 and the prompt 4; shorten"):
        bert.encode(["a"], prompt="search_query: ", max_length=6)
    with pytest.raises(OptionError, match="of 2 tokens, special tokens take 2 and the prompt 0; shorten"):
        bert.encode(["a"], max_length=2)
    with pytest.raises(OptionError, match="prompt is not text"):
        bert.encode(["a"], prompt="\ud800", max_length=64)


def test_str_subclasses_and_other_sequences_are_supported(bert: Tokenizer) -> None:
    texts = np.array(["one text", "another"])
    assert ids_of(bert.encode(texts, max_length=64)) == ids_of(bert.encode(texts.tolist(), max_length=64))
    assert bert.encode([], max_length=64) == []


def test_blocks_do_not_change_ids(bert: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*AWKWARD, PROSE * 30, *AWKWARD]
    expected = ids_of(bert.encode(texts, max_length=50))
    monkeypatch.setattr(Tokenizer, "block_characters", 40)
    assert ids_of(bert.encode(texts, max_length=50)) == expected


def test_a_call_uses_a_limited_number_of_cores(bert: Tokenizer) -> None:
    """The library uses one core per text of a call."""
    backend = RecordingBackend(bert.backend)
    tokenizer = Tokenizer(backend, bert.folder, cores=2)
    texts = ["one", "two words", "three", "", "five"]
    assert ids_of(tokenizer.encode(texts, max_length=50)) == ids_of(bert.encode(texts, max_length=50))
    assert [len(call) for call in backend.calls] == [1, 2, 2, 1], "the prompt, and the texts"


def test_threads_can_share_a_tokenizer(bert: Tokenizer) -> None:
    texts = [*AWKWARD, PROSE * 30]
    expected = {length: ids_of(bert.encode(texts, max_length=length)) for length in range(10, 50)}
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda length: (length, ids_of(bert.encode(texts, max_length=length))), expected)
        assert dict(results) == expected


def test_a_folder_without_tokenizer_files_loads_and_raises_for_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt in .*pass token ids"):
        tokenizer.encode(["text"], max_length=64)


def test_errors_name_broken_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=f"transformers cannot read the tokenizer of {tmp_path}: .*; correct"):
        Tokenizer.from_folder(tmp_path)
    for name in ("config", "tokenizer_config", "special_tokens_map", "added_tokens"):
        for content in ("{", "[]"):
            (tmp_path / f"{name}.json").write_text(content)
            with pytest.raises(CheckpointError, match=rf"{name}\.json is not"):
                Tokenizer.from_folder(tmp_path)
        (tmp_path / f"{name}.json").write_text("{}")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # reading it would block
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .* not a regular file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(VOCABULARY_BYTES + 1)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: .* at most {VOCABULARY_BYTES} bytes"):
        Tokenizer.from_folder(tmp_path)


def test_a_regular_expression_that_backtracks_raises_an_input_error(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    tokenizer = Tokenizer(backend, tmp_path)
    with pytest.raises(InputError, match=r"a text cannot be tokenized: 'aaaa.*retry-limit"):
        tokenizer.encode(["a" * 40 + "c"], max_length=64)
