# The few verbs of this repository. Each makes .venv first if it is missing or older than what it was made from.
#
#   PYTHON=python3.12       the interpreter to make .venv with
#   TORCH_INDEX=URL         where torch comes from, for instance an index of builds for CPUs only

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
VLLM := .venv-vllm/bin/python
RAY := .venv-ray/bin/python
OPENVINO := .venv-openvino/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo base test test-slow test-vllm check lint types format bench bench-pages bench-kernels bench-gpu bench-gpu-vllm bench-gpu-train vllm-env ray-env openvino-env kernel-envs results docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## *' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/heliostat/ops/native/*.cpp src/heliostat/ops/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "heliostat needs Python 3.11 or newer, this is %s: make PYTHON=..." % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv: $(STAMP)

demo: $(STAMP)  ## one task, every sharing, tables and out/demo/report.html
	$(BIN)/heliostat demo

test: lint  ## what CI runs: lint, types (beside the tests) and all tests but the slow ones
	$(BIN)/mypy & types=$$!; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal; tests=$$?; \
	  wait $$types && exit $$tests

test-slow: $(STAMP)  ## the tests that take minutes: larger models, real clients, a browser, a soak; with vllm-env and ray-env there, those too
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,clients]'
	HELIOSTAT_VLLM=$(abspath $(wildcard $(VLLM))) HELIOSTAT_RAY=$(abspath $(wildcard $(RAY))) $(BIN)/python -m pytest -m slow -rs

test-vllm: $(STAMP) .venv-vllm/.stamp  ## every sharing on vLLM, beside the embedded engine, workers and whole servers; a quarter of an hour
	HELIOSTAT_VLLM=$(abspath $(VLLM)) HELIOSTAT_RAY=$(abspath $(wildcard $(RAY))) $(BIN)/python -m pytest -m slow -rs tests/slow/test_vllm.py tests/slow/test_vllm_rows.py tests/slow/test_vllm_serving.py tests/slow/test_networks.py tests/slow/test_ray.py

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

SHORT := out/bench/short
TRACES ?=
PYTHON_VLLM ?= $(VLLM)

bench: $(STAMP)  ## a short version of everything, into out/bench: no 95th percentiles
	rm -rf $(SHORT)
	$(BIN)/heliostat bench workflow --quick --members 4 --compare independent,multilora,icarus --out $(SHORT)/react
	$(BIN)/heliostat bench workflow --quick --workflow reflexion --members 4 --compare independent,prefillshare --out $(SHORT)/reflexion
	$(BIN)/heliostat bench decode --quick --members 4 --compare independent,multilora,sun --shape 24M --out $(SHORT)/decode
	$(BIN)/python -m heliostat.bench.profile --short --docs $(SHORT)
	$(BIN)/python -m heliostat.bench.routing --decisions 500 --docs $(SHORT)
	$(BIN)/python -m heliostat.bench.step_time --repeats 5 --docs $(SHORT)
	$(BIN)/heliostat bench train --hidden-size 128 --batch 1 --repeats 5 --loss-steps 0 --out $(SHORT)/tuners

bench-pages: $(STAMP)  ## what docs/results holds of speed, measured again: two hours; TRACES="FILE ..." replays them, too
	$(BIN)/python -m heliostat.bench.step_time
	OMP_NUM_THREADS=1 $(BIN)/heliostat bench train --hidden-size 384 --batch 2 --repeats 5 --out docs/results
	$(BIN)/python -m heliostat.bench.routing
	$(BIN)/python -m heliostat.bench.profile
	$(BIN)/heliostat bench decode --members 4,8 --running 1,4 --docs docs/results
	$(BIN)/heliostat bench workflow --workflow reflexion --members 4 --compare independent,prefillshare --loads 0.8,1 --docs docs/results
	$(BIN)/heliostat bench workflow --workflow react --members 2,4,8 --compare multilora,icarus --docs docs/results
	OMP_NUM_THREADS=1 $(BIN)/python -m heliostat.bench.steps --shape 24M --threads 1 --seconds 90 --out docs/results/costs.json
	OMP_NUM_THREADS=1 $(BIN)/python -m heliostat.bench.validating --costs docs/results/costs.json
	$(BIN)/heliostat bench workers --costs docs/results/costs.json --members 4 --popularity zipf:1.2 --compare sun --docs docs/results
	$(BIN)/python -m heliostat.bench.qsun_decode
	$(BIN)/python -m heliostat.bench.speculate_stand
	$(BIN)/heliostat bench speculate out/speculate/family --draft small --prompts out/speculate/prompts.jsonl --test out/speculate/test.jsonl --held-out out/speculate/held-out.jsonl --members told=out/speculate/told.jsonl,retold=out/speculate/retold.jsonl --docs docs/results
	$(if $(TRACES),$(BIN)/python -m heliostat.bench.replaying $(TRACES))
	HELIOSTAT_VLLM=$(wildcard $(VLLM)) HELIOSTAT_OPENVINO=$(wildcard $(OPENVINO)) $(BIN)/python -m heliostat.bench.engine
	$(BIN)/python -m heliostat.bench.readme

vllm-env: .venv-vllm/.stamp  ## .venv-vllm: vLLM for CPUs, in an environment of its own

ray-env: $(STAMP) .venv-ray/.stamp  ## .venv-ray: Ray Serve, in an environment that sees .venv behind its own

openvino-env: .venv-openvino/.stamp  ## .venv-openvino: OpenVINO GenAI, in an environment of its own

kernel-envs: .venv-ggml/.stamp .venv-aqlm/.stamp  ## .venv-ggml, .venv-aqlm: llama.cpp's and AQLM's low-bit kernels, for bench-kernels

bench-kernels: $(STAMP)  ## low-bit products beside dense ones and those of kernel-envs, into docs/results
	HELIOSTAT_GGML=$(wildcard .venv-ggml/ggml/src) HELIOSTAT_AQLM=$(if $(wildcard .venv-aqlm/src),.venv-aqlm/bin/python:.venv-aqlm/src/aqlm/inference_kernels/numba_kernel.py) $(BIN)/heliostat bench kernels --out docs/results

.venv-vllm/.stamp .venv-ray/.stamp .venv-openvino/.stamp .venv-ggml/.stamp .venv-aqlm/.stamp: .venv-%/.stamp: scripts/peer_env.py
	$(PYTHON) scripts/peer_env.py $* .venv-$*
	@touch $@

bench-gpu: $(STAMP)  ## on a CUDA device: its tests, decoding, attention, prefill, families of an 8B shape
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,gpu]'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m heliostat.bench.gpu

bench-gpu-vllm: $(STAMP)  ## on a CUDA device: a family on vLLM; PYTHON_VLLM=of an environment with vLLM and heliostat
	$(BIN)/python -m heliostat.bench.gpu_vllm --python $(PYTHON_VLLM)

bench-gpu-train: $(STAMP)  ## on a CUDA device: tuners side by side on an 8B shape
	$(BIN)/heliostat bench train --device cuda --tuners lora,paca --hidden-size 4096 --layers 32 --vocabulary 128256 --batch 1 --length 2048 --spoken 512 --r 32 --no-peft --loss-steps 0 --budget-mib 81920 --out out/bench-gpu

base: $(STAMP)  ## make the embedded base again, into out/base; an hour on one core
	$(BIN)/heliostat pretrain recipes/base.yaml

results: $(STAMP)  ## all tasks, three seeds, into docs/results/; hours, and can be resumed
	$(BIN)/python -m heliostat.bench.results --readme README.md
	$(BIN)/python -m heliostat.bench.union
	$(BIN)/python -m heliostat.bench.reach
	$(BIN)/python -m heliostat.bench.tuners

docs: $(STAMP)  ## every command, verb and link that the pages name exists
	$(BIN)/python -m pytest -q tests/house/test_readme.py

clean:  ## remove what tools and runs made, and keep .venv
	rm -rf out build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
