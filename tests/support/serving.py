"""Running `unpadded serve`, plain HTTP requests to it, and the vectors that it returns for chunks."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.forks import ENVIRONMENT, ROOT, ForkedProcess

if TYPE_CHECKING:
    import numpy as np

    import unpadded

HANG_SECONDS = 600  # after which a wait fails; on a busy machine, everything takes many times as long


class Server:
    """A running `unpadded serve`. `log` has the parsed lines of its log, and `stderr` all lines as text."""

    def __init__(
        self, model: Path | Sequence[Path], *flags: str, fork: bool = True, env: dict[str, str] | None = None
    ) -> None:
        models = [model] if isinstance(model, Path) else model
        arguments = ["serve", *map(str, models), "--port", "0", "--device", "cpu", *flags]
        self.process: ForkedProcess | subprocess.Popen[str]
        if fork:
            assert env is None, "the environment of a forked process is that of the fork server"
            self.process = ForkedProcess(arguments)
        else:
            command = [sys.executable, "-m", "unpadded", *arguments]
            self.process = subprocess.Popen(
                command, env={**ENVIRONMENT, **(env or {})}, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
        self.log: list[dict] = []
        self.stderr: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_stderr)
        self._reader.start()
        if not self._ready.wait(HANG_SECONDS) or not any("url" in line for line in self.log):
            self.stop(signal.SIGKILL)
            raise AssertionError("".join(self.stderr))
        self.url = next(line["url"] for line in self.log if "url" in line)
        self.port = int(self.url.rpartition(":")[2])

    def _read_stderr(self) -> None:
        for line in self.process.stderr:
            self.stderr.append(line)
            if line.startswith("{") and line.endswith("\n"):  # a killed server may leave a part of a line
                self.log.append(json.loads(line))
                if self.log[-1]["message"] == "ready":
                    self._ready.set()
        self._ready.set()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)

    def request(
        self, method: str, path: str, value: object = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of a response. The request's body is `value`: bytes, or an object as JSON."""
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()

    def post(self, path: str, value: object, **headers: str) -> object:
        """Return the JSON of a successful POST."""
        status, _, body = self.request("POST", path, value, **headers)
        assert status == 200, body
        return json.loads(body)

    def metric(self, name: str) -> float:
        lines = self.request("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status when the process has exited and its log is read."""
        self._reader.join(HANG_SECONDS)
        if self._reader.is_alive():
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError("the server did not exit")
        status = self.process.wait()
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def serving(
    model: Path | Sequence[Path], *flags: str, fork: bool = True, env: dict[str, str] | None = None
) -> Iterator[Server]:
    server = Server(model, *flags, fork=fork, env=env)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


def encode_chunks(engine: unpadded.Engine, documents: Sequence[Sequence[str]], **options: Any) -> np.ndarray:
    """Return the vectors of `encode_spans` for the chunks of documents, joined with line breaks."""
    ends = [[end - 1 for end in accumulate(len(chunk) + 1 for chunk in chunks)] for chunks in documents]
    spans = [
        [(end - len(chunk), end) for chunk, end in zip(chunks, places, strict=True)]
        for chunks, places in zip(documents, ends, strict=True)
    ]
    return engine.encode_spans(["\n".join(chunks) for chunks in documents], spans=spans, **options).vectors


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, and fail if it hangs."""
    deadline = time.perf_counter() + HANG_SECONDS
    while not condition():
        assert time.perf_counter() < deadline, f"not true after {HANG_SECONDS} s"
        time.sleep(0.02)
