"""A server started as a user starts it, and plain HTTP to talk to it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}

START_SECONDS = 120


class Server:
    """`unpadded serve`, until stopped; `lines` are its log."""

    def __init__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "unpadded", "serve", str(model), "--port", "0", "--device", "cpu", *flags]
        self.process = subprocess.Popen(
            command, env={**ENVIRONMENT, **(env or {})}, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.lines: list[dict] = []
        self.said: list[str] = []
        ready = threading.Event()

        def read() -> None:
            for line in self.process.stderr:
                self.said.append(line)
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                    if self.lines[-1]["message"] == "ready":
                        ready.set()
            ready.set()

        self._reader = threading.Thread(target=read)
        self._reader.start()
        if not ready.wait(START_SECONDS) or not self.lines:
            self.stop(signal.SIGKILL)
            raise AssertionError("".join(self.said))
        self.url = self.lines[0]["url"]
        self.port = int(self.url.rpartition(":")[2])

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, value: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one exchange; bytes go as they are, anything else as JSON."""
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()

    def post(self, path: str, value: object, **headers: str) -> object:
        """The JSON of a successful POST."""
        status, _, body = self.ask("POST", path, value, **headers)
        assert status == 200, body
        return json.loads(body)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended and all it said is read."""
        status = self.process.wait(60)
        self._reader.join()
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def serving(model: Path, *flags: str, env: dict[str, str] | None = None):
    server = Server(model, *flags, env=env)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)
