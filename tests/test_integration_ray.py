"""Ray Data and Ray Serve on a real cluster of this machine, whose processes are killed in the middle of the work."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or Ray writes a token into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import MINILM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, of pydantic
    import ray
    import ray.data
    import ray.serve
    from ray.serve.context import _get_global_client

import unpadded
from unpadded.cli.main import main
from unpadded.integrations.ray import UnpaddedEmbedder, serve
from unpadded.integrations.ray_job import readable
from unpadded.integrations.ray_serve import QueuedTokens

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray has warnings of its own

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
TEXTS = [" ".join(WORDS[start : start + 3 + start % 17]) for start in range(600)]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster on this machine."""
    folder = tempfile.mkdtemp(prefix="ray")  # pytest's own are too long for its sockets
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, _temp_dir=folder
        )
        yield context.address_info["address"]
        ray.serve.shutdown()
        ray.shutdown()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def engine():
    return unpadded.load(MINILM, device="cpu")


@pytest.fixture
def corpus(tmp_path):
    """TEXTS in three files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = pa.table({"doc": [f"d{i:03}" for i in range(600)], "text": TEXTS, "year": list(range(600))})
    for part in range(3):
        pq.write_table(table.slice(part * 200, 200), folder / f"{part}.parquet", row_group_size=64)
    return folder


def vectors_of(column):
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert pa.types.is_fixed_size_list(column.type)
    return column.flatten().to_numpy().reshape(len(column), -1)


def test_the_class_takes_both_formats(engine):
    embedder = UnpaddedEmbedder(MINILM, device="cpu", max_length=8, column="body", dimensions=64, precision="float16")
    expected = unpadded.load(MINILM, device="cpu", max_length=8).embed(TEXTS[:9], dimensions=64, precision="float16")
    table = embedder(pa.table({"body": TEXTS[:9], "n": range(9)}))
    assert table.column_names == ["body", "n", "embedding", "tokens", "truncated"]
    arrays = embedder({"body": np.array(TEXTS[:9], object), "n": np.arange(9)})
    assert list(arrays) == table.column_names
    for found in (table, arrays):
        assert np.array_equal(vectors_of(found["embedding"]), expected.vectors)
        assert found["tokens"].to_pylist() == expected.token_counts.tolist()
        assert found["truncated"].to_pylist() == expected.truncated.tolist()
    assert 0 < expected.truncated.sum() < 9
    assert embedder(table.slice(0, 0).select(["body"]))["embedding"].type == pa.list_(pa.float16(), 64)
    named = UnpaddedEmbedder(MINILM, device="cpu", column="body", output="v", tokens=None, truncated=None)(table)
    assert named.column_names == [*table.column_names, "v"]


def test_the_class_refuses_what_would_be_silently_wrong():
    with pytest.raises(unpadded.OptionError, match="without ranges"):
        UnpaddedEmbedder(MINILM, device="cpu", precision="int8")
    with pytest.raises(TypeError, match="dimension"):
        UnpaddedEmbedder(MINILM, device="cpu", dimension=64)
    embedder = UnpaddedEmbedder(MINILM, device="cpu")
    with pytest.raises(unpadded.InputError, match="no column 'text': the dataset has 'body'"):
        embedder({"body": np.array(["a"], object)})
    with pytest.raises(unpadded.OptionError, match="twice: 'tokens'"):
        embedder(pa.table({"text": ["a"], "tokens": [1]}))
    with pytest.raises(unpadded.OptionError, match="DataFrame"):
        embedder(pa.table({"text": ["a"]}).to_pandas())


def test_an_actor_killed_in_the_middle_loses_no_row(cluster, engine, tmp_path):
    done = tmp_path / "done"
    done.mkdir()

    class Mortal(UnpaddedEmbedder):
        """Dies once: on the job's fifth batch, when it is embedded and not handed over."""

        def __call__(self, batch):
            found = super().__call__(batch)
            number = len(list(done.iterdir()))
            (done / f"{os.getpid()}-{number}").touch()
            if number >= 4:
                try:
                    (done / "killed").touch(exist_ok=False)
                except FileExistsError:
                    return found
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    blocks = [
        pa.table({"n": range(start, start + 50), "text": TEXTS[start : start + 50]}) for start in range(0, 600, 50)
    ]
    embedded = ray.data.from_arrow(blocks).map_batches(
        Mortal,
        fn_constructor_args=[str(MINILM)],
        fn_constructor_kwargs={"device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    table = pa.concat_tables(ray.get(embedded.to_arrow_refs())).sort_by("n")
    assert table["text"].to_pylist() == TEXTS
    assert np.array_equal(vectors_of(table["embedding"]), engine.encode(TEXTS))
    assert (done / "killed").exists()
    assert len({path.name.partition("-")[0] for path in done.iterdir()} - {"killed"}) >= 2


def test_embed_on_ray_writes_what_embed_writes(cluster, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(MINILM, tmp_path)
    flags = ["-m", model, "--device", "cpu", "--id-column", "doc", "--carry", "year", "--precision", "float16"]
    assert main(["embed", "corpus", *flags, "-o", "here/"]) == 0
    command = [sys.executable, "-m", "unpadded", "embed", "corpus", *flags, "-o", "there/", "--ray", cluster]
    ran = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "unpadded: 600 texts" in ran.stderr
    here, there = pq.read_table("here"), pq.read_table("there").sort_by("id")
    assert there.schema.remove_metadata().equals(here.schema.remove_metadata())
    assert there.equals(here)
    assert main(["embed", "corpus", *flags, "-o", "there/", "--ray", cluster]) == 2
    assert "the output folder is not empty" in capsys.readouterr().err
    assert main(["embed", "corpus", *flags, "--column", "body", "-o", "more/", "--ray", cluster]) == 2
    assert "no column 'body': the input has 'doc', 'text', 'year'; name one of them" in capsys.readouterr().err
    assert main(["embed", "nowhere", *flags, "-o", "more/", "--ray", cluster]) == 2
    assert "the inputs cannot be read" in capsys.readouterr().err


def test_an_error_of_ours_comes_out_of_rays_traceback(cluster):
    @ray.remote(num_cpus=0)
    def fail(error):
        raise error

    for error, expected in [
        (unpadded.InputError("text 3 is null: None; give a string"),) * 2,
        (
            ZeroDivisionError("by 0"),
            unpadded.OutputError("the Ray job failed: ZeroDivisionError: by 0; its log says more"),
        ),
    ]:
        with pytest.raises(ray.exceptions.RayError) as raised:
            ray.get(fail.remote(error))
        found = readable(raised.value)
        assert type(found) is type(expected) and str(found) == str(expected)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-o", "out/", "--id-column", "doc", "--resume"], "--resume is not supported with --ray"),
        (["-o", "out/", "--id-column", "doc", "--part-rows", "9"], "--part-rows is not supported with --ray"),
        (["-o", "out/", "--id-column", "doc", "--on-error", "skip"], "--on-error skip is not supported with --ray"),
        (["-o", "out.npy", "--id-column", "doc"], "--ray writes a folder, not 'out.npy'"),
        (["--id-column", "doc"], "--ray writes a folder, not 'stdout'"),
        (["-o", "out/"], "name a column with --id-column"),
        (["-o", "out/", "--id-column", "doc", "--carry", "tokens"], "twice: 'tokens'"),
        (["notes.txt", "-o", "out/", "--id-column", "doc"], "--ray reads Parquet only: 'notes.txt'"),
    ],
)
def test_what_does_not_go_with_ray_is_refused(flags, says, capsys):
    inputs = [] if flags[0].endswith(".txt") else ["corpus"]
    assert main(["embed", *inputs, *flags, "-m", str(MINILM), "--ray", "local"]) == 2
    assert says in capsys.readouterr().err


def replicas():
    """Process ids of the running replicas."""
    details = _get_global_client().get_serve_details()["applications"]["default"]["deployments"]["unpadded"]
    return {replica["pid"] for replica in details["replicas"] if replica["state"] == "RUNNING"}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_serve_grows_under_load_and_loses_no_answer_with_a_replica(cluster, engine):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.serve.start(http_options={"port": port})
    arguments = {"model": os.path.relpath(MINILM), "device": "cpu", "alias": "text-embedding-3-small", "grace": "20"}
    arguments |= {"max_replicas": "2", "queued_tokens": "1", "scale_up_seconds": "0.1", "max_inputs": "700"}
    ray.serve.run(serve(arguments), route_prefix="/")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=8)

    def embed(start, texts=20):
        answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS[start : start + texts])
        return np.array([item.embedding for item in answer.data], np.float32)

    expected = engine.encode(TEXTS)
    assert np.array_equal(embed(0), expected[:20])
    (first,) = replicas()
    with ThreadPoolExecutor(8) as clients:
        loaded = True

        def keep_asking(start):
            answers = 0
            while loaded:
                assert np.array_equal(embed(start), expected[start : start + 20])
                answers += 1
                time.sleep(0.02)  # leaves the processor to the replica that starts
            return answers

        asking = [clients.submit(keep_asking, 20 * number) for number in range(8)]
        try:
            wait_for(lambda: len(replicas()) == 2)
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: len(replicas() - {first}) == 2)
        finally:
            loaded = False
        assert all(future.result() > 1 for future in asking)
        last = clients.submit(embed, 0, 600)
        time.sleep(0.2)
        ray.serve.delete("default")  # returns when the replicas are gone
        assert np.array_equal(last.result(), expected)


def test_serve_reads_arguments_as_flags():
    with pytest.raises(unpadded.OptionError, match="port is not the application's: 80"):
        serve({"model": "x", "port": 80})
    with pytest.raises(unpadded.OptionError, match="max_replicas is below replicas: 1 and 2"):
        serve({"model": "x", "replicas": 2, "max_replicas": 1})
    with pytest.raises(unpadded.OptionError, match="--long-input"):
        serve({"model": "x", "long_input": "nothing"})
    with pytest.raises(unpadded.OptionError, match="--modle"):
        serve({"model": "x", "modle": "y"})
    with pytest.raises(unpadded.OptionError, match="--model"):
        serve({})


def test_replicas_are_counted_by_queued_tokens():
    context = argparse.Namespace(aggregated_metrics={"queued_tokens": {"a": 300.0, "b": 50.0}})
    assert QueuedTokens(100)(context) == (3.5, {})
    assert QueuedTokens(100)(argparse.Namespace(aggregated_metrics=None)) == (0.0, {})
