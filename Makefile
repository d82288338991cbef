# Everything a new user or CI types. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:  ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "KVLink needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned. From pip's default index it brings CUDA (gigabytes) on x86-64 Linux; for its CPU build,
# name PyTorch's index of CPU wheels: make demo TORCH_INDEX_URL=...
TORCH_INDEX_URL ?=
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing KVLink and its pinned dependencies into $(VENV) (about 3 minutes the first time)"
	$(BIN)/pip install -q -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/pip install -q -c constraints.txt -e '.[ray,s3]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing what the tests and linters need"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.dev  ## make .venv with everything in it

demo: $(VENV)/.runtime  ## precompute, serve, ask, compare; then stop what was started
	@$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## the whole test suite
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.runtime  ## time to first token of every linker beside full prefill
	$(BIN)/kvlink bench ttft

clean:  ## remove .venv and what demo and runs left
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
