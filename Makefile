# Two commands set everything up: `make quickstart` runs the main job, `make test` the suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check fix clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

quickstart: .venv/.installed
	$(BIN)/kfuse run quickstart

test: .venv/.installed
	$(BIN)/pytest

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest
	@for room in fusion harness tasks reports tests; do \
	  printf '%-8s %6d lines\n' $$room $$(find $$room -name '*.py' | xargs cat | wc -l); done

fix: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv
