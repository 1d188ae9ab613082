# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
#
# PYTHON=...  use this interpreter as it is: no .venv, no install (machines without a network)
# DEMO=short  the demo with configs/runs/demo-short.yaml: proves that it runs, learns little
# PIP_FLAGS=  passed to every pip install, for example an index with CPU-only torch wheels

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BASE_PYTHON ?= python3
PIP_FLAGS ?=
TEST_ARGS ?=
DEMO ?= full
DEMO_DATA ?= demo-data
LOGS ?= logs

# An interpreter that the caller names is taken as it is; otherwise ours is made first.
ifeq ($(filter command environment,$(origin PYTHON)),)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
endif

$(if $(filter-out full short,$(DEMO)),$(error DEMO is full or short, not '$(DEMO)'))
DEMO_CONFIG := configs/runs/$(if $(filter short,$(DEMO)),demo-short,demo).yaml
# One name per setting: an interrupted demo goes on where it stopped, a finished one only shows its result.
DEMO_RUN := $(if $(filter short,$(DEMO)),demo-short,demo)

SOAK ?= 3
SOAK_SEED ?= 1

.PHONY: help install demo test cluster soak lint gpu gpu-test gpu-bench clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)

# Stamps: installing again is only worth it when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing Clipyard into $(VENV) (the first time pip downloads torch: minutes, and several GB with CUDA)"
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing Clipyard and its test tools into $(VENV) (the first time pip downloads torch: minutes, and several GB with CUDA)"
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --editable '.[test]'
	@touch $@ $(VENV)/.installed

install: $(INSTALLED)  ## make .venv and install Clipyard into it

demo: $(INSTALLED)  ## make the demo shards, train on them, evaluate, print the result
	$(PYTHON) -m training.commands.main make-demo-data $(DEMO_DATA)
	$(PYTHON) -m training.main --config $(DEMO_CONFIG) --logs $(LOGS) --name $(DEMO_RUN) --resume latest \
	    --train-data '$(DEMO_DATA)/train/*.tar' --val-data '$(DEMO_DATA)/val/*.tar' \
	    --zeroshot-data $(DEMO_DATA)/zeroshot --retrieval-data $(DEMO_DATA)/retrieval
	@$(PYTHON) -m training.commands.main demo-result $(LOGS)/$(DEMO_RUN)

# Two test processes with one thread each: tests that start ranks of their own would fight over more.
test: $(INSTALLED_TEST)  ## the whole suite, with the layer, style and type checks
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal --timeout 300 $(TEST_ARGS)

# One after another: each has the whole cluster, and its jobs all the cores.
cluster: $(INSTALLED_TEST)  ## the tests on a real SLURM, where sinfo answers (tests/cluster/slurm-sandbox.sh starts one)
	CLIPYARD_REQUIRE_SLURM=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -v --timeout 900 tests/cluster

# Bit-equal to an undisturbed run in the end, or it fails.
soak: $(INSTALLED_TEST)  ## one fault after another at random, for SOAK minutes
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.faults.soak --minutes $(SOAK) --seed $(SOAK_SEED)

lint: $(INSTALLED_TEST)  ## style, types and layers only
	$(PYTHON) -m pytest -q tests/test_layers.py

# A test that fails does not keep the benchmark from running; the code in the end is of whichever failed.
gpu: $(INSTALLED_TEST)  ## gpu-test, then gpu-bench
	code=0; $(MAKE) gpu-test || code=$$?; $(MAKE) gpu-bench || code=$$?; exit $$code

gpu-test: $(INSTALLED_TEST)  ## the tests that need a GPU
	$(PYTHON) -m pytest -q -m gpu tests

gpu-bench: $(INSTALLED_TEST)  ## the GPU benchmark of the step into benchmarks/results (8 minutes)
	PYTHON=$(PYTHON) bash benchmarks/gpu_all.sh

clean:  ## remove .venv and the demo shards; what was trained stays under logs
	rm -rf $(VENV) $(DEMO_DATA)
