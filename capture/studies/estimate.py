"""Estimates the least time of a study's captures from the time of one block."""

import time
from collections.abc import Sequence

import torch

from ..models.starts import initial_state
from ..models.tap import Packed
from ..plan import Plan


def expected_seconds(plans: Sequence[Plan]) -> dict[str, float]:
    """Returns the least seconds of captures, by their store: the time of a block, one for each width, times
    its invocations. What is measured in a capture comes on top.
    """
    block_s: dict[int, float] = {}
    for plan in plans:
        if plan.description.width not in block_s:
            block_s[plan.description.width] = _time_a_block(plan)
    return {str(plan.store): block_s[plan.description.width] * plan.description.depth for plan in plans}


@torch.inference_mode()
def _time_a_block(plan: Plan) -> float:
    """Seconds of one block over the longest sequence, the better of two recurrences, for all the data."""
    d = plan.description.with_recurrences(1)
    model = plan.source.origin.load(d, plan.device, torch.float32)
    index, row = max(enumerate(plan.dataset.rows), key=lambda pair: len(pair[1]))
    ids_N = torch.as_tensor(row, dtype=torch.int64, device=plan.device)
    batch = Packed(ids_N, (len(row),))
    state_ND = initial_state(None, d, plan.settings.measure.seed, [index], batch.lengths, None)
    best_s = float("inf")
    for _ in range(2):
        started_s = time.perf_counter()
        model(batch, initial_state_ND=state_ND).sum().item()  # waits for the device
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s / d.core * plan.dataset.num_tokens / len(row)
