# Two commands: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

# Small models on few cores: one thread a process is fastest, and the tests run side by side.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all docs lock results lint clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/consilience demo --out demo

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -m "not slow and not peers"

test-all: $(VENV)/.ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, offline, in site/: it opens from the disk.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install -q --disable-pip-version-check -e ".[docs]"
	touch $@

# Exact versions with hashes of what developers install: pip install --require-hashes -r requirements-dev.lock
lock:
	echo "$(TORCH)" | uv pip compile pyproject.toml -c - --extra dev --extra docs --generate-hashes --python-version 3.11 --quiet -o requirements-dev.lock

# All tables of benchmarks/results, and how old each is.
results: $(VENV)/.ready
	$(BIN)/python benchmarks/results.py

clean:
	rm -rf $(VENV) demo runs build dist site .pytest_cache .mypy_cache .ruff_cache
