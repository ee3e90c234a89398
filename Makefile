# The commands of this repository. Each works in a fresh clone: `make venv` is done first where it is needed.
#   make demo    a delta's whole life on a real model, offline after installation
#   make test    everything that CI checks: format, lint, types, tests
#   make quick   the tests that take seconds
#   make conformance the vectors of the specification, for this library and for the second loader
#   make hostile inputs made to harm: cases, passed, time
#   make crash   kill -9 at 200 random moments of saving, pushing, pulling, merging
#   make peers   the real library of AdapterHub, in an environment of its own, beside our import and export
#   make docs    the documentation, into build/site; a warning is an error
#   make fuzz    coverage-guided fuzzing of every parser, SECONDS=300 each (installs atheris)
#   make bench   measurements; they fail only when they cannot run
# Another place for the environment: make test VENV=/path/to/venv

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.deltahub-installed
# The first interpreter that is new enough; a name that exists need not run (a version manager's shim).
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# Two workers on two cores: threads inside a worker only get in each other's way.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv demo test lint types quick conformance hostile crash fuzz peers docs bench clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(STAMP)

# torch goes first and alone: its wheel decides which of the others are compatible, and a failed download
# of the largest file shows at once. setuptools is pinned too, hence no build isolation.
$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

demo: venv
	$(VENV)/bin/deltahub demo

lint: venv
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: venv
	$(PY) -m mypy

test: lint types
	$(PY) -m pytest -n $(WORKERS) -q

quick: venv
	$(PY) -m pytest -n $(WORKERS) -q -m 'not slow'

hostile: venv
	$(PY) -m tests.hostile

conformance: venv
	$(PY) spec/conformance/runner.py --stream --quiet -- $(PY) -m deltahub.conformance --stream
	@if command -v npm >/dev/null; then npm ci --prefix spec/conformance/second --no-audit --no-fund --silent && \
	$(PY) spec/conformance/runner.py --stream --quiet -- node spec/conformance/second/loader.mjs --stream; \
	else echo 'the second loader was left out: it needs node 20'; fi

crash: venv
	$(PY) -m tests.crash.driver 200

SECONDS ?= 300
fuzz: venv
	$(PIP) install atheris
	$(PY) -m fuzz $(SECONDS)

PEERS ?= build/peers
peers: venv
	test -x $(PEERS)/bin/python || $(PY) -m venv $(PEERS)
	$(PEERS)/bin/pip --disable-pip-version-check --quiet install "$$(grep ^torch== constraints.txt)" adapters==1.3.0
	$(PY) -m tests.peers $(PEERS)/bin/python

docs: venv
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: venv
	$(PY) -m benchmarks

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
