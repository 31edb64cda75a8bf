# Each target installs what it needs first, and no more: a virtual environment in .venv with PyTorch, this package and its libraries.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
WORK   := OMP_NUM_THREADS=1

.PHONY: help setup demo test check bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.dev ## everything for use and development, into .venv

# A PyTorch wheel that lies on this machine goes first (elsewhere that step fails quietly); whatever PyTorch is then
# installed is a constraint for all the rest, so that nothing replaces a CPU build by gigabytes of CUDA.
$(VENV)/torch.txt:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orthokit needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV): PyTorch first (200 MB for the CPU; with CUDA some 3 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet --no-index --no-deps torch 2>/dev/null || true
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet 'torch>=2.6'
	@$(PIP) freeze | grep -i '^torch==' > $@

# .venv/.demo, .test, .dev, .docs: this package with the extra of that name.
$(VENV)/.%: $(VENV)/torch.txt pyproject.toml
	@echo "installing what $* needs (for the demo 100 MB)"
	@$(PIP) install --quiet --constraint $(VENV)/torch.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/.demo ## train small networks on real digits, with and without orthogonality: two minutes after the set-up
	@$(BIN)/orthokit demo

test: $(VENV)/.test ## the tests, with every shape annotation checked
	@$(WORK) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --quiet

check: $(VENV)/.dev ## what continuous integration checks besides the tests: style, types, architecture
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.test ## what every penalty costs, into benchmarks/cost.json; about an hour on an idle machine
	@$(BIN)/python benchmarks/cost.py

docs: $(VENV)/.docs ## the documentation as a site in site/
	@$(WORK) $(BIN)/sphinx-build -q -W --keep-going docs site
	@echo "open site/index.html"

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
