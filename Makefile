# Everything a newcomer types. `make demo` and `make test` set themselves up; a second call starts at once.
#
#   make demo                        train, evaluate and report on real pictures (DEMO_ARGS=--short: a minute)
#   make test                        all tests (TEST_ARGS="-k mask -x": some of them)
#
# Options, on the command line or in the environment:
#   PYTHON=python3.12                which Python (3.11 or newer) the environment is made with
#   SYSTEM_SITE_PACKAGES=1           see the system's packages: keeps the torch of a container
#   TORCH=torch==2.13.0              another build of torch than the default below
#   TORCH_PIP_ARGS="--index-url ..." where torch comes from, such as PyTorch's smaller CPU-only builds

SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet --no-input
STAMPS := $(VENV)/stamps

# A GPU machine takes the newest CUDA build; without one the version is pinned, so that demo numbers are comparable.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(HAS_GPU),0)
TORCH ?= --requirement requirements/torch-cpu.txt
else
TORCH ?= 'torch>=2.11'
endif
TORCH_PIP_ARGS ?=
DEMO_ARGS ?=
ABLATION_ARGS ?=
TEST_ARGS ?=
MUTANTS_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
SOAK_ARGS ?=
AUDIT_ARGS ?=
SYSTEM_SITE_PACKAGES ?=

LINTED := .
SHELL_SCRIPTS := .ci/run $(wildcard examples/*/*.sh examples/*/*.sbatch)

# Every target that the list below shows is a command, whatever files there are.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' Makefile)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(STAMPS)/installed ## the environment in .venv
	@:

setup-data: setup $(STAMPS)/data ## the same with DALI, pyarrow and webdataset (800 MB): no data test is skipped
	@:

demo: setup ## prepare the data, train with and without LaVer, evaluate, write runs/demo/report.md
	@$(BIN)/python tools/run_demo.py $(DEMO_ARGS)

ablation: setup ## what each part of the method does, over seeds and tasks; writes runs/ablation/summary.json
	@$(BIN)/python tools/reproduce_ablation.py $(ABLATION_ARGS)

# Two workers, a whole file each: the files that start process groups wait for each other's ranks most of the time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: setup ## the tests; what did not run, and why, stands at the end
	@$(PYTEST) $(TEST_ARGS)

test-fast: setup ## those that answer within two minutes: no process groups, nothing slow
	@$(PYTEST) -q --ignore tests/integration --ignore tests/gpu -m 'not slow' $(TEST_ARGS)

test-long: setup ## the tests that take minutes each: kills at random moments, the first hour rehearsed
	@LAVER_LONG=1 $(BIN)/python -m pytest -m long $(TEST_ARGS)

test-all: setup-data $(STAMPS)/test-all ## the tests, with every library that some of them need
	@$(PYTEST) $(TEST_ARGS)

# With the data libraries, since some faults are noticed by tests that need them.
mutants: setup-data ## plant faults in the code, one at a time: the tests must notice every one
	@$(BIN)/python tests/mutants/run.py $(MUTANTS_ARGS)

mutants-short: setup-data ## the same with about twenty of them
	@$(BIN)/python tests/mutants/run.py --short $(MUTANTS_ARGS)

chaos: setup ## kill ranks of small runs 51 times, saves in flight included; writes runs/chaos/summary.json
	@$(BIN)/python tests/chaos/run.py $(CHAOS_ARGS)

soak: setup ## does a run of 2,000 steps grow? writes runs/soak/soak.json
	@$(BIN)/python tests/chaos/soak.py $(SOAK_ARGS)

fuzz: setup ## damaged and senseless input for every reader, 10,000 of them (LAVER_FUZZ_SEED=1: others)
	@LAVER_LONG=1 LAVER_FUZZ=10000 $(BIN)/python -m pytest tests/fuzz $(TEST_ARGS)

NEWEST := .venv-newest
NEWEST_PYTHON ?= python3.12
# Where layouts, checkpoints and what bends Megatron-Core are tested.
SPAN := tests/unit/model tests/unit/objectives tests/unit/train/test_checkpoint.py tests/unit/megatron/test_intact.py \
    tests/integration/test_layouts.py

test-matrix: setup ## the newest supported Python and Megatron-Core (5 GB, an environment of its own), and across
	@$(MAKE) --no-print-directory VENV=$(NEWEST) PYTHON=$(NEWEST_PYTHON) setup
	@$(NEWEST)/bin/python -m pytest $(SPAN) $(TEST_ARGS)
	@LAVER_NEWEST=$(abspath $(NEWEST))/bin/python $(BIN)/python -m pytest tests/integration/test_versions.py

lint: setup ## style and likely mistakes, formatting included
	@$(BIN)/ruff check --quiet $(LINTED)
	@$(BIN)/ruff format --quiet --check $(LINTED) || { echo "run: make format" >&2; exit 1; }

format: setup ## put imports and layout in order
	@$(BIN)/ruff check --quiet --fix-only $(LINTED)
	@$(BIN)/ruff format --quiet $(LINTED)

typecheck: setup ## mypy
	@$(BIN)/mypy

shellcheck: setup ## the shell scripts
	@$(BIN)/shellcheck $(SHELL_SCRIPTS)

AUDIT := .venv-audit

# Strict: what nothing is known of counts as a failure, as where the database cannot be reached.
audit: $(AUDIT)/installed ## known vulnerabilities of every pinned requirement (an environment of its own)
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off $(AUDIT_ARGS) \
	    $(patsubst %,--requirement %,$(wildcard requirements/*.txt))

$(AUDIT)/installed: $(STAMPS)/venv requirements/audit.txt
	@echo "setup: pip-audit in $(AUDIT)"
	@rm -rf $(AUDIT)
	@$(BIN)/python -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip --quiet --quiet install --requirement requirements/audit.txt
	@touch $@

SERVE := .venv-serve

serve-test: setup $(SERVE)/installed ## exported models in a real server, vLLM on a CPU (3.5 GB, an environment of its own)
	@LAVER_VLLM=$(abspath $(SERVE)) $(BIN)/python -m pytest tests/serving $(TEST_ARGS)

$(SERVE)/installed: $(STAMPS)/requirements requirements/serve.txt
	@echo "setup: vLLM in $(SERVE)"
	@rm -rf $(SERVE)
	@$(BIN)/python -m venv $(SERVE)
	@$(SERVE)/bin/python -m pip --quiet --quiet install --no-deps $(TORCH_PIP_ARGS) --requirement requirements/serve.txt
	@touch $@

# Their warning is about a successor of MkDocs that this site does not use.
MKDOCS := NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:kernels $(BIN)/mkdocs

UV := uv==0.13.9
PINNED := base data dev docs

requirements: setup ## compile requirements/*.txt anew from *.in, with hashes (UPGRADE=1: the newest versions)
	@$(PIP) install $(UV)
	@cd requirements && for name in $(PINNED); do \
	    $(abspath $(BIN))/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	        $(if $(UPGRADE),--upgrade) --excludes excluded.txt $$(test $$name = base || echo --constraint base.txt) \
	        --custom-compile-command 'make requirements' --output-file $$name.txt $$name.in || exit 1; \
	done

docs: setup $(STAMPS)/docs ## the documentation as a site, in build/site; a broken link is an error
	@$(MKDOCS) build --quiet --strict

docs-serve: setup $(STAMPS)/docs ## the same in the browser, rebuilt while you write
	@$(MKDOCS) serve

aot: setup ## compile every kernel and model its speed, without a GPU
	@$(BIN)/python kernels/aot.py

bench: setup ## measure the kernels on this machine's GPU
	@$(BIN)/python kernels/benchmarks/run.py $(BENCH_ARGS)

bench-saving: setup ## measure how long training waits for a save, with and without --async-save
	@$(BIN)/python tools/measure_saving.py $(BENCH_ARGS)

bench-training: setup ## measure training: LM-only, LaVer, and the released recipe on transformers
	@$(BIN)/python tools/benchmark_training.py $(BENCH_ARGS)

gpu-test: setup ## the tests that need a GPU
	@$(BIN)/python -m pytest tests/gpu $(TEST_ARGS)

gpu-first-hour: setup ## kernels on a new GPU: correct, tuned, timed, compared; goes on where it was stopped
	@$(BIN)/python kernels/benchmarks/first_hour.py $(BENCH_ARGS)

clean: ## remove the environment, caches and build products; data/ and runs/ stay
	@rm -rf $(VENV) $(AUDIT) $(SERVE) $(NEWEST) build dist kernels/build kernels/dist .pytest_cache .mypy_cache .ruff_cache .triton
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@find . -name '*.egg-info' -prune -exec rm -rf {} +

# The environment, in steps that are repeated only when what they depend on has changed.

$(STAMPS)/venv:
	@python=$$(for name in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; \
	done); \
	if [ -z "$$python" ]; then echo "setup: needs Python 3.11 or newer; name it with PYTHON=..." >&2; exit 2; fi; \
	echo "setup: $(VENV) with $$($$python --version)"; \
	rm -rf $(VENV); \
	site=$(if $(SYSTEM_SITE_PACKAGES),--system-site-packages,); \
	if ! $$python -m venv $$site $(VENV) >/dev/null 2>&1; then \
	    rm -rf $(VENV); \
	    if ! { $$python -m venv $$site --without-pip $(VENV) \
	        && $$python -m pip --quiet --python $(BIN)/python install pip; } >/dev/null 2>&1; then \
	        rm -rf $(VENV); \
	        echo "setup: $$python cannot make environments with pip; on Debian and Ubuntu:" \
	            "apt-get install python3-venv" >&2; \
	        exit 2; \
	    fi; \
	fi; \
	mkdir -p $(STAMPS); touch $@

$(STAMPS)/torch: $(STAMPS)/venv requirements/torch-cpu.txt
	@if [ -n "$(SYSTEM_SITE_PACKAGES)" ] && $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    echo "setup: torch of the system"; \
	else \
	    echo "setup: torch (minutes on a first visit)"; \
	    $(PIP) install $(TORCH_PIP_ARGS) $(TORCH); \
	fi
	@touch $@

$(STAMPS)/requirements: $(STAMPS)/torch requirements/base.txt requirements/dev.txt
	@echo "setup: pinned requirements"
	@$(PIP) install --requirement requirements/base.txt --requirement requirements/dev.txt
	@touch $@

$(STAMPS)/installed: $(STAMPS)/requirements setup.py pyproject.toml
	@echo "setup: laver_mcore and laver_kernels, editable"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/test-all: $(STAMPS)/data requirements/test-all.txt
	@echo "setup: lmms-eval and Energon"
	@$(PIP) install --no-deps --requirement requirements/test-all.txt
	@touch $@

$(STAMPS)/docs: $(STAMPS)/requirements requirements/docs.txt
	@echo "setup: MkDocs"
	@$(PIP) install --requirement requirements/docs.txt
	@touch $@

$(STAMPS)/data: $(STAMPS)/requirements requirements/data.txt
	@echo "setup: DALI, pyarrow and webdataset"
	@$(PIP) install --requirement requirements/data.txt
	@touch $@
