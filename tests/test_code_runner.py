"""The code runner: what generated code may not do, tried for real, with and without the kernel.

Attacks come twice. Through Python's library the audit hook meets them; through `ctypes` they go
around the hook and meet the kernel. `CRIPPLED` runs the same runner where namespaces are refused.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from hobbit_jax.code_runner import PROTECTIONS, missing_protections, run_code

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
needs_kernel = pytest.mark.skipif(
    bool(set(missing_protections()) - {"user"}),
    reason=f"this machine refuses {missing_protections()}: only the audit hook can be tested",
)


def results_of(source: str, **limits):
    outcome = run_code(source, [("answer", ())], **limits)
    assert outcome.status == "finished", outcome
    return eval(outcome.detail)[0]


def test_outcomes():
    double = "def double(x):\n    return x * 2\n"
    done = run_code(double, [("double", (3,)), ("double", ("\ud800",))])
    assert (done.status, done.detail) == ("finished", "[6, '\\ud800\\ud800']")
    assert (run_code("").status, run_code("").detail) == ("finished", "[]")
    for source, name in {
        "assert 1 == 2": "AssertionError",
        "def f(:": "SyntaxError",
        "import sys; sys.exit(0)": "SystemExit",
        "input()": "EOFError",
        "import numpy": "ModuleNotFoundError",
        "def f(n): return f(n + 1)\nf(0)": "RecursionError",
        "raise KeyboardInterrupt": "KeyboardInterrupt",
    }.items():
        outcome = run_code(source)
        assert (outcome.status, outcome.detail) == ("raised", name), source
    assert run_code("import os; os._exit(0)").status == "ended"
    assert run_code("import ctypes; ctypes.string_at(0)").status == "ended"
    assert run_code(double, [("double", ("x" * 40_000,))]).status == "too long"
    # Nothing that a program writes anywhere is an answer.
    forged = "import os\nfor fd in range(64):\n    try: os.write(fd, b'0 finished []')\n"
    assert run_code(forged + "    except OSError: pass\nos._exit(0)").status == "ended"


def test_endless_programs_end_in_time():
    for source in (
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 10**6)",
        "import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
        "10 ** 10 ** 9",  # inside one bytecode
        LIBC + "libc.prctl(1, 0, 0, 0, 0)\nwhile True: pass",  # not to die with the supervisor
    ):
        began = time.monotonic()
        assert run_code(source, timeout_s=0.5).status == "timed out", source
        assert time.monotonic() - began < 20, source
    flood = "import os\nwhile True:\n    for fd in range(3, 64):\n"
    flood += "        try: os.write(fd, bytes(9999))\n        except OSError: pass"
    assert run_code(flood, timeout_s=30.0).status == "too long"
    hung_up = "import os\nos.closerange(0, 64)\nwhile True: pass"
    began = time.monotonic()
    assert run_code(hung_up, timeout_s=30.0).status == "ended" and time.monotonic() - began < 20


def test_ten_gigabytes_are_refused():
    outcome = run_code("x = bytearray(10 << 30)")
    assert (outcome.status, outcome.detail) == ("raised", "MemoryError")
    slowly = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert run_code(slowly, timeout_s=30.0).status in ("raised", "ended")
    # Without Python's allocator, by the kernel's own limit.
    mapped = LIBC + "libc.mmap.restype = ctypes.c_ssize_t\n"
    mapped += "def answer(): return libc.mmap(None, ctypes.c_size_t(10 << 30), 3, 0x22, -1, 0)"
    assert results_of(mapped) == -1


BY_THE_LIBRARY = {
    "fork": "os.fork()",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "system": "os.system('true')",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process().start()",
    "kill": "os.kill(os.getppid(), 9)",
    "killpg": "os.killpg(0, 9)",
    "socket": "import socket; socket.socket()",
    "lookup": "import socket; socket.getaddrinfo('localhost', 80)",
    "write": "open('/tmp/f', 'w')",
    "append": "os.open('/tmp/f', os.O_WRONLY | os.O_APPEND)",
    "remove": "os.remove(VICTIM)",
    "rename": "os.rename(VICTIM, VICTIM + '.b')",
    "rmtree": "import shutil; shutil.rmtree(os.path.dirname(VICTIM))",
    "chmod": "os.chmod(VICTIM, 0)",
    "sqlite": "import sqlite3; sqlite3.connect('/tmp/f')",
}


@pytest.fixture
def victim():
    """A file that anybody may delete, were it not for the runner."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    path = folder / "victim"
    path.write_text("alive")
    path.chmod(0o666)
    folder.chmod(0o777)
    yield path
    assert path.read_text() == "alive" and list(folder.iterdir()) == [path]
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", BY_THE_LIBRARY)
def test_the_library_refuses(name, victim):
    outcome = run_code(f"import os\nVICTIM = {str(victim)!r}\n{BY_THE_LIBRARY[name]}")
    assert (outcome.status, outcome.detail) == ("raised", "PermissionError")


@needs_kernel
def test_the_kernel_refuses_processes():
    """A fork bomb and threads, around the hook; nothing is left of them."""
    bomb = LIBC + "def answer(): return {libc.fork() for _ in range(1000)}, ctypes.get_errno()"
    assert results_of(bomb) == ({-1}, 11)  # EAGAIN
    thread = run_code("import threading\nthreading.Thread(target=print).start()")
    assert (thread.status, thread.detail) == ("raised", "RuntimeError")


@needs_kernel
def test_the_kernel_hides_other_processes():
    """No process outside can be named, so none can be signalled: not even by kill(-1)."""
    kill = LIBC + f"def answer(): return os.getppid(), libc.kill({os.getpid()}, 9), "
    kill += f"libc.kill({os.getppid()}, 9), ctypes.get_errno()"
    assert results_of(kill) == (0, -1, -1, 3)  # ESRCH
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run_code(LIBC + "libc.kill(-1, 9); libc.kill(0, 9)")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@needs_kernel
def test_the_kernel_gives_no_network():
    """A listener on this machine is not reached, by TCP or by an abstract Unix socket."""
    source = (
        LIBC
        + """
def reach(family, address):
    descriptor = libc.socket(family, 1, 0)
    assert descriptor >= 0, ctypes.get_errno()
    return libc.connect(descriptor, address, len(address)), ctypes.get_errno()
"""
    )
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        name = f"\0hobbit-{os.getpid()}"
        unix.bind(name)
        tcp.listen()
        unix.listen()
        port = tcp.getsockname()[1].to_bytes(2, "big")
        inet = b"\x02\x00" + port + bytes([127, 0, 0, 1]) + bytes(8)
        local = b"\x01\x00" + name.encode()
        source += f"def answer(): return reach(2, {inet!r}), reach(1, {local!r})"
        (by_tcp, tcp_error), (by_unix, unix_error) = results_of(source)
        assert (by_tcp, by_unix) == (-1, -1)
        assert tcp_error in (101, 111) and unix_error == 111  # unreachable or refused; refused
        # The addresses are right: the same calls from here are answered.
        namespace: dict = {}
        exec(source, namespace)
        assert [result for result, _ in namespace["answer"]()] == [0, 0]


@needs_kernel
def test_the_kernel_keeps_files(victim):
    source = (
        LIBC
        + f"VICTIM = {str(victim).encode()!r}\n"
        + """
def answer():
    errors = []
    for call in (
        lambda: libc.unlink(VICTIM),
        lambda: libc.rename(VICTIM, VICTIM + b".b"),
        lambda: libc.open(VICTIM, os.O_WRONLY | os.O_TRUNC),
        lambda: libc.open(VICTIM + b".new", os.O_WRONLY | os.O_CREAT, 0o666),
        lambda: libc.mkdir(VICTIM + b".d", 0o777),
        lambda: libc.mkfifo(b"/tmp/hobbit-fifo", 0o666),
        lambda: libc.open(b"/dev/shm/hobbit", os.O_RDWR | os.O_CREAT, 0o666),
    ):
        assert call() == -1
        errors.append(ctypes.get_errno())
    descriptor = libc.memfd_create(b"m", 0)
    assert libc.write(descriptor, b"x", 1) == -1
    return errors, ctypes.get_errno()
"""
    )
    errors, write_error = results_of(source)
    assert errors == [30] * 7 and write_error == 27  # EROFS; EFBIG


@needs_kernel
def test_rights_are_given_up():
    source = "import os\ndef answer():\n    lines = open('/proc/self/status').readlines()\n"
    source += "    of = dict(line.split()[:2] for line in lines if len(line.split()) > 1)\n"
    source += "    return os.getuid(), [of[name] for name in ('CapEff:', 'CapPrm:', 'NoNewPrivs:')]"
    user, rights = results_of(source)
    assert user != 0 and rights == ["0" * 16, "0" * 16, "1"]
    # And yet every module of the library can be imported, wherever root's Python stands.
    assert (
        run_code("import json, hashlib, decimal, asyncio, encodings.idna, ctypes.util").detail
        == "[]"
    )


def children_of(process: int) -> list[int]:
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in listed.split()]


def test_nothing_outlives_a_killed_parent():
    """SIGKILL on the parent: the supervisor's own timer ends the program."""
    code = """
from hobbit_jax.code_runner import runner
class Announcing(runner._Reader):
    def rest(self, *limits):  # asked for once the program runs
        print("runs", flush=True)
        return super().rest(*limits)
runner._Reader = Announcing
runner.run_code("import time; time.sleep(600)", timeout_s=5)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "runs\n"
        supervisors = children_of(parent.pid)
        family = supervisors + [c for supervisor in supervisors for c in children_of(supervisor)]
        parent.kill()
    assert len(family) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{member}").exists() for member in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_threads_may_run_code_at_once():
    outcomes = [None] * 8

    def work(index):
        outcomes[index] = run_code("def f(x): return x", [("f", (index,))], timeout_s=20.0).detail

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [f"[{index}]" for index in range(8)]


# Runs what follows without any right to namespaces or to another user, as in a strict container.
CRIPPLED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
user = os.getuid()
assert libc.unshare(0x10000000) == 0, "no user namespace to begin with"
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"{user} {user} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
libc.prctl(38, 1, 0, 0, 0)
for capability in range(41): libc.prctl(24, capability, 0, 0, 0)
from hobbit_jax.code_runner import missing_protections, run_code
"""


@needs_kernel
def test_what_the_kernel_refuses_is_named_and_the_hook_remains(victim):
    script = (
        CRIPPLED
        + f"""
print(missing_protections())
for source in {list(BY_THE_LIBRARY.values())!r}:
    outcome = run_code("import os\\nVICTIM = {str(victim)!r}\\n" + source)
    assert (outcome.status, outcome.detail) == ("raised", "PermissionError"), (source, outcome)
for source, status in (("x = bytearray(10 << 30)", "raised"), ("while True: pass", "timed out")):
    outcome = run_code(source, timeout_s=1.0)
    assert outcome.status == status, (source, outcome)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    named = set(eval(done.stdout))
    assert named == {"network", "processes", "files"} | ({"user"} if os.getuid() == 0 else set())
    assert named <= set(PROTECTIONS)


def test_a_child_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr("hobbit_jax.code_runner.runner._CHILD", Path("/nowhere/child.py"))
    with pytest.raises(RuntimeError, match=r"did not start: .*No such file"):
        run_code("")
