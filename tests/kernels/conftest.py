"""The Triton kernels against float64. They run on a GPU where there is one, else in Triton's interpreter,
which must be chosen before a kernel is defined: `make test` gives it a process of its own
(TRITON_INTERPRET=1 pytest tests/kernels), and without either nothing here can run.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not IS_INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def slack():
    """Factor on limits: those of the interpreter are taken four times on a GPU, where sums run otherwise."""
    return 1 if IS_INTERPRETED else 4


@pytest.fixture
def mutated(tmp_path):
    """mutated(module, old, new): the module with one place of its source changed, as a module of its own."""

    def load(module, old, new):
        source = Path(module.__file__).read_text()
        assert source.count(old) == 1, f"{source.count(old)} places hold {old!r}"
        path = tmp_path / Path(module.__file__).name  # a kernel's source is read from its file
        path.write_text(source.replace(old, new))
        # in the same package, for its relative imports
        name = f"{module.__name__}_mutated_{tmp_path.name}"
        spec = importlib.util.spec_from_file_location(name, path)
        changed = importlib.util.module_from_spec(spec)
        sys.modules[name] = changed
        try:
            spec.loader.exec_module(changed)
        finally:
            del sys.modules[name]
        return changed

    return load
