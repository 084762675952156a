# Every target makes the environment in .venv when it is missing or stale.
# PYTHON=python3.12 names the interpreter; PYTEST_ARGS="tests/test_formats.py -k Q4" limits tests.

BIN := .venv/bin
PYTEST_ARGS ?=
# A GPU machine has its own JAX with CUDA; `make gpu` installs nothing.
GPU_PYTHON ?= python3
GPU_OUT ?= out/gpu
GPU_ARGS ?=
export PYTHON
# pyright comes from PyPI with its own node; it shall not ask the network for a newer self.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help environment demo test lint format kernels morekernels gpu gpudecode oracles slow clusters reference sweep frontier scale clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1	/' | expand -t 19

environment:  ## .venv with exact versions (constraints.txt); a minute or two when it is stale
	@sh scripts/make_environment.sh

demo: environment  ## the question in small, on the shipped model: out/demo/decision.md
	@echo "demo: 14 trials on the shipped model, about a minute on 2 idle CPU cores"
	@JAX_PLATFORMS=cpu $(BIN)/python scripts/sweep.py --config configs/reference.py:demo --workdir out/demo --workers=2
	@$(BIN)/python scripts/report.py --workdir out/demo
	@echo "demo: read out/demo/decision.md; its figures are in out/demo/figures, its records in out/demo/records"

test: environment  ## ruff, then every test but the slow and the oracle ones
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "error: unformatted files; run make format" >&2; exit 1; }
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

lint: environment  ## ruff and pyright
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

format: environment  ## ruff's fixes and formatting, in place
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

CUDA_COMPILER = PATH="$(CURDIR)/.venv/cuda/nvidia/cuda_nvcc/bin:$(CURDIR)/.venv/cuda/nvidia/cu13/bin:$$PATH" \
	PYTHONPATH=.venv/cuda TF_CPP_MIN_LOG_LEVEL=3 JAX_PLATFORMS=cpu

kernels: environment  ## compile the kernels for two GPUs, none of them here (2 minutes)
	@sh scripts/dev/make_cuda_compiler.sh
	@mkdir -p out
	@$(CUDA_COMPILER) $(BIN)/python scripts/dev/compile_kernels.py --workdir out/kernels
	@$(CUDA_COMPILER) $(BIN)/python scripts/dev/count_launches.py --workdir out/kernels

morekernels: kernels  ## and for four more
	@$(CUDA_COMPILER) $(BIN)/python scripts/dev/compile_kernels.py --workdir out/kernels \
		--targets sm_86,sm_89,sm_100,sm_120 --formats Q2_K,Q3_K,Q4_K,Q6_K --mean_rows 1,64

gpu:  ## on a machine with an NVIDIA GPU: kernel tests there, then the bench, out/gpu
	@mkdir -p out
	@PYTHONPATH=. $(GPU_PYTHON) -m pytest -q --noconftest tests/test_kernels.py
	@PYTHONPATH=. $(GPU_PYTHON) scripts/dev/bench_kernels.py --workdir $(GPU_OUT) $(GPU_ARGS)

gpudecode:  ## there, with README's packages: decode at Qwen3-30B-A3B's size, 4 to 12 GiB, out/scale
	@PYTHONPATH=. $(GPU_PYTHON) scripts/bench_decode.py --workdir out/scale --preset qwen3-30b-a3b \
		--budgets_mib all,4096,6144,8192,10240,12288 --prompt_tokens 128 \
		--settings fetch:Q3_K,fetch:Q2_K,use_low_if_resident,fetch_low,hobbit,floor,host,hybrid
	@PYTHONPATH=. $(GPU_PYTHON) scripts/bench_decode.py --workdir out/decode

oracles: environment  ## tests against llama.cpp, ggml and PyTorch (2 minutes); says what to install
	@echo "oracles: a test whose library is missing is skipped; to have them all:"
	@echo "  $(BIN)/pip install -c constraints.txt -e '.[torch,llama-cpp]'"
	@$(BIN)/python -m pytest -q -m oracle $(PYTEST_ARGS)

slow: environment  ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

clusters: environment  ## sweeps on this machine, a real Slurm and Ray, with processes killed (4 minutes)
	@echo "clusters: a test whose daemons or packages are missing is skipped and named; to have them all:"
	@echo "  apt-get install slurm-wlm munge; $(BIN)/pip install -c constraints.txt -e '.[slurm,ray]'"
	@$(BIN)/python -m pytest -q -n 2 -m cluster $(PYTEST_ARGS)

reference: environment  ## train the reference model anew into out/reference (about an hour, resumable)
	@$(BIN)/python scripts/reference_model/train_reference.py --workdir out/reference

sweep: environment  ## the full sweep on the shipped model (an hour and a half, resumable)
	@$(BIN)/python scripts/sweep.py --config configs/reference.py --workdir out/reference_sweep
	@$(BIN)/python scripts/report.py --workdir out/reference_sweep

frontier: environment  ## quality against bytes, by encoder and signal (about an hour, resumable)
	@$(BIN)/python scripts/sweep.py --config configs/frontier.py --workdir out/frontier
	@$(BIN)/python scripts/report.py --workdir out/frontier

scale: environment  ## a decode at Qwen3-30B-A3B's size under 4 GiB of experts (19 GB of disk, out/scale)
	@$(BIN)/python scripts/bench_decode.py --workdir out/scale --preset qwen3-30b-a3b \
		--budgets_mib 4096 --settings fetch --prompt_tokens 16 --tokens 16 --repeats 1

clean:  ## remove .venv and caches; out/ stays
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
