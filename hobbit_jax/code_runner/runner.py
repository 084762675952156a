"""The parent's side: starts a child for one program, reads its answer, and survives whatever.

The child (`child.py`) confines and kills itself; this side never trusts that it does. An answer
counts only behind a number that the program is not told, so nothing it prints, raises or exits with
passes for a finished run. Code that searches the interpreter for that number can still find it.
"""

import contextlib
import functools
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_CHILD = Path(__file__).with_name("child.py")
_MEMORY_BYTES = 512 << 20
# Starting Python and the namespaces takes some 50 ms; a machine may be very busy.
_START_GRACE_S = 60.0
_END_GRACE_S = 10.0
_TIMED_OUT_STATUS = 124
_MOST_ERROR_BYTES = 4096

# What a machine may refuse to set up, and what then stands between a program and the machine.
PROTECTIONS = {
    "network": "no network namespace: Python's own sockets are refused, others are not",
    "processes": "no process namespace: Python's own fork and kill are refused, others only by "
    "the limit on processes",
    "files": "no read-only file system: Python's own writes are refused and no file can grow, but "
    "other code could delete what the program's user may delete",
    "user": "the rights of root, whom the limit on processes spares: Python's own fork is refused",
}

Status = Literal["finished", "raised", "timed out", "ended", "too long"]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `detail` is the repr of the list of results when it "finished", the exception's type when it
    "raised", else empty. "ended" is an exit or a death before the end of the program, "too long"
    an answer beyond what was allowed. `missing` holds keys of PROTECTIONS.
    """

    status: Status
    detail: str
    missing: tuple[str, ...]


def run_code(
    source: str,
    calls: Sequence[tuple[str, tuple[Any, ...]]] = (),
    *,
    timeout_s: float = 3.0,
    most_bytes: int = 1 << 16,
) -> Outcome:
    """Runs `source` in a child, then each call (name, arguments of literals) of what it defines.

    The program has `timeout_s` seconds, 512 MiB of address space, one process and one
    thread, no input, output, network or writable files, and answers with at most `most_bytes`.
    Its Python has the standard library only.

    Raises:
        RuntimeError: the child did not get as far as the program; its own words are included.
    """
    nonce = secrets.token_hex(8)
    job = ascii((source, list(calls), nonce, timeout_s, _MEMORY_BYTES))
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={},
        bufsize=0,
        start_new_session=True,
    ) as supervisor:
        assert supervisor.stdin is not None and supervisor.stdout is not None
        try:
            # A child that died at once has no answer, which the read below finds out.
            with contextlib.suppress(BrokenPipeError), supervisor.stdin as stdin:
                stdin.write(job.encode())
            answer = _Reader(supervisor.stdout.fileno())
            header = answer.line(time.monotonic() + _START_GRACE_S)
            if header is None or not header.startswith(f"{nonce} "):
                raise RuntimeError(
                    f"the code runner's child did not start: {_error_of(supervisor)}"
                )
            missing = tuple(filter(None, header.removeprefix(f"{nonce} ").split(",")))
            deadline = time.monotonic() + timeout_s + _END_GRACE_S
            text = answer.rest(deadline, most_bytes + len(nonce) + len(" finished "))
            if text is None:
                return Outcome("too long", "", missing)
        finally:
            status = _end(supervisor)
    said, _, rest = text.partition(" ")
    kind, _, detail = rest.partition(" ")
    if said == nonce and kind in ("finished", "raised"):
        return Outcome(kind, detail, missing)
    return Outcome("timed out" if status == _TIMED_OUT_STATUS else "ended", "", missing)


@functools.cache
def missing_protections() -> tuple[str, ...]:
    """The PROTECTIONS that this machine refuses to this user, found out by running nothing."""
    return run_code("", timeout_s=_START_GRACE_S).missing


def _end(supervisor: subprocess.Popen) -> int:
    """Has the supervisor kill the candidate and end; its exit status."""
    supervisor.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return supervisor.wait(_END_GRACE_S)
    supervisor.kill()  # and the kernel the candidate
    return supervisor.wait()


def _error_of(supervisor: subprocess.Popen) -> str:
    """The end of what our own script wrote to stderr, on one line."""
    _end(supervisor)
    assert supervisor.stderr is not None
    text = supervisor.stderr.read().decode(errors="replace")[-_MOST_ERROR_BYTES:]
    return " / ".join(text.split("\n")[-3:]).strip(" /") or f"status {supervisor.returncode}"


class _Reader:
    """Reads a pipe up to a deadline and a length."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._received = b""
        self._ended = False

    def _more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))
        chunk = os.read(self._descriptor, 1 << 16) if ready else b""
        self._received += chunk
        self._ended = not chunk
        return bool(chunk)

    def line(self, deadline: float) -> str | None:
        """The first line; None when the pipe ends or the deadline passes before it does."""
        while b"\n" not in self._received:
            if not self._more(deadline):
                return None
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace")

    def rest(self, deadline: float, most_bytes: int) -> str | None:
        """What is left up to the pipe's end or the deadline; None beyond `most_bytes`."""
        while len(self._received) <= most_bytes:
            if not self._more(deadline):
                return self._received.decode(errors="surrogatepass")
        return None
