"""Run the code of documentation pages and the examples, in forks of one process that has done the imports."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Programs that need the network, a daemon, a cluster or minutes: shell snippets find one that does nothing.
NOT_RUN = ("docker", "embedding-atlas", "kubectl", "make", "nomic", "opentelemetry-instrument", "pip", "ray", "serve")
# `unpadded` in the shell snippets: passes its arguments, folder and files to a `ForkingProcess`.
SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps(["shell", os.getcwd(), [sys.argv[1:], dict(os.environ)]]).encode()
    socket.send_fds(connection, [request], [0, 1, 2])
    pid, status = connection.makefile().read().split()
    sys.exit(int(status))
"""


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page, with the block of text that follows it as its output."""

    line: int
    language: str
    code: str
    output: str | None


def read_snippets(path: Path) -> list[Snippet]:
    """Return the blocks of Python and shell code of a page."""
    page, found = path.read_text(), []
    for match in FENCE.finditer(page):
        indent, language, code = match.groups()
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        after = FENCE.match(page, match.end() + len(re.match(r"\s*\n", page[match.end() :] + "\n")[0]))
        output = after[3] if after and after[2] == "text" else None
        if language in ("python", "sh") and "--8<--" not in code:
            found.append(Snippet(page.count("\n", 0, match.start()) + 1, language, code, output))
    return found


def run_page(path: Path, replacements: dict[str, str]) -> None:
    """Run the snippets of a page in order, in one namespace and the current folder; AssertionError for other output."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in read_snippets(path):
        code = snippet.code
        for old, new in replacements.items():
            code = code.replace(old, new)
        name = f"{path.name}:{snippet.line}"
        if snippet.language == "python":
            offline = "InferenceClient" not in code  # its requests to the local server are rejected otherwise
            with (
                patch("huggingface_hub.constants.HF_HUB_OFFLINE", offline),
                contextlib.redirect_stdout(io.StringIO()) as stdout,
            ):
                exec(compile("\n" * snippet.line + code, path, "exec"), namespace)
            actual = stdout.getvalue()
        else:
            command = ["bash", "-euo", "pipefail", "-c", code]
            ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert ran.returncode == 0, f"{name}: {code}\n{ran.stdout}{ran.stderr}"
            actual = ran.stdout
        if snippet.output is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(snippet.output, actual, flags), f"{name} printed\n{actual}"


class ForkingProcess:
    """A process with the imports that pages need; `start` forks it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.address = str(folder / "socket")
        programs = folder / "bin"
        programs.mkdir()
        (programs / "unpadded").write_text(SHIM.format(python=sys.executable, address=self.address))
        for name in NOT_RUN:
            (programs / name).write_text("#!/bin/sh\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels", "tests"))
        environment = {"PYTHONPATH": paths, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment}
        command = [sys.executable, "-m", "support.snippets", self.address]
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    @contextlib.contextmanager
    def start(self, kind: str, folder: Path, arguments: object, stdout: int, stderr: int) -> Iterator[Child]:
        """Start a fork in a folder; kill it at the end if it still runs."""
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as stdin:
            connection.connect(self.address)
            request = json.dumps([kind, str(folder), arguments]).encode()
            socket.send_fds(connection, [request], [stdin.fileno(), stdout, stderr])
            with connection.makefile() as answers:
                child = Child(int(answers.readline()), answers)
                try:
                    yield child
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)

    def run(self, kind: str, folder: Path, arguments: object, seconds: float = 120) -> tuple[int, str]:
        """Run a fork to its end and return its status and what it printed."""
        with tempfile.TemporaryFile("w+") as printed:
            with self.start(kind, folder, arguments, printed.fileno(), printed.fileno()) as child:
                status = child.wait()
            printed.seek(0)
            return status, printed.read()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Child:
    """A fork of a `ForkingProcess`."""

    pid: int
    answers: io.TextIOBase

    def wait(self) -> int:
        """Return the exit status, or 1 if the fork crashed."""
        return int(self.answers.readline() or 1)


def main(address: str) -> None:
    """Import what pages use, then run each request in a fork: [kind, folder, arguments].

    kind: "page", "example", "cli", or "shell" for the command line in a shell snippet, where a server does not start.
    """
    import huggingface_hub  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch._dynamo  # noqa: F401

    import unpadded.bulk
    import unpadded.loading
    import unpadded.server.serve  # noqa: F401
    from unpadded.cli.main import _parser
    from unpadded.cli.main import main as run_cli
    from unpadded.cli.serve import read_options

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request, files, *_ = socket.recv_fds(connection, 1 << 16, 3)
            kind, folder, arguments = json.loads(request)
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.chdir(folder)
            connection.send(f"{os.getpid()}\n".encode())
            status = 1
            try:
                if kind == "shell":
                    arguments, environment = arguments
                    os.environ.update(environment)
                if kind == "shell" and arguments[0] == "serve":
                    read_options(_parser().parse_args(arguments))  # checks the flags
                    status = 0
                elif kind in ("cli", "shell"):
                    status = run_cli(arguments)
                elif kind == "example":
                    sys.argv = arguments
                    runpy.run_path(arguments[0], run_name="__main__")
                    status = 0
                else:
                    run_page(Path(arguments[0]), arguments[1])
                    status = 0
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
            except BaseException:  # reported to the test through stderr
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(f"{status}\n".encode())
            os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
