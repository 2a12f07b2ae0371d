# Everything a developer does. `make` alone explains itself.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test stress bench lint types notebooks build clean

help: ## explain the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "ARGS adds to a command: make run ARGS='stage=classifier seed=1', make test ARGS='tests/optim -x'"
	@echo "PYTHON and VENV choose the interpreter and the folder of the virtual environment ($(VENV))."

install: $(INSTALLED) ## virtual environment with the package; other targets do this by themselves

run: $(INSTALLED) ## language model, then classifier, on the sample data; then a line how to predict with it
	@$(BIN)/python -m ulmfit train $(ARGS)

test: $(INSTALLED_DEV) ## all tests, a process for each core (up to 4)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

stress: $(INSTALLED_DEV) ## long tests: kills, many processes, hostile files, soak; prints a table of figures
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m stress -s tests/stress $(ARGS)

bench: $(INSTALLED_BENCH) ## this package and fastai side by side, into docs/benchmarks (ARGS='--cases scale', '--help')
	@$(BIN)/python tests/benchmarks $(ARGS)

lint: $(INSTALLED_DEV) ## style and common mistakes
	@$(BIN)/ruff check src tests conf notebooks
	@$(BIN)/ruff format --check src tests conf notebooks

types: $(INSTALLED_DEV) ## static types
	@$(BIN)/mypy

notebooks: $(INSTALLED_DEV) ## execute the notebooks in place
	@$(BIN)/python notebooks/execute.py $(ARGS)

build: $(INSTALLED_DEV) ## source distribution and wheel in dist/
	@$(BIN)/python -m build --no-isolation

clean: ## remove builds and caches; environment and runs stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever build of that very version is at hand is taken, and nothing replaces it later.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once, some minutes) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

# fastai, the oracle of the parity tests, without its dependencies: tests/parity/requirements.txt says why.
$(INSTALLED_DEV): $(INSTALLED) tests/parity/requirements.txt
	@echo "Installing what development needs into $(VENV) ..." >&2
	@$(PIP) --editable '.[dev]' --requirement tests/parity/requirements.txt
	@$(PIP) --no-deps fastai
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED_DEV) tests/benchmarks/requirements.txt
	@echo "Installing what benchmarks need into $(VENV) ..." >&2
	@$(PIP) --requirement tests/benchmarks/requirements.txt
	@touch $@
