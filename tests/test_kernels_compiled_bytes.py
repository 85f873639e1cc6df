"""What the residual add moves through memory, counted in its machine code: each row once, 128 bits at a time.

In a process of its own where other tests run under TRITON_INTERPRET=1, which keeps Triton from compiling.
"""

import platform
import sys

import pytest
import torch

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("Triton has wheels with compilers for Linux on x86-64 alone", allow_module_level=True)

from looptap.kernels.gpu import residual_norm
from looptap.kernels.gpu.compiled import compile_for
from looptap.kernels.gpu.tuned import read_table

D = 2048
PLAIN = ("x", "branch", "next_weight", "residual", "y")
# what a launch is given, and what it moves of a row: tensors of D halves
LAUNCHES = {
    "a pre-norm block": (PLAIN, 4),
    "with statistics": ((*PLAIN, "statistics"), 4),
    "with the previous recurrence": ((*PLAIN, "statistics", "previous"), 5),
    "with that and a copy": ((*PLAIN, "statistics", "previous", "copy"), 6),
    "Ouro's norms": ((*PLAIN, "branch_weight", "statistics", "previous", "copy"), 6),
    "everything": (("x", "branch", "residual", "y", "copy", "statistics", "block_input", "previous", "last",
                    "branch_weight", "stream_weight", "next_weight"), 8),
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_byte_moves_once(launch, target):
    tensors, moved = LAUNCHES[launch]
    (entry,) = (e for e in read_table() if (e.kernel, e.width, e.dtype) == ("residual_norm", D, "half"))
    variant = residual_norm.make_variant(entry, torch.bfloat16, launch, tensors, D=D)
    counts = dict(compile_for(variant, target).counts)
    statistics = residual_norm.NUM_STATISTICS if "statistics" in tensors else 0
    assert counts.pop("STG.32", 0) == statistics  # one float32 a row each
    rows = entry.settings.rows * moved * 2 * D
    weights = sum(name.endswith("_weight") for name in tensors) * 2 * D  # once a program
    # all that is left is as wide as it can be, and makes up the formula
    assert counts.keys() == {"LDG.128", "STG.128"}
    assert sum(counts.values()) * 16 * 32 * entry.settings.num_warps == rows + weights
