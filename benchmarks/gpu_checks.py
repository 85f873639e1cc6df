"""Every operation once, small, for checks that want to see all of them: repeats, CUDA graphs, torch.compile,
and tools that watch memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import attention, attention_with_statistics, make_cu_seqlens
from ..kernels.attention_pairs import attention_chain, attention_gram
from ..kernels.residual_norm import (
    distance,
    residual_norm,
    residual_norm_statistics,
    row_norm,
)

Call = Callable[[], tuple[Tensor, ...]]
# an exact tile or two, an empty one, one token, and a masked tail
LENGTHS = (128, 0, 1, 203)
_HEADS = (4, 2, 64)
_WIDTH = 2000  # no power of two
_EPS = 1e-6


def make_calls(device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """A call of every operation on fixed random inputs; the same numbers every time."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    return {**_residual_calls(random), **_attention_calls(random, device)}


def _residual_calls(random: Callable[..., Tensor]) -> dict[str, Call]:
    N, D = sum(LENGTHS), _WIDTH
    x, branch, block_input, previous, last = (random(N, D) for _ in range(5))
    branch_weight, stream_weight, next_weight = (random(D) for _ in range(3))
    named: dict[str, Any] = {
        "eps": _EPS,
        "branch_weight_D": branch_weight,
        "stream_weight_D": stream_weight,
        "next_weight_D": next_weight,
    }

    def statistics() -> tuple[Tensor, ...]:
        result, measured_SN = residual_norm_statistics(
            x, branch, **named, block_input_ND=block_input, previous_ND=previous, last_ND=last
        )
        return *result, measured_SN

    return {
        "residual_norm": lambda: tuple(residual_norm(x, branch, **named)),
        "residual_norm_statistics": statistics,
        "residual_distance": lambda: tuple(distance(x, previous, row_norm(x), row_norm(previous))),
    }


def _attention_calls(random: Callable[..., Tensor], device: torch.device) -> dict[str, Call]:
    H, K, C = _HEADS
    qkv = [random(sum(LENGTHS), H + 2 * K, C) for _ in range(3)]
    queries, keys = [x[:, :H] for x in qkv], [x[:, H : H + K] for x in qkv]
    q, k, v = queries[0], keys[0], qkv[0][:, H + K :]
    cu_seqlens, most, scale = make_cu_seqlens(LENGTHS, device), max(LENGTHS), C**-0.5
    lse = [
        attention_with_statistics(*x, v, cu_seqlens, most, scale)[1].lse_NH
        for x in zip(queries, keys, strict=True)
    ]
    pairs = [(1, 0), (2, 1), (2, 0)]

    def statistics() -> tuple[Tensor, ...]:
        o, measured = attention_with_statistics(q, k, v, cu_seqlens, most, scale)
        return o, *measured

    return {
        "attention": lambda: (attention(q, k, v, cu_seqlens, most, scale),),
        "attention_with_statistics": statistics,
        "attention_chain": lambda: tuple(attention_chain(queries, keys, lse, cu_seqlens, most, scale, pairs)),
        "attention_gram": lambda: (
            attention_gram(
                torch.stack(queries), torch.stack(keys), torch.stack(lse), cu_seqlens, most, scale
            ),
        ),
    }


def differing(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> list[int]:
    """Places of the results that are not the same to the bit, NaN equal to the same NaN."""
    pairs = zip(expected, found, strict=True)
    return [place for place, (a, b) in enumerate(pairs) if not torch.equal(_bits(a), _bits(b))]


def check_repeats(calls: dict[str, Call], times: int) -> dict[str, str]:
    """Operations whose results are not the same to the bit every time."""
    faults = {}
    for name, call in calls.items():
        expected = call()
        for time in range(1, times):
            if places := differing(expected, call()):
                faults[name] = f"results {places} of repeat {time} differ from the first"
                break
    return faults


def check_compiled(calls: dict[str, Call], backend: str) -> dict[str, str]:
    """Operations that torch.compile does not take whole, or that give something else in it."""
    faults = {}
    for name, call in calls.items():
        torch.compiler.reset()
        try:
            if places := differing(call(), torch.compile(call, fullgraph=True, backend=backend)()):
                faults[name] = f"results {places} differ when compiled"
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
    return faults


def check_graphs(calls: dict[str, Call]) -> dict[str, str]:
    """Operations that a CUDA graph cannot hold, or whose replay gives something else."""
    faults = {}
    for name, call in calls.items():
        expected = call()  # compiled by then
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = call()
            for result in found:  # what was there before must not pass for a result
                result.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            if places := differing(expected, found):
                faults[name] = f"results {places} differ when replayed"
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
    return faults


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])
