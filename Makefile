# make demo          PostgreSQL, a million events, a real Airflow and the example DAGs; Ctrl-C ends it all
# make demo ONCE=1   the same, each DAG once, then the table of runs
# make test          all tests, then lint
# make test-fast     the tests that need no whole Airflow
# make lint          ruff and mypy
# make docs          the documentation as a site, in build/site
# make venv          only what all of these need, in .venv
# make constraints   pin the newest versions of all that is needed
# make clean         remove .venv and every cache

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What was installed, and from which pins.
STAMP := $(VENV)/.installed

# A Python that was asked for is used, not one that uv would fetch; and the cache goes where the rest goes.
export UV_PYTHON_DOWNLOADS := never
export UV_CACHE_DIR := $(CURDIR)/$(VENV)/.uv-cache

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint docs venv constraints clean

help:
	@sed -n 's/^# make/make/p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name one: make PYTHON=python3.11 ..." >&2; \
		exit 1; }
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV) || { echo "On Debian, 'apt install python3-venv' mends this." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints.txt uv
	@# Compiled here, in parallel: else the first start of Airflow does it, one module after the other.
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
		-c constraints.txt -b constraints.txt -e '.[dev]'
	@rm -rf '$(UV_CACHE_DIR)'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -B -m demo $(if $(filter-out 0,$(ONCE)),--once)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2
	@$(MAKE) --no-print-directory lint

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not e2e'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

constraints: $(STAMP)
	echo uv | $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
		--all-extras --output-file constraints.txt pyproject.toml -
	rm -rf '$(UV_CACHE_DIR)'

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
