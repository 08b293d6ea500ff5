# `make help` lists the targets. Each one makes .venv first where it is missing or out of date.
PYTHON ?= python3
# Two processes suit a two-core CI machine; `make test WORKERS=8` on a larger one.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each worker is one process: more threads inside it would only compete with the other workers.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all coverage bench lint format docs-figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the pinned development tools

demo: $(STAMP) ## run examples/demo.py
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## run every test
	$(PYTEST)

coverage: $(STAMP) ## run the tests but the slow ones, and list the lines that none of them reaches
	$(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered

bench: $(STAMP) ## run the benchmarks, against peers that are installed for it (300 MB)
	-$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench-peers]'
	$(BIN)/python benchmarks/run_all.py

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## format, and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-figures: $(STAMP) ## write the figure of the layers into docs/architecture.md
	$(BIN)/python docs/layers.py

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) build dist .coverage .pytest_cache .ruff_cache .hypothesis examples/output benchmarks/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints apply from the first request for torch: without them pip may pick another build of
# it, of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "diffsolve needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	         "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
