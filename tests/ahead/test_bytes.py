"""What the residual add moves through memory, in its machine code: each row once, 128 bits at a time."""

import pytest
import torch

from looptap.benchmarks.ahead.compiled import compile_launch
from looptap.benchmarks.ahead.launches import FEW, NORM_TENSORS, residual_launch
from looptap.benchmarks.ahead.machine_code import read_code
from looptap.kernels.gpu.tuned import find_settings
from looptap.kernels.residual_norm import STATISTICS

D = 2048
# what is given besides x and branch, and what moves of a row with residual and y: tensors of D halves
LAUNCHES = {
    "a pre-norm block": (("next_weight",), 4),
    "with statistics": (("next_weight", "statistics"), 4),
    "with the previous recurrence": (("next_weight", "statistics", "previous"), 5),
    "Ouro's norms": (("next_weight", "branch_weight", "statistics", "previous"), 5),
    "everything": ((*NORM_TENSORS, "statistics"), 7),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_byte_moves_once(launch, target):
    given, moved = LAUNCHES[launch]
    settings = find_settings("residual_norm", D, torch.bfloat16, torch.device("cpu"))
    kernel = compile_launch(residual_launch(FEW, D, torch.bfloat16, *given), target)
    accesses = dict(read_code(kernel).accesses)
    # one float32 a row each
    assert accesses.pop("STG.32", 0) == (len(STATISTICS) if "statistics" in given else 0)
    rows = settings.rows * moved * 2 * D
    weights = sum(name.endswith("_weight") for name in given) * 2 * D  # once a program
    # all that is left is as wide as it can be, and makes up the formula
    assert accesses.keys() == {"LDG.128", "STG.128"}
    assert sum(accesses.values()) * 16 * 32 * settings.num_warps == rows + weights
