# make demo    set up .venv, encode examples/ and write features and pictures to demo/
# make test    the same, then all tests
# make lint    ruff and mypy
# make gpu     the GPU tests and the benchmarks, with the python3 at hand: installs nothing
# make clean   remove what the others wrote, .venv excepted
#
# PYTHON, VENV, DEMO and PYTEST_ARGS can be given: make test PYTHON=python3.13 PYTEST_ARGS="-k rope"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := demo
.NOTPARALLEL:
.PHONY: demo test lint gpu clean

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt
BARE := PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
EXAMPLES := $(sort $(wildcard examples/*.png examples/*.jpg))

# The stamps carry a checksum of what they depend on: a change of any of the three installs again, nothing else does.
KEY := $(shell cat pyproject.toml setup.py constraints.txt | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/.installed-$(KEY)
INSTALLED_DEV := $(VENV)/.installed-dev-$(KEY)

# A worker per core, each with one thread; a single core runs the tests in pytest's own process.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS := $(if $(filter 1,$(CORES)),,-n auto --maxprocesses 8 --dist worksteal)

demo: $(INSTALLED)
	@$(BIN)/hrvlm encode $(EXAMPLES) --out $(DEMO)
	@echo "demo: features and pictures of $(words $(EXAMPLES)) images are in $(DEMO)/"

test: $(INSTALLED_DEV) demo
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --benchmark-disable $(WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
	  || { echo "make gpu: $(PYTHON) has no torch that sees a GPU" >&2; exit 1; }
	@$(PYTHON) -c 'import pytest_benchmark' 2>/dev/null \
	  || { echo "make gpu: the benchmarks need pytest-benchmark for $(PYTHON)" >&2; exit 1; }
	$(BARE) -m pytest tests -m gpu $(PYTEST_ARGS)
	$(BARE) -m pytest benchmarks $(PYTEST_ARGS)

clean:
	rm -rf $(DEMO) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hrvlm kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(INSTALLED): | $(BIN)/pip
	@echo "installing hrvlm into $(VENV) (minutes the first time: torch is large)"
	@$(PIP_INSTALL) -e .
	@rm -f $(VENV)/.installed-* && touch $@

$(INSTALLED_DEV): | $(BIN)/pip
	@echo "installing hrvlm and its development tools into $(VENV) (minutes the first time: torch is large)"
	@$(PIP_INSTALL) -e '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $@ $(INSTALLED)
