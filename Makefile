# Pythia's commands for people. `make` alone lists them.
#
#   MODEL=...    what to serve: smollm2-135m-instruct (default), tiny-llama, a folder or a hub name
#   CLUSTER=...  a cluster file for `make up`
#   PYTHON=...   the Python (3.11 or later) that .venv is made with
#   KIND=cpu     leave the GPUs alone

MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell command -v python3.11 || command -v python3 || echo python3)
endif
ifeq ($(origin KIND),undefined)
KIND := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
endif

MODEL ?=
CLUSTER ?=
PYTEST_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
BENCHMARKS ?= overhead transfer core idle simulator

VENV := .venv
RUN := $(VENV)/bin
MODEL_OPTION := $(if $(MODEL),--model $(MODEL))
PACKAGES := coordinator prefill decode transfer cluster
SOURCES := $(PACKAGES) tests examples

INSTALLED := $(VENV)/installed-$(KIND)
INSTALLED_DEVELOPMENT := $(VENV)/installed-$(KIND)-development
INSTALL_INPUTS := requirements/$(KIND).txt requirements/installer.txt pyproject.toml

.PHONY: help demo up down test check bench install model lock clean

help:
	@echo "make demo     install, prepare a small model, run an example workflow on a cluster, stop"
	@echo "make up       the same cluster, and it stays up; make down or Ctrl-C stops it"
	@echo "make test     every check and every test"
	@echo "make check    format, lint, types and imports"
	@echo "make bench    the measurements; results as JSON in run/"
	@echo "make install  only fill .venv"
	@echo "make model    only prepare the model"
	@echo "make lock     pin newer packages in requirements/"
	@echo "make clean    remove .venv and what tools leave behind; prepared models stay"

install: $(INSTALLED)

$(INSTALLED): $(INSTALL_INPUTS)
	@$(PYTHON) -m cluster.install --folder $(VENV) --kind $(KIND)
	@touch $@

$(INSTALLED_DEVELOPMENT): $(INSTALL_INPUTS) requirements/dev.txt
	@$(PYTHON) -m cluster.install --folder $(VENV) --kind $(KIND) --development
	@touch $(INSTALLED) $@

model: $(INSTALLED)
	@$(RUN)/python -m cluster.model $(MODEL)

demo: model
	@$(RUN)/pythia demo $(MODEL_OPTION)

up: model
	@$(RUN)/pythia up $(CLUSTER) $(MODEL_OPTION)

down:
	@if [ -x $(RUN)/pythia ]; then $(RUN)/pythia down; else echo "nothing is installed"; fi

bench: model
	@mkdir -p run
	@for name in $(BENCHMARKS); do \
	  echo "bench $$name"; \
	  $(RUN)/pythia bench $$name $(MODEL_OPTION) $(BENCH_ARGUMENTS) --json run/bench-$$name.json || exit 1; \
	done

check: $(INSTALLED_DEVELOPMENT)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: check
	$(RUN)/python -m pytest -p no:cacheprovider --verbose --timeout 600 --durations 15 $(PYTEST_ARGUMENTS)

# torch is locked from its CPU build, which has no dependencies on CUDA packages, and pinned
# without the suffix, so that any index that has the version will do.
UV_LOCK = $(RUN)/uv pip compile --quiet --upgrade --no-header --no-annotate \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: $(INSTALLED_DEVELOPMENT)
	$(UV_LOCK) --override requirements/cpu.overrides pyproject.toml requirements/cpu.in -o requirements/cpu.txt
	sed -i 's/^\(torch==.*\)+cpu$$/\1/' requirements/cpu.txt
	$(UV_LOCK) --override requirements/gpu.overrides pyproject.toml requirements/gpu.in -o requirements/gpu.txt
	$(UV_LOCK) -c requirements/cpu.txt -c requirements/gpu.txt --override requirements/dev.overrides \
	  requirements/dev.in -o requirements/dev.txt

clean:
	rm -rf $(VENV) run dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
