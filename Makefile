# micro: `make build`, `make demo`, `make test`. Each target does its own set-up; a second call starts at once.
#   VENV      virtual environment to use or create      (default .venv)
#   PYTHON    interpreter the environment is made from  (default python3)
#   PIP_ARGS  arguments for every pip install, such as another index or a torch build
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
BUILD := build/dev
JOBS ?= $(shell nproc)

PY := $(abspath $(VENV))/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
STAMP := $(abspath $(VENV))/.micro

.PHONY: build
build: $(BUILD)/build.ninja
	@ninja -C $(BUILD) -k 0 -j $(JOBS)

$(BUILD)/build.ninja: $(STAMP)/editable
	@cmake -S . -B $(BUILD) -G Ninja -DMICRO_DEV=ON -DMICRO_TESTS=ON -DMICRO_WERROR=ON -DPython_EXECUTABLE=$(PY)

$(STAMP)/editable: pyproject.toml
	@mkdir -p $(STAMP)
	$(PIP) --no-deps --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace --editable .
	@touch $@
