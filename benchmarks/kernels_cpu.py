"""The kernels' operations on a CPU: what they cost beside plain attention, and beside doing the same with the
T×T matrix.

Time is bound by the matrix products and by passes over the scores, of which plain attention makes one, fused.
Cases take turns within a round and a figure is the median over rounds of a case's ratio to the one it is held
against, so that a busy machine slows both. Memory is of a fresh process each: peak resident bytes (VmHWM, set
back by clear_refs; Linux) of one call beyond what was resident before it and beyond its results. The process
has made a small call of the same kind, so that code and threads are there already.
"""

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..capture.models.load import find_model
from ..capture.models.tap import Packed, Plain
from ..capture.taps.statistics import Buffers, Statistics
from ..kernels.attention import attention, attention_with_statistics, make_cu_seqlens
from ..kernels.attention_pairs import attention_chain, attention_gram
from ..kernels.residual_norm import residual_norm, residual_norm_statistics
from . import materialised
from .timing import Goal, Row

Run = Callable[[], object]
HEADS = (9, 3, 64)  # query heads, key heads, width: SmolLM2-135M's
NAMES = ("attention_entropy", "attention_peak", "attention_sink", "attention_received")
_WARM_UP = 32  # tokens
_MIN_S = 0.05  # a call shorter than this is repeated
_BEFORE = 4  # invocations in a chain
_EPS = 1e-5


class _Weights(Plain):
    """Attention that keeps its weights until their statistics are taken, a block at a time."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def attention(self, step: Any, q_NHC: Any, k_NKC: Any, v_NKC: Any, batch: Packed, scale: float) -> Tensor:
        o_NHC, a_BHTT = materialised.attention_with_weights(q_NHC, k_NKC, v_NKC, batch.max_length, scale)
        for name, value_NH in zip(NAMES, materialised.attention_statistics(a_BHTT), strict=True):
            self._values[name][step.depth] = value_NH
        return o_NHC


def bench_cpu(model: str, lengths: Sequence[int], rounds: int) -> tuple[list[Row], list[Goal]]:
    """Times and memory of every group of cases at every length, and the goals they are held to."""
    rows = []
    for group in _GROUPS:
        for length in lengths:
            cases = make_cases(group, length, model)
            reference = next(iter(cases))
            ratios, times_s = _take_turns(cases, rounds)
            for name in cases:
                rows.append(
                    Row(
                        group=group,
                        length=length,
                        case=name,
                        seconds=statistics.median(times_s[name]),
                        ratio=statistics.median(ratios[name]),
                        reference=reference,
                        extra_bytes=extra_bytes(group, name, length, model),
                    )
                )
    return rows, _goals(rows, lengths)


def make_cases(group: str, length: int, model: str) -> dict[str, Run]:
    """Calls on one random sequence; the first is what the others are held against.

    Each returns what it must leave behind, tensors that do not count as extra memory.
    """
    with torch.inference_mode():
        return _GROUPS[group](length, model)


def _attention_cases(length: int, model: str) -> dict[str, Run]:
    q, k, v = _queries_keys_values(length)
    cu_seqlens, scale = make_cu_seqlens([length]), HEADS[2] ** -0.5

    def eager() -> object:
        o, a = materialised.attention_with_weights(q, k, v, length, scale)
        return o, materialised.attention_statistics(a)

    return {
        "plain (SDPA)": lambda: attention(q, k, v, cu_seqlens, length, scale),
        "with statistics": lambda: attention_with_statistics(q, k, v, cu_seqlens, length, scale),
        "eager, weights and statistics": eager,
    }


def _pair_cases(length: int, model: str) -> dict[str, Run]:
    cu_seqlens, scale = make_cu_seqlens([length]), HEADS[2] ** -0.5
    several = [_queries_keys_values(length, seed) for seed in range(_BEFORE)]
    q, k, _ = (list(x) for x in zip(*several, strict=True))
    lse = [attention_with_statistics(*x, cu_seqlens, length, scale)[1].lse_NH for x in several]
    pairs = [(r, r - 1) for r in range(1, _BEFORE)]

    def weights() -> list[Tensor]:
        return [materialised.attention_with_weights(*x, length, scale)[1] for x in several]

    return {
        "plain (SDPA), 4 times": lambda: [attention(*x, cu_seqlens, length, scale) for x in several],
        "chain of 4": lambda: attention_chain(q, k, lse, cu_seqlens, length, scale, pairs),
        "chain of 4, eager": lambda: materialised.attention_distance(weights()),
        "gram of 4": lambda: attention_gram(
            torch.stack(q), torch.stack(k), torch.stack(lse), cu_seqlens, length, scale
        ),
        "gram of 4, eager": lambda: materialised.attention_gram(torch.stack(weights())),
    }


def _residual_cases(length: int, model: str) -> dict[str, Run]:
    D = HEADS[0] * HEADS[2]
    generator = torch.Generator().manual_seed(0)
    x, branch, block_input, previous = torch.randn(4, length, D, generator=generator).unbind()
    weight = torch.rand(D, generator=generator)
    given: dict[str, Any] = {"eps": _EPS, "next_weight_D": weight}
    return {
        "plain": lambda: residual_norm(x, branch, **given),
        "with statistics": lambda: residual_norm_statistics(
            x, branch, **given, block_input_ND=block_input, previous_ND=previous
        ),
        "eager, with statistics": lambda: materialised.residual_norm_statistics(
            x, branch, weight, _EPS, block_input, previous
        ),
    }


def _model_cases(length: int, model: str) -> dict[str, Run]:
    source = find_model(model)
    d, loaded = source.description, source.load(dtype="float32")
    generator = torch.Generator().manual_seed(0)
    batch = Packed(torch.randint(0, d.vocab_size, (length,), generator=generator), (length,))
    assert d.initial_state == "prelude", "a model that draws its initial state is not for this benchmark"

    def values() -> dict[str, Tensor]:
        return {name: torch.empty(d.depth, length, d.num_heads) for name in NAMES}

    def measured() -> object:
        buffers = Buffers(values())
        return loaded(batch, Statistics(d, buffers)), buffers.values

    def eager() -> object:
        filled = values()
        return loaded(batch, _Weights(filled)), filled

    return {
        "plain forward": lambda: loaded(batch),
        "all attention statistics": measured,
        "eager, weights and statistics": eager,
    }


_GROUPS: Mapping[str, Callable[[int, str], dict[str, Run]]] = {
    "attention": _attention_cases,
    "pairs": _pair_cases,
    "residual": _residual_cases,
    "model": _model_cases,
}


def _queries_keys_values(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values as a model has them: parts of one matrix."""
    H, K, C = HEADS
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(length, H + 2 * K, C, generator=generator)
    return qkv[:, :H], qkv[:, H : H + K], qkv[:, H + K :]


def _take_turns(
    cases: Mapping[str, Run], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Ratios to the first case, and seconds, of every case in every round."""
    reference, *others = cases
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        repeats = {name: max(1, math.ceil(_MIN_S / _elapsed(run, 1))) for name, run in cases.items()}
        for _ in range(rounds):
            before_s = _elapsed(cases[reference], repeats[reference])
            for name in others:
                times_s[name].append(_elapsed(cases[name], repeats[name]))
            after_s = _elapsed(cases[reference], repeats[reference])
            between_s = (before_s + after_s) / 2
            times_s[reference].append(between_s)
            for name in cases:
                ratios[name].append(times_s[name][-1] / between_s)
    return ratios, times_s


def _elapsed(run: Run, times: int) -> float:
    started_s = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started_s) / times


def extra_bytes(group: str, case: str, length: int, model: str) -> int:
    """Peak memory of one call beyond its inputs and results."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_extra, (group, case, length, model))


@torch.inference_mode()
def _measure_extra(group: str, case: str, length: int, model: str) -> int:
    make_cases(group, _WARM_UP, model)[case]()
    run = make_cases(group, length, model)[case]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what the small call freed would serve the large one, uncounted
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    results = run()
    return max(0, _resident("VmHWM") - before - _num_bytes(results))


def _num_bytes(results: Any) -> int:
    if isinstance(results, Tensor):
        return results.nbytes
    if isinstance(results, Mapping):
        return sum(map(_num_bytes, results.values()))
    return sum(map(_num_bytes, results))


def _resident(field: str) -> int:
    """Returns the resident bytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _goals(rows: Sequence[Row], lengths: Sequence[int]) -> list[Goal]:
    found = {(row.group, row.case, row.length): row for row in rows}
    memory = {key: row.extra_bytes or 0 for key, row in found.items()}
    ours, eager, longest = "all attention statistics", "eager, weights and statistics", max(lengths)
    goals = [
        Goal(
            f"{ours} / plain forward, T = {length}",
            found["model", ours, length].ratio,
            at_most=1.35,
            stretch=1.2,
        )
        for length in lengths
    ]
    times = found["model", eager, longest].ratio / found["model", ours, longest].ratio
    goals.append(Goal(f"{eager} / {ours}, time, T = {longest}", times, at_least=2))
    plain = memory["model", "plain forward", longest]
    mine, theirs = (max(0, memory["model", case, longest] - plain) for case in (ours, eager))
    share = mine / theirs if theirs else math.nan
    goals.append(Goal(f"{ours} / {eager}, memory beyond plain, T = {longest}", share, at_most=0.1))
    if len(set(lengths)) > 1:
        power = _power({length: memory["attention", "with statistics", length] for length in lengths})
        goals.append(Goal("power of T that attention's memory grows with", power, at_most=1.15))
    return goals


def _power(values: Mapping[int, int]) -> float:
    """Exponent e of the best fit values = c · T^e."""
    x = [math.log(length) for length in values]
    y = [math.log(max(1, value)) for value in values.values()]
    return statistics.linear_regression(x, y).slope
