"""Reading inputs: every format gives the same rows, and what is damaged or unreadable is an error that names it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unpadded.bulk import RejectedRow, Row, read_rows
from unpadded.bulk.formats import expand_inputs
from unpadded.bulk.progress import ReadProgress
from unpadded.bulk.readers import column_types
from unpadded.bulk.text_readers import CHUNK
from unpadded.errors import InputError

TEXTS = ["plain", "zwölf Boxkämpfer", 'with "quotes", commas', "日本語", "tab\there", "a", "last"]
IDS = [f"d{i}" for i in range(len(TEXTS))]
OBJECTS = [{"doc": name, "text": text} for name, text in zip(IDS, TEXTS, strict=True)]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS)


def separated(delimiter: str) -> str:
    quoted = [text.replace('"', '""') for text in TEXTS]
    rows = [f'{name}{delimiter}"{text}"\n' for name, text in zip(IDS, quoted, strict=True)]
    return f"doc{delimiter}text\n" + "".join(rows)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


TABLES = {
    "a.jsonl": JSON_LINES.encode(),
    "a.ndjson": JSON_LINES.replace("\n", "\r\n").encode(),
    "lines.json": b"\xef\xbb\xbf" + JSON_LINES.encode(),
    "array.json": json.dumps(OBJECTS).encode(),
    "pretty.json": b"\xef\xbb\xbf \n" + json.dumps(OBJECTS, indent=2, ensure_ascii=False).encode(),
    "a.csv": b"\xef\xbb\xbf" + separated(",").encode(),
    "a.tsv": separated("\t").replace("\n", "\r").encode(),
    "a.jsonl.gz": gzip.compress(JSON_LINES[:100].encode()) + gzip.compress(JSON_LINES[100:].encode()),
    "a.csv.bz2": bz2.compress(separated(",").encode()),
    "a.json.xz": lzma.compress(json.dumps(OBJECTS).encode()),
    "a.tsv.zst": zstd(separated("\t").encode()),
}
LINES = {
    "a.txt": "\n".join(TEXTS).encode(),
    "a.text": "\r\n".join(TEXTS).encode(),
    "README": "\r".join(TEXTS).encode(),  # as old Mac programs end lines
    "two-boms.txt": "".join(f"\ufeff{text}\n" for text in TEXTS).encode(),  # concatenated files
    "a.txt.zst": zstd("\n".join(TEXTS).encode()) + zstd(b"\n"),
}


@pytest.mark.parametrize("name", [*TABLES, *LINES])
def test_every_format_has_the_same_rows_and_resumes_at_each(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((TABLES | LINES)[name])
    extra = ["doc"] if name in TABLES else ["text"]
    files = expand_inputs([str(path)])
    rows = [row for row in read_rows(files, extra_columns=extra) if isinstance(row, Row)]
    assert [row.text for row in rows] == TEXTS
    assert [row.extra_values for row in rows] == [[value] for value in (IDS if name in TABLES else TEXTS)]
    for index, row in enumerate(rows):
        assert list(read_rows(files, extra_columns=extra, start=row.next_position)) == rows[index + 1 :]


def test_an_array_is_read_in_chunks(tmp_path: Path) -> None:
    """Elements that end anywhere in a chunk, and one that is longer than several."""
    texts = ["x" * length for length in (CHUNK - 40, 5, 1, *range(30), 5 * CHUNK, 3)]
    (tmp_path / "a.json").write_text(" [ " + " , ".join(json.dumps({"text": text}) for text in texts) + " ] \n")
    found = list(read_rows([str(tmp_path / "a.json")]))
    assert [row.text for row in found if isinstance(row, Row)] == texts
    (tmp_path / "empty.json").write_text("[ ]")
    assert list(read_rows([str(tmp_path / "empty.json")])) == []


BLANK = {
    "a.txt": "\n one\n\n \t\ntwo\n\n",
    "a.jsonl": '\n" one"\n\n \t\n"two"\n\n',
    "a.csv": "text\n\n one\n\n \t\ntwo\n\n",
}


@pytest.mark.parametrize("name", BLANK)
def test_blank_lines_are_counted_and_are_not_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(BLANK[name])
    progress = ReadProgress([str(path)])
    rows = [row for row in read_rows([str(path)], progress=progress) if isinstance(row, Row)]
    assert [(row.number, row.text) for row in rows] == [(0, " one"), (1, "two")]
    assert progress.blank_lines == 4
    progress = ReadProgress([str(path)])
    assert len(list(read_rows([str(path)], start=rows[0].next_position, progress=progress))) == 1
    assert progress.blank_lines == 3  # those after the rows that an earlier run has read


# Faults of a file, which raise also where invalid rows are skipped: the name, the contents, and the message.
DAMAGED = {
    "utf-16.txt": ("one\ntwo\n".encode("utf-16"), r"not UTF-8 \(it has NUL bytes\): '.*utf-16.txt' line 1; convert"),
    "utf-16-le.csv": ("text\none\n".encode("utf-16-le"), r"not UTF-8 \(it has NUL bytes\)"),
    "utf-16.json": ('[{"text": "日"}]'.encode("utf-16"), "not UTF-8|not JSON"),
    "utf-32.jsonl": ('"one"\n'.encode("utf-32"), "not UTF-8"),
    "latin-1.txt": ("ja\nnein\nZürich\n".encode("latin-1"), r"byte 0xfc at character 2\): '.*' line 3; convert"),
    "latin-1.csv": ("text\nZürich\n".encode("latin-1"), r"byte 0xfc at character 2\): '.*' line 2"),
    "latin-1.json": ('[{"text": "Zürich"}]'.encode("latin-1"), r"byte 0xfc at character 13\): '.*json'; convert"),
    "zip.txt": (b"PK\x03\x04\x14\x00\x00\x00", "not UTF-8"),
    "open-quote.csv": (b'text\nrow\n"a stray quote\nrow\nrow\n', r"not CSV \(unexpected end .*lines 3 to 5; close"),
    "cut.csv": (b'id,text\n1,"one"\n2,"tw', r"not CSV \(unexpected end of data\): '.*' lines 3 to 3"),
    "closed-later.csv": (b'text\n"a stray quote\nrow\n"a" b\n', "not CSV .* lines 2 to 4; close the quote"),
    "open-header.csv": (b'"text\nrow\n', "not CSV .* lines 1 to 2"),
    "twice.csv": (b"text,text\nfirst,x\n", "two columns are named 'text'"),
    "cut.json": (b'[{"text": "one"}, {"text": "tw', "not JSON"),
    "no-comma.json": (b'[{"text": "one"} {"text": "two"}]', "not JSON .no comma"),
    "two.json": (b'[{"text": "one"}]\n[{"text": "two"}]', "not JSON .text after the array"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "cut.txt.bz2": (bz2.compress(b"one\n" * 999)[:-9], "cannot be read"),
    "cut.txt.xz": (lzma.compress(b"one\n" * 999)[:-9], "cannot be read"),
    "flipped.txt.xz": (lzma.compress(b"one\n" * 999)[:-9] + b"123456789", "cannot be read"),
    "cut.txt.zst": (zstd(b"one\n" * 999)[:-2], "cannot be read"),
    "plain.txt.gz": (b"one\n", "Not a gzipped file"),
    "cut.parquet": (b"PAR1 and no more", "not a Parquet file"),
    "zero.txt": (b"\0" * 5000, "NUL bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_rows(expand_inputs([str(tmp_path / name)])))
    assert name in str(caught.value) and len(str(caught.value)) < 400


# Faults of a row: the file, the contents between two valid rows, and the message.
INVALID = {
    "quote.csv": ("é,text\n,fine\n", '"a" b,c\n', ",fine\n", "quote the whole field"),
    "quote.tsv": ("é\ttext\n\tfine\n", '"a" b\tc\n', "\tfine\n", "quote the whole field"),
    "twice.jsonl": ('"fine"\n', '{"text": "a", "text": "b"}\n', '"fine"\n', "two fields have the same name"),
    "number.json": ('["fine",\n', "12,\n", '"fine"]\n', "element 2"),
    "surrogate.json": ('["fine",\n', '{"text": "\\ud800"},\n', '"fine"]\n', "lone surrogate U\\+D800 at character 1"),
    "latin-1.txt": ("\ufefffine\n", "Z\udcfcrich\n", "fine\n", "byte 0xfc at character 2"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_row_is_rejected_alone(name: str, tmp_path: Path) -> None:
    *content, message = INVALID[name]
    (tmp_path / name).write_bytes("".join(content).encode("utf-8", "surrogateescape"))
    first, rejected, last = read_rows([str(tmp_path / name)])
    assert isinstance(first, Row) and isinstance(last, Row) and first.text == last.text == "fine"
    assert isinstance(rejected, RejectedRow)
    with pytest.raises(InputError, match=message):
        raise InputError(rejected.error)


@pytest.mark.parametrize("name", ["a.md", "a.html", "a.log", "a.pdf", "a.docx", "a.pq", "a.txt.zip", "a.npy"])
def test_an_unknown_ending_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# markup\n")
    for inputs in ([str(tmp_path / name)], [str(tmp_path / "a.*")]):
        with pytest.raises(InputError, match=f"unknown ending: '.*{name}'; the formats are .*standard input"):
            expand_inputs(inputs)
    with pytest.raises(InputError, match="unknown ending"):
        list(read_rows([str(tmp_path / name)]))


def test_a_folder_says_how_many_files_of_which_kind_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt.gz", "c.json", "d.md", "e.md", "LICENSE", "_SUCCESS", "f.parquet.gz"):
        (folder / name).touch()
    (folder / "linked").symlink_to(tmp_path)
    with caplog.at_level(logging.INFO, "unpadded"):
        files = expand_inputs([str(folder)])
        matching = expand_inputs([str(folder / "[a-c]*")])
    assert [os.path.relpath(name, folder) for name in files] == ["a.txt", "c.json", "deep/b.txt.gz"]
    assert [os.path.basename(name) for name in matching] == ["a.txt", "c.json"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 1 .json, 2 .txt; left out: 1 .gz, 2 .md, 1 hidden, 1 linked folders, 1 without ending",
        f"{folder}/[a-c]*: 1 .json, 1 .txt",
    ]


@pytest.mark.parametrize("pattern", ["", "/*/*.txt", "/**/*.txt"])
def test_what_cannot_be_read_in_a_folder_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/a.txt").touch()
    (tmp_path / "closed/b.txt").touch()
    scandir, access = os.scandir, os.access

    def closed_folder(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"'.*closed' \(Permission denied\)"):
        patch.setattr(os, "scandir", closed_folder)
        expand_inputs([f"{tmp_path}{pattern}"])
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"'.*b.txt' \(Permission denied\)"):
        patch.setattr(os, "access", lambda path, mode: not path.endswith("b.txt") and access(path, mode))
        expand_inputs([f"{tmp_path}{pattern}"])


def test_special_files_in_a_folder_are_errors(tmp_path: Path) -> None:
    loop, fifo, long = tmp_path / "loop.txt", tmp_path / "fifo.txt", tmp_path / ("x" * 300 + ".txt")
    loop.symlink_to(loop)
    for name, reason in ((tmp_path, "symbolic link"), (loop, "symbolic link"), (long, "name too long")):
        with pytest.raises(InputError, match=f"(?i){reason}"):
            expand_inputs([str(name)])
    loop.unlink()
    os.mkfifo(fifo)
    with pytest.raises(InputError, match=r"not a regular file: '.*fifo.txt'"):
        expand_inputs([str(tmp_path)])
    assert expand_inputs([str(fifo)]) == [str(fifo)]


TEXT_COLUMN = pa.array(["first", "second", None, "first"])
NESTED = pa.array([{"b": "x"}] * 4)


def test_text_columns_of_every_arrow_type_are_read(tmp_path: Path) -> None:
    path = str(tmp_path / os.fsdecode(b"n\xffme.parquet"))
    for column in (
        TEXT_COLUMN.dictionary_encode(),
        TEXT_COLUMN.cast(pa.string_view()),
        TEXT_COLUMN.cast(pa.large_string()),
    ):
        table = pa.table({"text": column, "a.b": ["1", "2", "3", "4"], "a": NESTED, "also": column})
        with open(path, "wb") as file:
            pq.write_table(table, file, row_group_size=3)
        rows = list(read_rows([path], extra_columns=["a.b", "a", "also"]))
        values = [[row.text, *row.extra_values] for row in rows if isinstance(row, Row)]
        texts = (("first", "1"), ("second", "2"), ("first", "4"))
        assert values == [[text, number, {"b": "x"}, text] for text, number in texts]
        kinds = column_types([path], ["also", "a"])
        assert kinds[1] == NESTED.type and not pa.types.is_dictionary(kinds[0])
        assert pa.array([value[3] for value in values], kinds[0]).to_pylist() == ["first", "second", "first"]


def test_parquet_columns_that_cannot_be_told_apart_are_errors(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    number = pa.array([1, 2, 3, 4])
    pq.write_table(pa.Table.from_arrays([TEXT_COLUMN, number, number, NESTED], names=["text", "id", "id", "n"]), path)
    for read in (lambda: list(read_rows([path], extra_columns=["id"])), lambda: column_types([path], ["id"])):
        with pytest.raises(InputError, match="two columns are named 'id'"):
            read()
    for column, message in (("n.b", "no column 'n.b'"), ("n", "'n' of '.*' is struct<b: string>"), ("x", "no column")):
        with pytest.raises(InputError, match=message):
            list(read_rows([path], column))


def test_flipped_bits_of_parquet_never_change_a_text(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [f"text number {i} {'word ' * (i % 9)}" for i in range(200)]
    file, path = io.BytesIO(), tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), file, row_group_size=64, compression="zstd", write_page_checksum=True)
    content = file.getvalue()
    errors = 0
    first_page_header = range(8 * 4, 8 * 40)  # page headers have no checksum
    for bit in (*first_page_header, *draw.sample(range(8 * len(content)), 200)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert [row.text for row in read_rows([str(path)]) if isinstance(row, Row)] == texts
        except InputError as error:
            errors += 1
            assert str(path) in str(error) and len(str(error)) < 600
    assert errors > 250
