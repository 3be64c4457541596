# Everything that is done with a clone, each by one command; `make` alone lists them.
#
#   PYTHON=python3.12 make test     another Python for the environment (or, with `make gpu`, the one to use)
#   OUT=folder make gpu             another folder for the benchmarks' results

PYTHON ?= python3
JOBS ?= 2
OUT ?= benchmarks/results

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
OTHER_CXX_FILES := $(wildcard docs/cpp/*.cpp tests/*/*.cpp)
BUILD_FILES := setup.py csrc/flags.py $(CXX_FILES) $(wildcard ddrf_fast/ops/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo page test lint format bench gpu clean

help:
	@echo 'make demo     set up .venv, compile, and fuse the sample pair'
	@echo 'make page     the same set-up, with Gradio, and open the page to try it'
	@echo 'make test     set up .venv, compile, and run the tests'
	@echo 'make lint     check style and types'
	@echo 'make format   put the style right'
	@echo 'make bench    run the benchmarks on this CPU'
	@echo 'make gpu      on a machine with a GPU: build with CUDA, run the GPU tests and the benchmarks'
	@echo 'make clean    remove what was compiled and cached; .venv stays'

demo: $(VENV)/.compiled
	$(BIN)/ddrf-fast demo -o ddrf_fast_demo

page: $(VENV)/.compiled
	DDRF_FAST_SKIP_CPP=1 $(PIP) --no-build-isolation --editable '.[demo]'
	$(BIN)/ddrf-fast demo

test: $(VENV)/.developing $(VENV)/.compiled
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal  # each worker has its core

lint: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(OTHER_CXX_FILES)

format: $(VENV)/.developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) $(OTHER_CXX_FILES)

bench: $(VENV)/.developing $(VENV)/.compiled
	mkdir -p $(OUT)
	for op in dynamic_conv degrade model efficientnet; do \
	  $(BIN)/python -m benchmarks.run $$op --device cpu --json $(OUT)/cpu--$$op--full.json || exit 1; \
	done

gpu:
	PYTHON=$(PYTHON) OUT=$(OUT) bash benchmarks/gpu.sh

clean:
	rm -rf build dist *.egg-info ddrf_fast/*.so ddrf_fast/_build.json $(VENV)/.compiled
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment in four steps, each repeated only when what it depends on has changed. torch comes first, so that
# the compilation uses the very torch that is installed and nothing is fetched twice (hence no build isolation).

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("ddrf_fast needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	DDRF_FAST_SKIP_CPP=1 $(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	DDRF_FAST_SKIP_CPP=1 $(PIP) --no-build-isolation --editable '.[train,triton,export,hub,video,demo,test,bench,dev]'
	touch $@

# Not through pip, which would compile every file again each time.
$(VENV)/.compiled: $(VENV)/.installed $(BUILD_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
