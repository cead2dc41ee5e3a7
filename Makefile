PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moves right over a striped background

.PHONY: help install demo test lint docs format gpu clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/:/'

$(VENV)/installed: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,docs]"
	touch $@

install: $(VENV)/installed   ## a virtual environment with the project and its tools

demo: install    ## a video from a prompt, with and without PAB: outputs/demo.mp4, outputs/demo.png and a table
	$(BIN)/pab generate --compare --prompt "$(PROMPT)" --output outputs/demo.mp4

test: install    ## the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal

lint: install    ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

docs: install    ## the documentation as HTML: outputs/docs/docs/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . outputs/docs

format: install  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

gpu:             ## on a machine with a GPU: build in place, GPU tests, short benchmarks into bench/results.csv
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest -q -m gpu -n auto --maxprocesses 14 tests
	$(PYTHON) -m pytest -q -m gpu -k "(480p or latte) and not compile and not efficient" bench --benchmark-columns=median

clean:           ## remove what was built
	rm -rf build dist *.egg-info pab_kernels/_C*.so outputs $(VENV)/installed
