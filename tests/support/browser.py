"""A headless Chromium, driven over the two pipes of its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1200,800",
)
SECONDS = 60  # to wait for an answer
READS, WRITES = 3, 4  # the descriptors that --remote-debugging-pipe talks over


class Page:
    """One tab. Coordinates are pixels of its window."""

    def __init__(self, process: subprocess.Popen[bytes], writes: int, reads: int) -> None:
        self.errors: list[str] = []  # exceptions and console errors of the page
        self._process = process
        self._writes = writes
        self._reads = reads
        self._received = b""
        self._sent = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Send one command and return its result; what happens meanwhile is looked through for errors."""
        self._sent += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._sent, "method": method, "params": parameters, **session}
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """The value of an expression, after two frames in which the page may draw."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.call("Runtime.evaluate", expression=frames, awaitPromise=True)
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event: mouseMoved, mousePressed, mouseReleased, mouseWheel."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def type(self, text: str) -> None:
        """Keys into what has the focus."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="char", text=letter)

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _receive(self) -> Any:
        while b"\0" not in self._received:
            assert select.select([self._reads], [], [], SECONDS)[0], "the browser does not answer"
            chunk = os.read(self._reads, 1 << 20)
            assert chunk, f"the browser is gone: {self._process.poll()}"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        answer = json.loads(message)
        method, found = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["exceptionDetails"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(json.dumps(found["entry"]))
        return answer


@contextmanager
def open_browser(profile: Path, *flags: str) -> Iterator[Page]:
    """A page of a browser with an empty profile, which ends with the block."""
    assert CHROMIUM is not None
    theirs_read, ours_write = os.pipe()
    ours_read, theirs_write = os.pipe()
    far = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_read, theirs_write)]  # clear of 3 and 4

    def connect() -> None:
        os.dup2(far[0], READS)
        os.dup2(far[1], WRITES)

    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=connect,
        pass_fds=(READS, WRITES),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (theirs_read, theirs_write, *far):
        os.close(end)
    try:
        yield Page(process, ours_write, ours_read)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        os.close(ours_write)
        os.close(ours_read)
