"""Ray Data and Ray Serve on a real cluster on this machine, some of whose processes are killed at work."""

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
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
from support.serving import HANG_SECONDS, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray emits warnings about pydantic
    import ray
    import ray.data
    import ray.serve
    from ray.serve.context import _get_global_client

import unpadded
from unpadded.cli.main import main
from unpadded.integrations.ray import UnpaddedEmbedder, serve
from unpadded.integrations.ray_job import original_error
from unpadded.integrations.ray_serve import QueuedTokensPolicy
from unpadded.options import LoadOptions

pytestmark = pytest.mark.filterwarnings("default")  # Ray emits warnings

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
TEXTS = [" ".join(WORDS[start : start + 3 + start % 17]) for start in range(600)]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster on this machine, one for all tests. Tests that use it are slow."""
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


@pytest.fixture
def corpus(tmp_path):
    """TEXTS in three files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    table = pa.table({"doc": [f"d{i:03}" for i in range(600)], "text": TEXTS, "year": list(range(600))})
    for part in range(3):
        pq.write_table(table.slice(part * 200, 200), folder / f"{part}.parquet", row_group_size=64)
    return folder


def read_vectors(column):
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert pa.types.is_fixed_size_list(column.type)
    return column.flatten().to_numpy().reshape(len(column), -1)


def test_the_class_embeds_both_batch_formats():
    embedder = UnpaddedEmbedder(MINILM, device="cpu", max_length=8, column="body", dimensions=64, precision="float16")
    expected = unpadded.load(MINILM, device="cpu", max_length=8).embed(TEXTS[:9], dimensions=64, precision="float16")
    table = embedder(pa.table({"body": TEXTS[:9], "n": range(9)}))
    assert table.column_names == ["body", "n", "embedding", "tokens", "truncated"]
    arrays = embedder({"body": np.array(TEXTS[:9], object), "n": np.arange(9)})
    assert list(arrays) == table.column_names
    for found in (table, arrays):
        assert np.array_equal(read_vectors(found["embedding"]), expected.vectors)
        assert found["tokens"].to_pylist() == expected.token_counts.tolist()
        assert found["truncated"].to_pylist() == expected.truncated.tolist()
    assert 0 < expected.truncated.sum() < 9
    assert embedder(table.slice(0, 0).select(["body"]))["embedding"].type == pa.list_(pa.float16(), 64)
    named = UnpaddedEmbedder(MINILM, device="cpu", column="body", output="v", tokens=None, truncated=None)(table)
    assert named.column_names == [*table.column_names, "v"]


def test_the_class_raises_for_wrong_options_and_batches():
    with pytest.raises(unpadded.OptionError, match="without ranges"):
        UnpaddedEmbedder(MINILM, device="cpu", precision="int8")
    with pytest.raises(unpadded.OptionError, match="dimension is not an option"):
        UnpaddedEmbedder(MINILM, device="cpu", dimension=64)
    embedder = UnpaddedEmbedder(MINILM, device="cpu")
    with pytest.raises(unpadded.InputError, match="no column 'text': the dataset has 'body'"):
        embedder({"body": np.array(["a"], object)})
    with pytest.raises(unpadded.OptionError, match=r"'tokens' already .*pass another name"):
        embedder(pa.table({"text": ["a"], "tokens": [1]}))
    with pytest.raises(unpadded.OptionError, match=r"DataFrame.*batch_format='pyarrow'"):
        embedder(pa.table({"text": ["a"]}).to_pandas())


@pytest.mark.slow
def test_a_killed_actor_loses_no_row(cluster, minilm_engine, tmp_path):
    done = tmp_path / "done"
    done.mkdir()

    class KilledOnce(UnpaddedEmbedder):
        """Killed once, after embedding the fifth batch of the job and before returning it."""

        def __call__(self, batch):
            embedded = super().__call__(batch)
            number = len(list(done.iterdir()))
            (done / f"{os.getpid()}-{number}").touch()
            if number >= 4:
                try:
                    (done / "killed").touch(exist_ok=False)
                except FileExistsError:
                    return embedded
                os.kill(os.getpid(), signal.SIGKILL)
            return embedded

    blocks = [
        pa.table({"n": range(start, start + 50), "text": TEXTS[start : start + 50]}) for start in range(0, 600, 50)
    ]
    embedded = ray.data.from_arrow(blocks).map_batches(
        KilledOnce,
        fn_constructor_args=[str(MINILM)],
        fn_constructor_kwargs={"device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    table = pa.concat_tables(ray.get(embedded.to_arrow_refs())).sort_by("n")
    assert table["text"].to_pylist() == TEXTS
    assert np.array_equal(read_vectors(table["embedding"]), minilm_engine.encode(TEXTS))
    assert (done / "killed").exists()
    assert len({path.name.partition("-")[0] for path in done.iterdir()} - {"killed"}) >= 2


@pytest.mark.slow
def test_embed_writes_the_same_with_ray(cluster, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(MINILM, tmp_path)
    flags = ["-m", model, "--device", "cpu", "--id-column", "doc", "--carry", "year", "--precision", "float16"]
    assert main(["embed", "corpus", *flags, "-o", "here/"]) == 0
    command = [sys.executable, "-m", "unpadded", "embed", "corpus", *flags, "-o", "there/", "--ray", cluster]
    environment = {**os.environ, **ENVIRONMENT}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ran.returncode == 0, ran.stderr
    assert "unpadded: 600 texts" in ran.stderr
    here, there = pq.read_table("here"), pq.read_table("there").sort_by("id")
    assert there.schema.remove_metadata().equals(here.schema.remove_metadata())
    assert there.equals(here)
    assert main(["embed", "corpus", *flags, "-o", "there/", "--ray", cluster]) == 2
    assert "the output folder is not empty" in capsys.readouterr().err
    assert main(["embed", "corpus", *flags, "--column", "body", "-o", "more/", "--ray", cluster]) == 2
    assert "no column 'body': the input has 'doc', 'text', 'year'; pass one of them" in capsys.readouterr().err
    assert main(["embed", "nowhere", *flags, "-o", "more/", "--ray", cluster]) == 2
    assert "the inputs cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_original_error_is_read_from_rays_traceback(cluster):
    @ray.remote(num_cpus=0)
    def fail(error):
        raise error

    for error, expected in [
        (unpadded.InputError("text 3 is null: None; pass a string"),) * 2,
        (
            ZeroDivisionError("by 0"),
            unpadded.OutputError("the Ray job failed: ZeroDivisionError: by 0; see Ray's log"),
        ),
    ]:
        with pytest.raises(ray.exceptions.RayError) as raised:
            ray.get(fail.remote(error))
        found = original_error(raised.value)
        assert type(found) is type(expected) and str(found) == str(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "out/", "--id-column", "doc", "--resume"], "--resume is "),
        (["-o", "out/", "--id-column", "doc", "--part-rows", "9"], "--part-rows is "),
        (["-o", "out/", "--id-column", "doc", "--on-error", "skip"], "--on-error skip is "),
        (["-o", "out.npy", "--id-column", "doc"], "not 'out.npy'; pass one as -o vectors/"),
        (["--id-column", "doc"], "not 'stdout'; pass one as -o vectors/"),
        (["-o", "out/"], "pass --id-column"),
        (["-o", "out/", "--id-column", "doc", "--carry", "tokens"], "twice: 'tokens'"),
        (["notes.txt", "-o", "out/", "--id-column", "doc"], "--ray reads only Parquet: 'notes.txt'"),
    ],
)
def test_flags_that_ray_does_not_support_raise(flags, message, capsys):
    inputs = [] if flags[0].endswith(".txt") else ["corpus"]
    assert main(["embed", *inputs, *flags, "-m", str(MINILM), "--ray", "local"]) == 2
    assert message in capsys.readouterr().err


def replicas():
    """Return the process ids of the running replicas."""
    details = _get_global_client().get_serve_details()["applications"]["default"]["deployments"]["unpadded"]
    return {replica["pid"] for replica in details["replicas"] if replica["state"] == "RUNNING"}


def free_port():
    """Return a port that no program listens on, below those that the system gives to programs that let it choose."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def queued_tokens(port):
    """Return the tokens that wait in one of the replicas."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_SECONDS) as response:
        return float(re.search(rb"^unpadded_queued_tokens (\S+)", response.read(), re.MULTILINE)[1])


@pytest.mark.slow
def test_serve_scales_up_and_answers_all_requests_when_a_replica_is_killed(cluster, minilm_engine):
    port = free_port()
    ray.serve.start(http_options={"port": port})
    arguments = {"model": os.path.relpath(MINILM), "device": "cpu", "alias": "text-embedding-3-small", "grace": "600"}
    arguments |= {"max_replicas": "2", "queued_tokens": "1", "scale_up_seconds": "0.1", "max_inputs": "700"}
    ray.serve.run(serve(arguments), route_prefix="/")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=8)

    def embed(start, texts=20):
        answer = client.embeddings.create(model="text-embedding-3-small", input=TEXTS[start : start + texts])
        return np.array([item.embedding for item in answer.data], np.float32)

    expected = minilm_engine.encode(TEXTS)
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
            wait_until(lambda: len(replicas()) == 2)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: len(replicas() - {first}) == 2)
        finally:
            loaded = False
        assert all(future.result() > 1 for future in asking)
        last = clients.submit(embed, 0, 600)
        wait_until(lambda: last.done() or queued_tokens(port))
        ray.serve.delete("default")  # returns when the replicas are gone
        assert np.array_equal(last.result(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": 80}, "port is .*: 80; set it in Ray Serve's http_options"),
        ({"replicas": 2, "max_replicas": 1}, "max_replicas is below replicas: 1 and 2"),
        ({"replicas": "two"}, "replicas is not a number: 'two'; pass one such as 1"),
        ({"max_length": "long"}, "max_length is not a number: 'long'"),
        ({"long_input": "nothing"}, "long_input is unknown: 'nothing'; use one of truncate"),
        ({"modle": "y"}, "option is unknown: modle='y'"),
    ],
)
def test_serve_raises_for_wrong_arguments(arguments, message):
    with pytest.raises(unpadded.OptionError, match=message):
        serve({"model": "x", **arguments})


def test_serve_needs_a_model():
    with pytest.raises(unpadded.OptionError, match="pass model="):
        serve({})


def test_serve_converts_strings():
    strings = {"model": "owner/model", "device": "cpu", "max_length": "64", "token_budget": "auto", "alias": "a"}
    strings |= {"rotary_scaling_factor": "none", "batch_invariant": "true", "deadline": "5", "num_gpus": "0.5"}
    deployment = serve(strings)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 0.5}
    model, load_options, server_options = deployment.init_args
    assert model == "owner/model"
    assert load_options == LoadOptions(
        device="cpu", max_length=64, token_budget="auto", rotary_scaling_factor=None, batch_invariant=True
    )
    assert (server_options.alias, server_options.deadline) == (("a",), 5.0)


def test_the_policy_divides_the_queued_tokens():
    context = argparse.Namespace(aggregated_metrics={"queued_tokens": {"a": 300.0, "b": 50.0}})
    assert QueuedTokensPolicy(100)(context) == (3.5, {})
    assert QueuedTokensPolicy(100)(argparse.Namespace(aggregated_metrics=None)) == (0.0, {})
