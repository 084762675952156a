#!/bin/sh
# Prints the interpreter for .venv: $PYTHON if set, else python3 if suitable, else the newest of
# python3.14 … python3.11. Suitable: runs, is 3.11 to 3.14, and can make an environment with pip.
# What it prints is the base interpreter, so an active environment or a pyenv shim does not matter.
# Called by scripts/make_environment.sh. Status 1 and one line on stderr when there is none.

probe='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3 python3.14 python3.13 python3.12 python3.11
fi
without_venv=
for python in "$@"; do
    path=$("$python" -c "$probe" 2>/dev/null)
    case $? in
        0) echo "$path"; exit 0 ;;
        4) without_venv=${without_venv:-$python} ;;
    esac
done

if [ -n "$without_venv" ]; then
    version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $without_venv ($version) lacks venv or ensurepip; install them (Debian, Ubuntu:" \
        "apt install python$version-venv) or name another interpreter: make PYTHON=…" >&2
elif [ -n "${PYTHON:-}" ]; then
    echo "error: PYTHON=$PYTHON does not run or is not Python 3.11 to 3.14" >&2
else
    echo "error: no Python 3.11 to 3.14 on PATH (tried python3 and python3.14 to python3.11);" \
        "install one or name it: make PYTHON=/path/to/python3.12" >&2
fi
exit 1
