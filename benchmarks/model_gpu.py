"""What capturing costs a whole model on a GPU: the same forward pass plain, measured, and as PyTorch's own
operations would run it.

A looped model of Ouro-1.4B's width with random weights, fewer layers and as many recurrences: every block
costs the same, so ratios do not need all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture.models.model import LoopedModel
from ..capture.models.random_spec import parse_random
from ..capture.models.tap import Half, HalfNorms, Packed, Plain
from ..capture.taps.statistics import Buffers, Statistics
from ..kernels.residual_norm import Residual, rms_norm
from .kernels_gpu import Found, OrNaN, make_rows
from .states_in_memory import StatesInMemory
from .timing import Goal
from .timing_gpu import Run, Timer

_RESIDUAL = ("residual_norm", "residual_peak", "update_norm", "step_norm", "step_cosine")
_ROWS = ("attention_entropy", "attention_peak", "attention_sink")
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    spec: str = "random:(0,6x4,0),norm=ouro,width=2048,heads=16"
    lengths: tuple[int, ...] = (2048,) * 8
    dtype: torch.dtype = torch.bfloat16


TINY_MODEL = ModelSizes(spec="random:(0,2x2,0),norm=ouro,width=32,heads=2", lengths=(8, 8))


class _PyTorch(Plain):
    """SDPA over a batch of sequences of one length, and norms one operation after the other."""

    def attention(self, step: Any, q_NHC: Any, k_NKC: Any, v_NKC: Any, batch: Packed, scale: float) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, batch.max_length)).transpose(1, 2) for x in (q_NHC, k_NKC, v_NKC))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o.transpose(1, 2).flatten(0, 1)

    def residual(self, step: Any, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        if norms.branch_weight_D is not None:
            branch_ND = rms_norm(branch_ND, norms.branch_weight_D, norms.eps)
        x_ND = x_ND + branch_ND
        if norms.stream_weight_D is not None:
            x_ND = rms_norm(x_ND, norms.stream_weight_D, norms.eps)
        if norms.next_weight_D is None:
            return Residual(x_ND, x_ND)
        return Residual(x_ND, rms_norm(x_ND, norms.next_weight_D, norms.eps))


def bench_model(timer: Timer, sizes: ModelSizes) -> Found:
    """Forward passes without logits, in turns."""
    device = timer.device
    d = parse_random(sizes.spec).description
    with torch.device(device):
        model = LoopedModel(d).to(sizes.dtype)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, _STD)
    N, S, H = sum(sizes.lengths), len(sizes.lengths), d.num_heads
    batch = Packed(torch.randint(0, d.vocab_size, (N,), device=device), sizes.lengths)

    def measured(names: tuple[str, ...], *, states: bool = False) -> Run:
        shapes = {name: (d.depth, N, H) if name.startswith("attention_") else (d.depth, N) for name in names}
        shapes |= {name: (d.depth, S, H) for name in names if name == "attention_step"}
        values = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        state_LND = torch.empty(d.depth, N, d.width, dtype=sizes.dtype, device=device)
        depths = range(d.depth) if states else ()

        def run(i: int) -> None:
            buffers = Buffers(values, StatesInMemory(state_LND) if states else None)
            model(batch, Statistics(d, buffers, state_depths=depths))
            if states:
                host.copy_(state_LND, non_blocking=True)

        return run

    pinned = device.type == "cuda"
    host = torch.empty(d.depth, N, d.width, dtype=sizes.dtype, pin_memory=pinned)
    with torch.inference_mode():
        times = timer(
            {
                "plain": lambda i: model(batch),
                "PyTorch's operations": lambda i: model(batch, _PyTorch()),
                "residual and attention rows": measured((*_RESIDUAL, *_ROWS)),
                "and columns, and steps of attention": measured(
                    (*_RESIDUAL, *_ROWS, "attention_received", "attention_step")
                ),
                "all states to the host": measured(("residual_norm",), states=True),
            },
            1,
        )
    return Found({}, make_rows("model", N, times), _goals(times), timer.failures)


def _goals(times: dict[str, float]) -> list[Goal]:
    t = OrNaN(times)
    rows = t["residual and attention rows"]
    return [
        Goal("model, K1 + K2 statistics / plain", rows / t["plain"], at_most=1.03, stretch=1.015),
        Goal(
            "model, K1 + K2 statistics / PyTorch's operations",
            rows / t["PyTorch's operations"],
            at_most=1.00,
            stretch=0.92,
        ),
        Goal(
            "model, + K3 + K4 chain / plain",
            t["and columns, and steps of attention"] / t["plain"],
            at_most=1.10,
            stretch=1.06,
        ),
        Goal(
            "model, all states to the host / plain",
            t["all states to the host"] / t["plain"],
            at_most=1.05,
            stretch=1.02,
        ),
    ]
