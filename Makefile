# Each target sets up what it needs: an environment in $(VENV), installed again when pyproject.toml changes.
VENV ?= .venv
VENV_36 ?= .venv-3.6
# for environments that have no looptap; the newest zarr needs a newer Python than the oldest does
PYTHON_311 ?= python3.11
PYTHON_312 ?= python3.12
# the machine's own, which has a torch for its GPU
GPU_PYTHON ?= python3
# a name on PATH may be a shim that does not run, so each is tried
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	>/dev/null 2>&1 && echo $$python && break; done)
# tests that run at a time, a core and about 1.5 GiB each
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 8 ? cores : 8)))
DURATIONS = --durations=20

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two installs into one environment would collide
.PHONY: help demo check test test-all test-rest lint kernels kernels-3.6 matrix interop gpu tune clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z0-9.-]+:.*  ## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed  ## capture a small looped model and write a report; no download after set-up
	$(VENV)/bin/looptap demo

check: lint  ## lint, types and the quick tests
	$(beside) -m 'not slow and not apart and not full'

test: lint  ## lint, types and tests, of the kernels where they changed: a quarter of an hour
	$(beside) -m 'not apart and not full'
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(but_kernels) -m 'apart and not full'
	$(kernels_in_test)

test-all: # what a file compiles for all of its tests is compiled once
by_file = -n $(JOBS) --dist loadfile $(DURATIONS)
kernels_in_test = @echo 'kernels: all of their tests come last'
test-all: test test-rest  ## everything that is not hardware: half an hour

test-rest: $(VENV)/.installed-test  ## what test-all adds to test: every kernel, and the long forms of other tests
	$(VENV)/bin/python -m pytest $(but_kernels) -m full
	$(VENV)/bin/python -m looptap.tests.kernel_tiers always $(by_file)

lint: $(VENV)/.installed-test  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

kernels: $(VENV)/.installed-test  ## the kernels alone: compiled for GPUs that are not there, and interpreted
	$(VENV)/bin/python -m looptap.tests.kernel_tiers always $(by_file)

kernels-3.6: $(VENV_36)/.installed-3.6  ## the same with Triton 3.6, in an environment of its own
	$(VENV_36)/bin/python -m looptap.tests.kernel_tiers always $(by_file)

matrix:  ## quick tests with the oldest and the newest torch and zarr, on Python 3.11 and 3.12
	$(PYTHON) tests/matrix.py $(PYTHON_311) $(PYTHON_312)

interop: $(VENV)/.installed-test  ## read stores without looptap: zarr 3.1 and the newest, zarrs, tensorstore, xarray, dask
	rm -rf build/stores && mkdir -p build/stores
	$(VENV)/bin/python -m looptap.tests.state_stores build/stores
	$(call read_plainly,$(PYTHON_311),build/zarr-3.1,zarr==3.1.6)
	$(call read_plainly,$(PYTHON_312),build/zarr-new,zarr>=3.4)

gpu: build/path/looptap  ## check and measure the kernels on the GPU at hand, with its own python3
	$(need_gpu_python)
	PYTHONPATH=build/path $(GPU_PYTHON) -u -m looptap.benchmarks.gpu $(ARGS)

tune: build/path/looptap  ## find the fastest settings for the GPU at hand and write them into the table
	$(need_gpu_python)
	PYTHONPATH=build/path $(GPU_PYTHON) -u -m looptap.benchmarks.tune $(ARGS)

clean:  ## remove .venv, the demo and every cache
	rm -rf .venv .venv-3.6 demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	$(call install,$(VENV),'.')

$(VENV)/.installed-test: pyproject.toml
	$(call install,$(VENV),'.[test]')

# Triton 3.6's interpreter cannot count to a tensor that NumPy 2.4 refuses as an integer
$(VENV_36)/.installed-3.6: pyproject.toml
	$(call install,$(VENV_36),'.[test]' 'triton==3.6.0' 'numpy<2.4')

# looptap can be imported from here by a Python that it is not installed in
build/path/looptap:
	mkdir -p $(@D)
	ln -sfn ../.. $@

need_gpu_python = @$(GPU_PYTHON) -c 'import torch, triton, numpy, pytest, safetensors' 2>/dev/null || { \
	echo "$(GPU_PYTHON) lacks one of torch, triton, numpy, pytest and safetensors;" \
		"give another: make $@ GPU_PYTHON=/path/to/python" >&2; exit 2; }

but_kernels = --ignore=tests/ahead $(DURATIONS)
# tests beside each other, a thread each
beside = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(but_kernels)
# what a file compiles for all of its tests is compiled once
by_file = -n $(JOBS) --dist loadfile $(DURATIONS)
kernels_in_test = $(VENV)/bin/python -m looptap.tests.kernel_tiers changed $(by_file)

# in a bare environment of its own; the libraries are those that the test environment has or newer
define read_plainly
	@$(1) -c '' 2>/dev/null || { echo "$(1) does not run; give another: make interop PYTHON_312=/path/to/python" >&2; exit 2; }
	@test -x $(2)/bin/pip || $(1) -m venv $(2)
	@$(2)/bin/python -m pip install --quiet '$(3)' zarrs tensorstore xarray dask
	@for store in build/stores/*.zarr; do echo "$(2): $$store"; \
		$(2)/bin/python -I tests/plain_readers.py $$store $${store%.zarr}.npz || exit 1; done
endef

# pip comes last into a new environment: one without it was cut off, and is made again over what is there
define install
	@test -x $(1)/bin/pip || test -n "$(PYTHON)" || \
		{ echo "no Python 3.11 or 3.12 with ensurepip was found; give one: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	@echo "installing looptap into $(1); the first time this takes some minutes"
	$(1)/bin/python -m pip install --quiet --editable $(2)
	@touch $(1)/.installed $@
endef
