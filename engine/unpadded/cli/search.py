"""`unpadded search`: find the texts whose vectors are nearest to a question's, among files that `embed` wrote."""

from __future__ import annotations

import argparse
import heapq
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from unpadded.cli.flags import Commands, add_flags, add_model, add_model_arguments, load
from unpadded.cli.terminal import say
from unpadded.errors import InputError, OptionError
from unpadded.options import EncodeOptions, describe

QUESTION_TASKS = {  # of the texts -> of a question about them
    "search_document": "search_query",
    "document": "query",
    "passage": "query",
    "retrieval.passage": "retrieval.query",
}
FIELDS = {"model", "model_sha256_of_samples", "settings", "column"}  # of a description
CHUNK_ROWS = 4096
TEXT_CHARACTERS = 300
EPILOG = """\
examples:
  unpadded embed corpus/ -m ./model -t search_document --carry text -o vectors/
  unpadded search vectors/ "How do tides form?" -m ./model --top 5
"""


class Hit(NamedTuple):
    score: float  # cosine
    id: Any
    text: str | None


def add_command(commands: Commands) -> None:
    """Add the command `unpadded search`."""
    search = commands.add_parser(
        "search",
        help="search vectors that embed wrote",
        description="Print the texts nearest to a question, best first: the cosine, the id, the text. Every vector is\n"
        "compared. VECTORS are .parquet files, folders of them (embed with --carry text) and .npy files, whose texts\n"
        "are read from the inputs of embed. Vectors of another model are an error.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search.set_defaults(command=run)
    search.add_argument("vectors", nargs="+", metavar="VECTORS", help="a .parquet or .npy file, or a folder")
    search.add_argument("question", metavar="QUESTION")
    add_model(search, "-m", "--model")
    search.add_argument("--top", type=int, default=10, metavar="N", help="number of texts (default: 10)")
    options = [option for option in describe(EncodeOptions) if option.name in ("task", "prompt")]
    add_flags(search.add_argument_group("embedding the question (default: to match the texts)"), options)
    add_model_arguments(search)


def run(args: argparse.Namespace) -> None:
    """Print the nearest texts."""
    import numpy as np

    from unpadded.bulk.manifest import describe_vectors

    if args.top < 1:
        raise OptionError(f"--top is not positive: {args.top}; pass the number of texts to print")
    files = [file for name in args.vectors for file in _files(name)]
    descriptions = {file: _description(file) for file in files}
    engine = load(args)
    own = describe_vectors(engine, {})["model_sha256_of_samples"]
    queries: dict[str, Any] = {}
    best: list[Hit] = []
    for file, found in descriptions.items():
        if found["model_sha256_of_samples"] != own:
            raise InputError(
                f"the vectors are of another model: {file!r} has those of {found['model']!r}, and {args.model!r} has "
                "other files; pass that model with -m"
            )
        settings = _question_settings(found["settings"], args)
        key = json.dumps(settings, sort_keys=True)
        if key not in queries:
            vector = engine.embed(args.question, show_progress=False, **settings).vectors[0]
            queries[key] = vector / np.linalg.norm(vector)
        best = heapq.nlargest(args.top, [*best, *_hits(file, found, queries[key], args.top)], key=lambda hit: hit.score)
    for hit in best:
        text = "" if hit.text is None else " ".join(hit.text.split())
        print(f"{hit.score:.4f}  {hit.id}  {text[:TEXT_CHARACTERS]}".rstrip())
    if any(hit.text is None for hit in best):
        say("some vectors have no texts; embed with --carry text to print them")


def _question_settings(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a question for texts that were embedded with `settings`."""
    if settings.get("precision", "float32") not in ("float32", "float16"):
        raise InputError(f"a search needs float32 or float16 vectors: these are {settings['precision']!r}; embed again")
    task: Any = settings.get("task")
    found = {"task": QUESTION_TASKS.get(task, task), "precision": "float32"}
    if args.task is not None or args.prompt is not None:
        found |= {"task": args.task, "prompt": args.prompt}
    return settings | found


def _files(name: str) -> list[str]:
    from unpadded.bulk.dataset_output import MANIFEST
    from unpadded.bulk.file_output import import_pyarrow
    from unpadded.bulk.manifest import read_manifest

    if not name.lower().endswith(".npy"):
        import_pyarrow(f"reading {name!r}")
    if os.path.isdir(name):
        manifest = Path(name, MANIFEST)
        if manifest.exists() and not read_manifest(manifest, name)["finished"]:
            say(f"the job that writes {name!r} is not finished; texts of its other parts are not found")
        found = sorted(str(path) for path in Path(name).glob("*.parquet") if not path.name.startswith((".", "_")))
        if not found:
            raise InputError(f"the folder has no .parquet: {name!r}; pass a folder that unpadded embed wrote")
        return found
    if not name.lower().endswith((".parquet", ".npy")):
        raise InputError(f"the vectors have an unknown ending: {name!r}; pass .parquet, .npy, or a folder")
    return [name]


def _description(file: str) -> dict[str, Any]:
    """Return what `embed` wrote about the vectors of a file."""
    from unpadded.bulk.file_output import DESCRIPTION_ENDING
    from unpadded.bulk.parquet_reader import open_parquet
    from unpadded.bulk.rows import unreadable
    from unpadded.bulk.writers import DESCRIPTION_KEY

    try:
        if file.lower().endswith(".npy"):
            found = json.loads(Path(file + DESCRIPTION_ENDING).read_bytes())
        else:
            with open_parquet(file) as parquet:
                found = json.loads((parquet.schema_arrow.metadata or {}).get(DESCRIPTION_KEY.encode(), b"null"))
    except OSError as error:
        raise unreadable(error.filename or file, error) from error
    except InputError:
        raise
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or not found.keys() >= FIELDS:
        raise InputError(f"the vectors do not say which model made them: {file!r}; embed the texts again")
    if (result := found.get("result", "vectors")) != "vectors":
        raise InputError(f"a search needs one vector per text: {file!r} has {result}; embed without --{result}")
    return found


def _hits(file: str, description: dict[str, Any], query: Any, top: int) -> Iterator[Hit]:
    """Yield the best rows of each chunk of a file."""
    import numpy as np

    from unpadded.bulk.parquet_reader import open_parquet
    from unpadded.bulk.rows import check_columns, unreadable

    def nearest(vectors: Any) -> Iterator[tuple[int, float]]:
        rows = np.asarray(vectors, np.float32)
        if rows.ndim != 2 or rows.shape[1] != len(query):
            raise InputError(f"the vectors do not have {len(query)} dimensions: {file!r} has {rows.shape}; embed again")
        norms = np.linalg.norm(rows, axis=1)
        scores = rows @ query / np.where(norms, norms, 1)
        for row in np.argsort(-scores, kind="stable")[:top]:
            yield int(row), float(scores[row])

    if file.lower().endswith(".npy"):
        try:
            stored = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(file, error) from error
        chunks = range(0, len(stored), CHUNK_ROWS)
        rows = [(score, start + row) for start in chunks for row, score in nearest(stored[start : start + CHUNK_ROWS])]
        best = heapq.nlargest(top, rows, key=lambda found: found[0])
        texts = _input_texts(description, {row for _, row in best})
        yield from (Hit(score, row, texts.get(row)) for score, row in best)
        return
    text_column = description["column"]
    with open_parquet(file) as parquet:
        names = parquet.schema_arrow.names
        columns = ["id", "embedding", *([text_column] if text_column in names else [])]
        check_columns(file, columns, names)
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=columns):
            if not len(batch):
                continue
            vectors = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            for row, score in nearest(vectors):
                text = batch.column(text_column)[row].as_py() if text_column in columns else None
                yield Hit(score, batch.column("id")[row].as_py(), text)


def _input_texts(description: dict[str, Any], rows: set[int]) -> dict[int, str]:
    """Return the texts of rows of an .npy from the files that were embedded, if they are unchanged."""
    from unpadded.bulk import Row, read_rows
    from unpadded.bulk.manifest import describe_input

    inputs = description.get("inputs", [])
    for entry in inputs:
        name = entry["path"]
        if not os.path.isfile(name) or describe_input(name) != entry:
            say(f"the texts are not shown, because an input is missing or changed: {name!r}")
            return {}
    if not inputs or not rows:
        return {}
    read = read_rows([entry["path"] for entry in inputs], description["column"])
    texts = (row.text for row in read if isinstance(row, Row))
    return {number: text for number, text in enumerate(islice(texts, max(rows) + 1)) if number in rows}
