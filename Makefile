# The two commands:   make train     make test
# The developer's:    make test-all  make bench  make lint  make format  make docs  make gpu
#                     make sanitize  make profile  make clean
# A fresh machine needs Python >= 3.10 with pip and headers, a C++ compiler and make; the rest comes from pip.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SHARED := -n 2 --dist worksteal
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help train test test-all bench profile lint format docs gpu gpu-build gpu-test gpu-bench sanitize clean setup

help:
	@sed -n '1,4s/^# //p' Makefile

setup: $(VENV)/.built

# Two stamps: the packages follow constraints.txt, the compiled extension follows the C++ side.
$(VENV)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install -r constraints.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml CMakeLists.txt $(CPP_SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

train: setup
	$(BIN)/lit-fast pretrain $(ARGS)

# Two processes share the tests; ARGS="-n 0" runs them in one, where --pdb works. They start several hundred others,
# which all would compile lit_fast anew where the shell says that Python should not keep what it has compiled.
test test-all: export PYTHONDONTWRITEBYTECODE =

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) $(ARGS)

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -m 'not gpu' $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

profile: setup
	$(BIN)/python -m profiling $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cpp tests/csrc/*.cu)

docs: setup $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html $(ARGS)

$(VENV)/.docs: docs/requirements.txt $(VENV)/.installed
	$(PIP) install -r docs/requirements.txt
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cpp tests/csrc/*.cu)

# For a GPU machine, which may have no network: the active python and its own torch, the extension built in place.
# Its three parts may run one by one, where a command may not take long.
gpu:
	$(MAKE) gpu-build
	$(MAKE) gpu-test
	$(MAKE) gpu-bench

gpu-build:
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
	cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DLIT_FAST_CUDA=on \
	  -DPython_EXECUTABLE="$$(command -v $(PYTHON))" -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/gpu
	cmake --install build/gpu --prefix .

gpu-test:
	$(PYTHON) -m pytest -m gpu

gpu-bench:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# Memory errors and undefined behaviour: the programs of tests/csrc, then a copy of the package with the extension built
# so, in the interpreter beneath the venv, for which the installed extension does not exist. Its allocations count too
# (PYTHONMALLOC); what Python and torch never free at exit is not ours (detect_leaks). The allocator is the sanitizer's,
# so what the C library's keeps cannot be tested.
SANITIZED := build/sanitize
SANITIZERS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
PRELOADED = $(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))
sanitize: setup
	CXXFLAGS="$(SANITIZERS)" $(BIN)/python -m pytest tests/csrc $(ARGS)
	SKBUILD_CMAKE_DEFINE="LIT_FAST_SANITIZE=ON;LIT_FAST_CUDA=off" \
	  $(PIP) install --no-build-isolation --no-deps --upgrade --target $(SANITIZED) .
	cd $(SANITIZED) && rm -rf tests csrc docs
	cp -r tests csrc docs pyproject.toml $(SANITIZED)
	paths=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') && \
	python=$$($(BIN)/python -c 'import sys; print(sys._base_executable)') && \
	cd $(SANITIZED) && PYTHONPATH="$$PWD:$$paths" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$(PRELOADED)" "$$python" -m pytest -p no:cacheprovider tests/optim tests/test_ops.py tests/test_phase_clock.py $(ARGS) \
	  --deselect tests/test_ops.py::test_kept_memory_comes_back_without_page_faults

clean:
	rm -rf build dist $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache
