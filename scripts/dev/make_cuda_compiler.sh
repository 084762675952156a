#!/bin/sh
# Installs XLA's CUDA compiler, ptxas and nvdisasm into .venv/cuda, for `make kernels`: no driver, no GPU.
# They stay out of .venv itself, where JAX would look for a GPU at every start.
set -eu
cd -P "$(dirname "$0")/../.."
jax=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
key="$jax $(grep -E '^nvidia-cuda-nv' constraints.txt | tr '\n' ' ')"
if [ -f .venv/cuda/complete ] && [ "$(cat .venv/cuda/complete)" = "$key" ]; then
    exit 0
fi
echo "kernels: installing the CUDA compiler into .venv/cuda (about 220 MB, once)"
rm -rf .venv/cuda
if ! .venv/bin/python -m pip install --no-deps --target .venv/cuda -c constraints.txt \
    "jax-cuda12-pjrt==$jax" "jax-cuda12-plugin==$jax" nvidia-cuda-nvcc-cu12 \
    nvidia-cuda-nvdisasm >.venv/cuda.log 2>&1
then
    tail -n 15 .venv/cuda.log >&2
    echo "error: pip could not install the CUDA compiler; the whole story is in .venv/cuda.log" >&2
    exit 1
fi
echo "$key" > .venv/cuda/complete
