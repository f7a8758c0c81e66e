"""Command lines that run in processes forked from one process, which has done the imports."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}

# Forks one process per line of stdin, so that each starts without the 4 seconds of imports (torch imports torch._dynamo
# when it runs the first custom operation). A line is [arguments, stdout, FIFO for stderr, setup], answered with a pid;
# or a pid, answered with its exit status.
FORK_SERVER = """
import atexit, json, os, signal, sys, threading
import pyarrow.parquet, torch._dynamo, unpadded.bulk, unpadded.loading, unpadded.server.serve
from unpadded.cli.main import main
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        arguments, stdout, stderr, setup = request
        os.dup2(os.open(stderr, os.O_WRONLY), 2)
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
        exec(setup)
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
        # As the interpreter does; but that then frees, and so copies, all objects of the imports: 1 s of CPU time.
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(status or 0)
"""


class ForkServer:
    """Starts command lines by forking a process that has imported torch and the server."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORK_SERVER]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def ask(self, request: object) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@functools.cache
def fork_server() -> ForkServer:
    """Return the fork server of this process, which exits with it."""
    server = ForkServer()
    atexit.register(server.close)
    return server


class ForkedProcess:
    """A command line in a fork, with the members of subprocess.Popen that `Server` uses.

    `stdout` is a file or a FIFO; `setup` is a Python statement that runs before the command line.
    """

    def __init__(self, arguments: list[str], *, stdout: str | Path = os.devnull, setup: str = "") -> None:
        with tempfile.TemporaryDirectory() as folder:
            fifo = os.path.join(folder, "stderr")
            os.mkfifo(fifo)
            self.pid = fork_server().ask([arguments, str(stdout), fifo, setup])
            self.stderr = open(fifo)  # noqa: SIM115
        self._status: int | None = None

    def send_signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        if self._status is None:
            self._status = fork_server().ask(self.pid)
        return self._status


def run_cli(*arguments: str, stdout: str | Path = os.devnull) -> tuple[int, str]:
    """Run a command line to its end and return its exit status and stderr."""
    process = ForkedProcess(list(arguments), stdout=stdout)
    with process.stderr as stderr:
        return process.wait(), stderr.read()
