# The few verbs of this repository. Each makes .venv first if it is missing or older than what it was made from.
#
#   PYTHON=python3.12       the interpreter to make .venv with
#   TORCH_INDEX=URL         where torch comes from, for instance an index of builds for CPUs only

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help demo base test test-slow check lint types format bench bench-gpu results docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## *' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/heliostat/ops/native/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "heliostat needs Python 3.11 or newer, this is %s: make PYTHON=..." % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv: $(STAMP)

demo: $(STAMP)  ## one task, every sharing, tables and out/demo/report.html
	$(BIN)/heliostat demo

test: lint types  ## what CI runs: lint, types and all tests but the slow ones
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take minutes: larger models, real clients, a browser, a soak, sanitizers
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,clients]'
	$(BIN)/python -m pytest -m slow -rs

check: lint types  ## lint, types and the rules of the house, in seconds
	$(BIN)/python -m pytest -q tests/house

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)  ## let ruff lay out the code and mend what it can
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

bench: $(STAMP)  ## a training step beside its cost model, decoding beside transformers, a routing decision
	$(BIN)/python -m heliostat.bench.step_time
	$(BIN)/python -m heliostat.bench.decode
	$(BIN)/python -m heliostat.bench.routing

bench-gpu: $(STAMP)  ## on a CUDA device: the tests that need one, and decoding; writes docs/results/decode-gpu.md
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m heliostat.bench.decode --device cuda

base: $(STAMP)  ## make the embedded base again, into out/base; an hour on one core
	$(BIN)/heliostat pretrain recipes/base.yaml

results: $(STAMP)  ## all tasks, three seeds, into docs/results/; hours, and can be resumed
	$(BIN)/python -m heliostat.bench.results --readme README.md
	$(BIN)/python -m heliostat.bench.reach

docs: $(STAMP)  ## every command, verb and link that the pages name exists
	$(BIN)/python -m pytest -q tests/house/test_readme.py

clean:  ## remove what tools and runs made, and keep .venv
	rm -rf out build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
