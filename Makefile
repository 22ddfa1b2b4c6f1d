# Start with `make demo` and `make test`.
#
# Both create .venv on first use (about two minutes and 6 GB, because PyTorch's Linux build includes CUDA).
# VENV_ROOT=DIR creates the environment below DIR instead, named after a hash of the dependency files, so checkouts with
# equal dependencies share it. JOBS=N runs the tests in N processes.

PYTHON ?= python3
# One more than the two cores that the suite is meant for, because tests of agents wait a lot.
JOBS ?= 3
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
DEPENDENCIES := pyproject.toml constraints.txt
ifdef VENV_ROOT
VENV := $(VENV_ROOT)/$(shell cat $(DEPENDENCIES) | sha256sum | cut -c1-16)
else
VENV := .venv
endif
PY := $(VENV)/bin/python
# Import the packages of this checkout, even if the environment was installed from another one.
export PYTHONPATH := $(CURDIR)

.PHONY: install demo test test-fast test-failed test-extras lint format docs help

help:
	@echo "make demo         install, then run a sweep on the built-in digits: no account, no download"
	@echo "make test         install, then run all tests"
	@echo "make test-fast    the tests that take seconds"
	@echo "make test-failed  the tests that failed last time, one after the other"
	@echo "make test-extras  install the optional extras too, then run the tests that need them"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the documents as a site in build/site"
	@echo "make install      create the environment only"

install: $(VENV)/.installed

$(VENV)/.installed: $(DEPENDENCIES)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.extras: $(VENV)/.installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

demo: install
	$(PY) -m agent.sweep sweeps/quickstart.yaml --offline --jobs 2

$(VENV)/.docs: $(VENV)/.installed
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs
	$(PY) -m mkdocs build

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow"

test-failed: install
	$(PY) -m pytest --last-failed --last-failed-no-failures none

test-extras: $(VENV)/.extras
	$(PYTEST) -m extra --require-extras

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
