# make demo    set up .venv, encode examples/ (features and pictures in demo/), read the text in some
# make test    the same, then all tests
# make test-newest  all tests with the newest release of every dependency, in .venv-newest
# make test-oldest  all tests with the lowest release of every dependency that pyproject.toml allows, in .venv-oldest
# make lint    ruff and mypy
# make tune    time the kernels' tile sizes on a GPU and write their tables: before make gpu
# make gpu     the GPU tests and benchmarks in under ten minutes, with the python3 at hand
# make pretended  the GPU tests and benchmarks on a pretended GPU: devices, waits, signatures; no numbers
# make compiled  all kernels as compiled for sm_80 and sm_90, executed on the CPU: results and docs/compiled.md
# make conformance  transformers' own common tests, fetched with its source distribution, on our classes
# make conformance-newest  the same under the newest releases, where make test-newest has put them
# make exports  exported files, compiled models and towers, by exporters and Inductor (minutes): tests/tried/exports.json
# make sanitize  the kernels on small shapes under compute-sanitizer, on a GPU
# make test-scale  hrvlm embed under twenty kills, a dying actor, a full disk (minutes): benchmarks/results/scale_kills.json
# make fuzz    a million odd inputs for all that takes something from outside (minutes)
# make fuzz-images  read 100 000 mutated image files under a memory and time rule (minutes)
# make clean   remove what the others wrote, .venv excepted
#
# PYTHON, VENV, NEWEST, OLDEST, DEMO, PYTEST_ARGS, TUNE_ARGS and GPU_ARGS can be given: make test
# PYTEST_ARGS="-k rope", make test-oldest PYTHON=python3.10, make gpu PYTHON=python3.13 GPU_ARGS="--only tests"
# (all: python3 -m benchmarks.gpu_run --help)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := demo
.NOTPARALLEL:
.PHONY: demo test test-newest test-oldest lint compiled tune gpu sanitize fuzz fuzz-images exports clean pretended test-scale conformance conformance-newest

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
DEMO ?= demo
PYTEST_ARGS ?=
GPU_ARGS ?=
TUNE_ARGS ?=

BIN := $(VENV)/bin
PIP_ARGS := install --quiet --disable-pip-version-check --no-input
PIP_INSTALL := $(BIN)/python -m pip $(PIP_ARGS) -c constraints.txt
BARE := PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
COMMIT = $$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)
PRETENDED = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p pretended_gpu.pytest_plugin -q --benchmark-disable \
  --commit-of-report $(COMMIT)
COMPILED := benchmarks/results/compiled_kernels.jsonl
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
	@echo "demo: the reader that comes with hrvlm, on text and on some that it can't read (sideways.png):"
	@$(BIN)/hrvlm generate --each $(addprefix --image ,$(sort $(wildcard examples/line_*.png examples/text_*.png)) \
	  examples/sideways.png)

test: $(INSTALLED_DEV) demo
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --benchmark-disable $(WORKERS) $(PYTEST_ARGS)

# The dependencies come first, and what is installed of them then bounds the tools around them.
test-newest:
	@test -x $(NEWEST)/bin/pip || $(PYTHON) -m venv $(NEWEST)
	@echo "installing the newest releases into $(NEWEST) (minutes the first time: torch is large)"
	@$(NEWEST)/bin/python -m pip $(PIP_ARGS) --upgrade --upgrade-strategy eager -e .
	@$(NEWEST)/bin/python tests/releases.py installed > $(NEWEST)/core.txt
	@$(NEWEST)/bin/python -m pip $(PIP_ARGS) --upgrade -c $(NEWEST)/core.txt -e '.[dev]'
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python tests/releases.py newest $(WORKERS) -- $(PYTEST_ARGS)

test-oldest:
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@echo "installing the lowest releases into $(OLDEST) (minutes the first time: torch is large)"
	@$(OLDEST)/bin/python tests/releases.py lowest > $(OLDEST)/core.txt
	@$(OLDEST)/bin/python -m pip $(PIP_ARGS) -c $(OLDEST)/core.txt -e '.[dev]'
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python tests/releases.py oldest $(WORKERS) -- $(PYTEST_ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compiled: $(INSTALLED_DEV)
	@rm -f $(COMPILED)
	@OMP_NUM_THREADS=1 RECORD_COMPILED=1 $(BIN)/python -m pytest --benchmark-disable $(WORKERS) -k "compil or spills" \
	  tests/kernels tests/benchmarks/test_tune.py tests/benchmarks/test_spills.py
	@LC_ALL=C sort -u -o $(COMPILED) $(COMPILED)
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=0 COMPILED=all COMPILED_OUT=benchmarks/results \
	  $(BIN)/python -m pytest --benchmark-disable $(WORKERS) tests/compiled
	@for chip in sm_80 sm_90; do OMP_NUM_THREADS=1 KERNELS_ON=$$chip COMPILED_OUT=benchmarks/results \
	  $(BIN)/python -m pytest --benchmark-disable $(WORKERS) -k "not compile" tests/kernels; done
	@PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m benchmarks.compiled.page

exports: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=1 HRVLM_EXPORTS=1 $(BIN)/python tests/releases.py part exports $(WORKERS) -- \
	  tests/export tests/vlm/test_compiled.py tests/towers/test_compiled.py

test-scale: $(INSTALLED_DEV)
	@OMP_NUM_THREADS=1 HRVLM_SCALE=1 TRITON_INTERPRET=0 $(BIN)/python -m pytest --benchmark-disable -v -s \
	  tests/embed/on_ray/test_kills.py

conformance: $(INSTALLED_DEV)
	@$(BIN)/python -m tests.conformance $(WORKERS) $(PYTEST_ARGS)

conformance-newest:
	@$(NEWEST)/bin/python -m tests.conformance $(WORKERS) $(PYTEST_ARGS)

tune:
	$(BARE) -m benchmarks.tuning $(TUNE_ARGS)

gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
	  || { echo "make gpu: $(PYTHON) has no torch that sees a GPU" >&2; exit 1; }
	@$(PYTHON) -c 'import pytest_benchmark' 2>/dev/null \
	  || { echo "make gpu: the benchmarks need pytest-benchmark for $(PYTHON)" >&2; exit 1; }
	@$(BARE) -m benchmarks.gpu_run $(GPU_ARGS)

pretended: $(INSTALLED_DEV)
	$(PRETENDED) -m gpu tests --not-carried tests/pretended_gpu/not_carried.json \
	  --report benchmarks/results/pretended_gpu-tests.json
	results=$$(mktemp -d) && $(PRETENDED) benchmarks --small --seconds 0.01 --budget 86400 --eager-compile \
	  --results $$results \
	  --not-carried tests/pretended_gpu/not_carried.json \
	  --report benchmarks/results/pretended_gpu-suites.json && rm -r $$results
	results=$$(mktemp -d) && PYTHONPATH=kernels/pretended_gpu/everywhere:kernels:. OMP_NUM_THREADS=1 $(BIN)/python \
	  -m benchmarks.gpu_run --small --minutes 120 --without tests --results $$results --commit $(COMMIT) \
	  && cp $$results/gpu_run.json benchmarks/results/pretended_gpu-run.json && rm -r $$results

sanitize:
	@command -v compute-sanitizer >/dev/null \
	  || { echo "make sanitize: compute-sanitizer is not found; it comes with the CUDA toolkit" >&2; exit 1; }
	status=0; for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.kernels.sanitize \
	    || status=$$?; \
	done; exit $$status

fuzz: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.hardening.fuzz --out fuzz.json

fuzz-images: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.images.fuzz --out image_fuzz.json

clean:
	rm -rf $(DEMO) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hrvlm kernels tests benchmarks recipes examples -name __pycache__ -type d -prune -exec rm -rf {} +

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
