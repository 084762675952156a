#!/bin/sh
# Makes .venv, or leaves it alone when nothing it depends on has changed. Called by the Makefile.
#
# .venv/complete holds the key of a finished environment: the interpreter, this directory, the
# packages wanted. It is written last. .venv/unfinished is there from before the first package to
# after the last, so an interrupted environment is never taken for a finished one: it is made anew.
# An environment of the same interpreter that merely lacks a package is updated in place.
set -eu
cd -P "$(dirname "$0")/.."
venv_python=.venv/bin/python

key() {
    "$1" - <<'PYTHON'
import hashlib, json, os, platform, sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
wanted = project["build-system"], project["project"], project.get("tool", {}).get("setuptools")
with open("constraints.txt", "rb") as file:
    packages = json.dumps(wanted, sort_keys=True).encode() + file.read()
python = platform.python_implementation(), "%d.%d" % sys.version_info[:2], sys.base_prefix
print(*python, os.getcwd(), hashlib.sha256(packages).hexdigest())
PYTHON
}

# Without PYTHON=, an environment that works keeps the interpreter it was made with.
if [ -z "${PYTHON:-}" ] && [ -f .venv/complete ] && "$venv_python" -c '' 2>/dev/null; then
    python=$venv_python
else
    python=$(sh scripts/find_python.sh)
fi
wanted=$(key "$python")
if [ -f .venv/complete ] && [ "$(cat .venv/complete)" = "$wanted" ]; then
    exit 0
fi

# Ours to update: made in this directory (the scripts in bin/ name it), by the same interpreter.
same_base='import sys; print(*sys.version_info[:2], sys.base_prefix)'
if [ ! -f .venv/unfinished ] && [ -f .venv/bin/pip ] &&
    head -n 2 .venv/bin/pip | grep -qF "$PWD/$venv_python" &&
    [ "$("$venv_python" -c "$same_base" 2>/dev/null)" = "$("$python" -c "$same_base")" ]; then
    echo "environment: updating .venv (less than a minute)"
    rm -f .venv/complete
    touch .venv/unfinished
else
    if [ "$python" = "$venv_python" ]; then
        python=$(sh scripts/find_python.sh)
        wanted=$(key "$python")
    fi
    echo "environment: making .venv with $("$python" -V) (a few minutes, 1.7 GB)"
    rm -rf .venv
    mkdir .venv
    touch .venv/unfinished
    "$python" -m venv .venv
fi
log=.venv/pip.log
if ! "$venv_python" -m pip install -c constraints.txt -e '.[dev]' >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: pip could not install the packages; the whole story is in $log" >&2
    exit 1
fi
echo "$wanted" > .venv/complete
rm .venv/unfinished
# numba keeps the machine code beside its source. Without it the first run would wait for it.
echo "environment: compiling the matrix products for CPUs (20 seconds)"
"$venv_python" -c 'import pallas_kernels.ggml.handlers' 2>>"$log" ||
    echo "environment: they could not be compiled, which does not matter on a GPU; see $log"
