"""The child of `runner`: confines itself, runs one program, and tells how that ended.

A script, started as `python -I -S -B child.py` and never imported. It reads one Python literal
from stdin and writes to the original stdout: first one line with the names of the protections
that this machine refuses, then how the program ended. Two processes do this. The *supervisor*
enters new namespaces, forks, and kills the fork at its deadline. The *candidate* (process 1 of its
namespace) gives up its rights and runs the program.

Source of the manner: `reliability_guard` of HumanEval (Chen et al. 2021), which only removes
names from `os`. Here the kernel refuses, and an audit hook refuses once more what goes through
Python's own library; where the kernel cannot, the hook is what remains, and the line says so.
"""

import ctypes
import os
import resource
import signal
import sys

# Names of what the kernel may refuse to set up, as `runner.PROTECTIONS` explains them.
NETWORK, PROCESSES, FILES, USER = "network", "processes", "files", "user"

# From linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
_NEW_USER, _NEW_NETWORK, _NEW_PROCESSES = 0x10000000, 0x40000000, 0x20000000
_NEW_MOUNTS, _NEW_IPC = 0x00020000, 0x08000000
_MS_RECURSIVE_PRIVATE = 0x4000 | 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION_3 = 0x20080522

_NOBODY = 65534
_TIMED_OUT_STATUS = 124
# Audit events of Python's library that reach beyond the process; those of files are in `_refuse`.
_REFUSED_FAMILIES = ("socket.", "subprocess.", "pty.", "sqlite3.")
_REFUSED = frozenset(
    "os." + name
    for name in (
        *("chflags", "chmod", "chown", "exec", "fork", "forkpty", "kill", "killpg", "link"),
        *("mkdir", "posix_spawn", "remove", "removexattr", "rename", "rmdir", "setxattr"),
        *("spawn", "symlink", "system", "truncate", "utime"),
    )
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _enter_namespaces(libc) -> set[str]:
    """Private network, processes and mounts for the next fork; returns what was refused."""
    if libc.unshare(_NEW_NETWORK) == 0:
        missing = set()
    else:
        # Without the right to do this, one may have it in a user namespace of one's own.
        user, group = os.geteuid(), os.getegid()
        if libc.unshare(_NEW_USER) == 0:
            _map_user(user, group)
        missing = {NETWORK} if libc.unshare(_NEW_NETWORK) else set()
    # Without an IPC namespace of its own, shared memory would outlive the candidate.
    if libc.unshare(_NEW_PROCESSES | _NEW_IPC):
        missing.add(PROCESSES)
    if not _make_files_read_only(libc):
        missing.add(FILES)
    return missing


def _map_user(user: int, group: int) -> None:
    """Keeps the numbers of user and group in a new user namespace."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError:  # a namespace without rights, as AppArmor gives; the rest will be missing
            return


def _make_files_read_only(libc) -> bool:
    if libc.unshare(_NEW_MOUNTS) or libc.mount(None, b"/", None, _MS_RECURSIVE_PRIVATE, None):
        return False
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY)  # set, clear, propagation, user ns
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    where = ctypes.c_int(_AT_FDCWD), b"/", ctypes.c_uint(_AT_RECURSIVE)
    return libc.syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), *where, attributes, size) == 0


def _give_up_rights(libc) -> set[str]:
    """No capabilities, and no user whom the process limit spares; returns what was refused."""
    missing = set()
    if os.geteuid() == 0:
        _reach_library_by_descriptor()
        try:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        except OSError:
            missing.add(USER)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # The supervisor's death is the candidate's. A change of user would have reset this.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return missing


def _reach_library_by_descriptor() -> None:
    """Lets `import` work for a user who may not enter the folders above the library.

    root's own Python often stands in root's home, which is closed to everyone else.
    """

    def opened(path: str) -> str:
        try:
            return f"/proc/self/fd/{os.open(path, os.O_PATH | os.O_DIRECTORY)}"
        except OSError:  # such as the zip file that nobody has
            return path

    sys.path[:] = map(opened, sys.path)
    for module in sys.modules.values():
        if hasattr(module, "__path__"):
            module.__path__ = list(map(opened, module.__path__))
    sys.path_importer_cache.clear()


def _limit_resources(memory_bytes: int, wall_s: float) -> None:
    for limit, amount in (
        (resource.RLIMIT_CPU, int(wall_s) + 2),  # should the supervisor be stopped
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 1),  # itself; threads count too
    ):
        resource.setrlimit(limit, (amount, amount))


def _refuse(event: str, arguments: tuple) -> None:
    """The audit hook: library calls that reach beyond the process raise PermissionError."""
    if event == "open":
        if arguments[2] is not None and arguments[2] & _WRITING:
            raise PermissionError(f"writing to {arguments[0]!r} is refused")
    elif event in _REFUSED or event.startswith(_REFUSED_FAMILIES):
        raise PermissionError(f"{event} is refused")


def _run(source: str, calls: list) -> str:
    """How the program ended, as the runner reads it."""
    try:
        namespace: dict = {"__name__": "candidate"}
        exec(source, namespace)
        # Each result is written down before the next call, which might change it.
        results = [repr(namespace[name](*arguments)) for name, arguments in calls]
        return f"finished [{', '.join(results)}]"
    except BaseException as error:
        return f"raised {type(error).__name__}"


def _candidate(libc, missing: set[str], channel: int, null: int, job: tuple) -> None:
    source, calls, nonce, wall_s, memory_bytes = job
    os.setsid()
    if libc is not None:
        missing = missing | _give_up_rights(libc)
    _limit_resources(memory_bytes, wall_s)
    os.write(channel, f"{nonce} {','.join(sorted(missing))}\n".encode())
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.addaudithook(_refuse)
    answer = f"{nonce} {_run(source, calls)}".encode(errors="surrogatepass")
    while answer:
        answer = answer[os.write(channel, answer) :]


def main() -> None:
    """Runs the program that stands on stdin."""
    # The runner writes the literal: numbers, the program as a str, arguments of known calls.
    job = eval(sys.stdin.read())
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    missing = {NETWORK, PROCESSES, FILES} if libc is None else _enter_namespaces(libc)
    candidate = os.fork()
    if candidate == 0:
        try:
            _candidate(libc, missing, channel, null, job)
        finally:
            # Not a normal exit: that would wait for threads and exit handlers of the program.
            os._exit(1)
    os.close(channel)
    os.dup2(null, 1)
    late = False

    def end(signal_number, _frame) -> None:
        nonlocal late
        late = late or signal_number == signal.SIGALRM
        # contextlib's `suppress` would take a fifth of the child's start to import.
        try:  # noqa: SIM105
            os.kill(candidate, signal.SIGKILL)
        except ProcessLookupError:
            pass

    signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGTERM, end)
    signal.setitimer(signal.ITIMER_REAL, job[3])
    os.waitpid(candidate, 0)
    os._exit(_TIMED_OUT_STATUS if late else 0)


if __name__ == "__main__":
    main()
