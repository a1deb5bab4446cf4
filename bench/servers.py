"""Start a server, wait until it answers, stop it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


class NotStarted(Exception):
    """A server ended, or was not ready in time; the message holds the end of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str],
    ready_url: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Iterator[float]:
    """Run a server while the block lasts; yields how many seconds it took to be ready.

    What it prints goes to `log`. It is stopped with everything it started. Raises NotStarted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
    try:
        _wait_ready(process, ready_url, log, began + timeout_s)
        yield time.monotonic() - began
    finally:
        _stop(process)


def _wait_ready(
    process: subprocess.Popen[bytes], ready_url: str, log: Path, deadline: float
) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotStarted(f"ended with code {process.returncode}: {_last_line(log)}")
        try:
            if httpx.get(ready_url, timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise NotStarted(f"not ready in time: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server's process group, SIGKILL to what is left of it after 20 s."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, stop)
        except ProcessLookupError:
            break
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue
