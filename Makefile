# Each target sets up what it needs: an environment in $(VENV), installed again when pyproject.toml changes.
VENV ?= .venv
# a name on PATH may be a shim that does not run, so each is tried
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	>/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two installs into one environment would collide
.PHONY: help demo test lint clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed  ## capture a small looped model and write a report; no download after set-up
	$(VENV)/bin/looptap demo

test: lint  ## lint, type-check and test
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-test  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:  ## remove .venv, the demo and every cache
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	$(call install,.)

$(VENV)/.installed-test: pyproject.toml
	$(call install,.[test])

# pip comes last into a new environment: one without it was cut off, and is made again over what is there
define install
	@test -x $(VENV)/bin/pip || test -n "$(PYTHON)" || \
		{ echo "no Python 3.11 or 3.12 with ensurepip was found; give one: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing looptap into $(VENV); the first time this takes some minutes"
	$(VENV)/bin/python -m pip install --quiet --editable '$(1)'
	@touch $(VENV)/.installed $@
endef
