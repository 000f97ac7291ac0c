# Two commands set everything up: `make quickstart` runs the main job, `make test` the suite.
PYTHON ?= python3
BIN := .venv/bin
# Compiling what is never imported costs more than it saves.
PIP := $(BIN)/pip install -q --no-compile --disable-pip-version-check

# Bytecode is kept wherever it is not allowed by default: without it every start takes five seconds more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test bench check fix clean

# torch first and pinned: a range would bring its newest build, with gigabytes for GPUs.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

.venv/.tested: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@

quickstart: .venv/.installed
	$(BIN)/kfuse run quickstart

test: .venv/.tested
	$(BIN)/pytest

# Figures against their floors; builds the quickstart's models and stores first if need be.
bench: .venv/.installed
	$(BIN)/python -m harness.bench

check: .venv/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest
	@for room in fusion harness tasks reports tests; do \
	  printf '%-8s %6d lines\n' $$room $$(find $$room -name '*.py' | xargs cat | wc -l); done

fix: .venv/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv
