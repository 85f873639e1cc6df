"""The kernels on a GPU: the share of copy bandwidth and matrix throughput that they reach, what statistics
add, and PyTorch's own ways beside them.

The residual norm is bound by memory: 8·D bytes a row in bfloat16 with the norm for the next branch, 10·D with
a state to compare with. Attention is bound by the matrix units and, beside them, by the
exponentials; its statistics cost one multiply-add a score and 16 bytes a token and head. Columns run one of
attention's two products. A chain of R recurrences does R times that, and a Gram of n invocations n/C times.
Goals: "must" and "stretch" columns of the specification. A goal whose case could not run is missed.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import attention, attention_with_statistics, make_cu_seqlens
from ..kernels.attention_pairs import attention_chain, attention_gram
from ..kernels.gpu.attention_columns import attention_columns as launch_columns
from ..kernels.residual_norm import residual_norm, residual_norm_statistics
from . import materialised
from .timing import Goal, Row
from .timing_gpu import Run, Timer, extra_cuda_bytes, measure_anchors, num_sets

_EPS = 1e-6
WORKSPACE_BYTES = 64 * 2**20  # that a Gram may take for itself


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of what is measured; the defaults are Ouro-1.4B's, 16384 tokens."""

    tokens: int = 16_384
    width: int = 2048
    heads: int = 16
    head_width: int = 128
    lengths: tuple[int, ...] = (2048, 8192)
    gram_length: int = 1024
    gram_invocations: int = 64
    dtype: torch.dtype = torch.bfloat16


TINY = Sizes(tokens=32, width=48, heads=2, head_width=16, lengths=(16,), gram_length=8, gram_invocations=3)


@dataclass
class Found:
    """The result of one group."""

    anchors: dict[str, float]
    rows: list[Row]
    goals: list[Goal]
    failures: dict[str, str]


def bench_gpu(rounds: int) -> tuple[dict[str, float], list[Row], list[Goal]]:
    """Measures all groups, for `looptap bench kernels`."""
    found = [run(Timer(torch.device("cuda"), rounds), Sizes()) for run in GROUPS.values()]
    for group in found:
        for case, why in group.failures.items():
            print(f"{case} could not run: {why}")
    return found[0].anchors, [r for f in found for r in f.rows], [g for f in found for g in f.goals]


def bench_norms(timer: Timer, sizes: Sizes) -> Found:
    """The residual add with its norm, and with statistics."""
    N, D, device = sizes.tokens, sizes.width, timer.device
    sets = num_sets(device, 3 * N * D * 2)
    x, branch, previous = torch.randn(3, sets, N, D, device=device, dtype=sizes.dtype).unbind()
    weight = torch.rand(D, device=device, dtype=sizes.dtype)
    given: dict[str, Any] = {"eps": _EPS, "next_weight_D": weight}
    compiled = torch.compile(materialised.residual_norm, fullgraph=True, backend=_backend(device))
    times = timer(
        {
            "plain": lambda i: residual_norm(x[i], branch[i], **given),
            "statistics": lambda i: residual_norm_statistics(x[i], branch[i], **given),
            "with previous": lambda i: residual_norm_statistics(
                x[i], branch[i], **given, previous_ND=previous[i]
            ),
            "compiled, plain": lambda i: compiled(x[i], branch[i], weight, _EPS),
            "eager, plain": lambda i: materialised.residual_norm(x[i], branch[i], weight, _EPS),
        },
        sets,
    )
    anchors, t = _anchors(timer), OrNaN(times)
    copied = 4 * N * D * sizes.dtype.itemsize / t["plain"] / 1e12
    goals = [
        Goal("K1 bandwidth / copy", copied / anchors["copy_tb_per_s"], at_least=0.90, stretch=0.94),
        Goal("K1 statistics / plain", t["statistics"] / t["plain"], at_most=1.03, stretch=1.01),
        Goal("K1 with previous / plain", t["with previous"] / t["plain"], at_most=1.30, stretch=1.26),
        Goal("K1 plain / compiled", t["plain"] / t["compiled, plain"], at_most=1.05, stretch=0.95),
    ]
    return Found(anchors, make_rows("norms", N, times), goals, timer.failures)


def bench_attention(timer: Timer, sizes: Sizes) -> Found:
    """Attention with and without statistics and the columns, at two head widths and every length."""
    found = Found(_anchors(timer), [], [], timer.failures)
    for C in (sizes.head_width, sizes.head_width // 2):
        for length in sizes.lengths:
            torch.compiler.reset()
            _attention_at(timer, sizes, C, length, found)
    return found


def _attention_at(timer: Timer, sizes: Sizes, C: int, length: int, found: Found) -> None:
    N, H = max(sizes.tokens, length), sizes.heads * sizes.head_width // C
    sets = num_sets(timer.device, 3 * N * H * C * 2)
    qkv = torch.randn(sets, N, 3 * H, C, device=timer.device, dtype=sizes.dtype)
    q, k, v = (qkv[:, :, part * H : (part + 1) * H] for part in range(3))
    cu_seqlens, scale = make_cu_seqlens([length] * (N // length), timer.device), C**-0.5
    lse = [
        attention_with_statistics(*x, cu_seqlens, length, scale)[1].lse_NH for x in zip(q, k, v, strict=True)
    ]
    at = f"{length} x {C}"
    cases: dict[str, Run] = {
        f"{at} plain": lambda i: attention(q[i], k[i], v[i], cu_seqlens, length, scale),
        f"{at} statistics": lambda i: attention_with_statistics(
            q[i], k[i], v[i], cu_seqlens, length, scale, columns=False
        ),
        f"{at} columns": lambda i: attention_columns(q[i], k[i], lse[i], cu_seqlens, length, scale),
    }
    for name, run in _library_attention(q, k, v, length, scale).items():
        cases[f"{at} {name}"] = run
    if length == min(sizes.lengths):
        cases[f"{at} eager, weights"] = lambda i: materialised.attention_with_weights(
            q[i], k[i], v[i], length, scale
        )
    times = timer(cases, sets)
    t = OrNaN({name.removeprefix(f"{at} "): s for name, s in times.items()})
    found.rows += make_rows("attention", length, times)
    flop = 2 * N * length * H * C  # two products over half of the scores
    found.anchors[f"attention {at}, TFLOP/s"] = flop / t["plain"] / 1e12
    most = 1.08 if C == 128 else 1.10
    found.goals += [
        Goal(f"K2 statistics / plain, {at}", t["statistics"] / t["plain"], at_most=most, stretch=1.04),
        Goal(f"K2 plain / FlexAttention, {at}", t["plain"] / t["FlexAttention"], at_most=1.05, stretch=0.85),
        Goal(f"K3 / K2, {at}", t["columns"] / t["plain"], at_most=0.60, stretch=0.50),
    ]
    if sizes.head_width == C:
        against = t["cuDNN"] / t["plain"]
        found.goals.append(Goal(f"K2 plain, speed of cuDNN's, {at}", against, at_least=0.65, stretch=0.85))
    if length == min(sizes.lengths):
        faster = t["eager, weights"] / t["statistics"]
        found.goals.append(Goal(f"K2 statistics, speed of eager, {at}", faster, at_least=6, stretch=9))


def _library_attention(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> dict[str, Run]:
    """PyTorch's own, [B, H, T, C] views of the same memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def batch(x_NHC: Tensor) -> Tensor:
        return x_NHC.unflatten(0, (-1, length)).transpose(1, 2)

    def sdpa(backend: SDPBackend | None) -> Run:
        def run(i: int) -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    batch(q[i]), batch(k[i]), batch(v[i]), is_causal=True, scale=scale
                )

        return run

    if not q.is_cuda:
        return {"SDPA": sdpa(None)}
    mask = create_block_mask(
        lambda b, h, query, key: query >= key, None, None, length, length, device=str(q.device)
    )
    flex = torch.compile(flex_attention, fullgraph=True)
    return {
        "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": sdpa(SDPBackend.FLASH_ATTENTION),
        "FlexAttention": lambda i: flex(batch(q[i]), batch(k[i]), batch(v[i]), block_mask=mask, scale=scale),
    }


def attention_columns(
    q_NHC: Tensor, k_NKC: Tensor, lse_NH: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    """The kernel that attention with statistics launches for its columns, alone. On a CPU, where columns come
    with the rows, there is none: a dry run takes the whole instead.
    """
    if q_NHC.is_cuda:
        return launch_columns(q_NHC, k_NKC, lse_NH, cu_seqlens_S, max_length, scale)
    return attention_with_statistics(q_NHC, k_NKC, k_NKC, cu_seqlens_S, max_length, scale)[1].received_NH


def bench_pairs(timer: Timer, sizes: Sizes) -> Found:
    """A chain of recurrences beside as many column kernels; a Gram beside the materialised one."""
    found = Found(_anchors(timer), [], [], timer.failures)
    _chain(timer, sizes, found)
    _gram(timer, sizes, found)
    return found


def _chain(timer: Timer, sizes: Sizes, found: Found) -> None:
    N, H, C, length, most = sizes.tokens, sizes.heads, sizes.head_width, min(sizes.lengths), 4
    scale, cu_seqlens = C**-0.5, make_cu_seqlens([length] * (N // length), timer.device)
    qkv = torch.randn(most, N, 3 * H, C, device=timer.device, dtype=sizes.dtype)
    q, k, v = (list(qkv[:, :, part * H : (part + 1) * H]) for part in range(3))
    lse = [
        attention_with_statistics(*x, cu_seqlens, length, scale)[1].lse_NH for x in zip(q, k, v, strict=True)
    ]

    def chain(num: int, kind: str) -> Run:
        pairs = [(r, r - 1) for r in range(1, num)]
        if kind == "all pairs":
            pairs = [(a, b) for a in range(num) for b in range(a)]
        args = (q[:num], k[:num], lse[:num], cu_seqlens, length, scale, pairs)
        return lambda i: attention_chain(*args)

    def columns(i: int) -> None:
        for r in range(most):
            attention_columns(q[r], k[r], lse[r], cu_seqlens, length, scale)

    chains = {(num, kind): chain(num, kind) for num in (2, 3, 4) for kind in ("neighbours", "all pairs")}
    cases: dict[str, Run] = {f"chain of {num}, {kind}": run for (num, kind), run in chains.items()}
    times = timer({"columns, 4 times": columns, **cases}, 2)
    found.rows += make_rows("pairs", length, times)
    t = OrNaN(times)
    for num, kind in chains:
        ratio = t[f"chain of {num}, {kind}"] / (num / most * t["columns, 4 times"])
        found.goals.append(Goal(f"K4 chain of {num}, {kind} / {num} x K3", ratio, at_most=1.20, stretch=1.10))


def _gram(timer: Timer, sizes: Sizes, found: Found) -> None:
    n, T, H, C = sizes.gram_invocations, sizes.gram_length, sizes.heads, sizes.head_width
    scale, cu_seqlens = C**-0.5, make_cu_seqlens([T], timer.device)
    q, k, v = torch.randn(3, n, T, H, C, device=timer.device, dtype=sizes.dtype).unbind()
    lse = torch.stack(
        [attention_with_statistics(*x, cu_seqlens, T, scale)[1].lse_NH for x in zip(q, k, v, strict=True)]
    )

    def eager(i: int) -> Tensor:
        each = zip(q, k, v, strict=True)
        return materialised.attention_gram(
            torch.stack([materialised.attention_with_weights(*x, T, scale)[1] for x in each])
        )

    def ours(i: int) -> Tensor:
        return attention_gram(q, k, lse, cu_seqlens, T, scale)

    times = timer({f"gram of {n}": ours, f"gram of {n}, eager": eager}, 2)
    t = OrNaN(times)
    found.rows += make_rows("gram", T, times)
    faster = t[f"gram of {n}, eager"] / t[f"gram of {n}"]
    found.goals.append(Goal(f"K4 Gram of {n}, speed of eager", faster, at_least=4, stretch=8))
    if timer.device.type == "cuda":
        workspace = extra_cuda_bytes(lambda: ours(0)) / WORKSPACE_BYTES
        found.goals.append(Goal(f"K4 Gram of {n}, workspace / 64 MiB", workspace, at_most=1.0))


GROUPS: Mapping[str, Callable[[Timer, Sizes], Found]] = {
    "norms": bench_norms,
    "attention": bench_attention,
    "pairs": bench_pairs,
}


class OrNaN(dict[str, float]):
    """Times of which some may not be there: what is made of them is NaN, and no goal."""

    def __missing__(self, name: str) -> float:
        return math.nan


def _anchors(timer: Timer) -> dict[str, float]:
    small = timer.device.type == "cpu"
    return measure_anchors(timer, copied_bytes=2**16, size=64) if small else measure_anchors(timer)


def _backend(device: torch.device) -> str:
    return "inductor" if device.type == "cuda" else "aot_eager"


def make_rows(group: str, length: int, times: Mapping[str, float]) -> list[Row]:
    """The first case is the one that others are held against."""
    if not times:
        return []
    reference = next(iter(times))
    return [
        Row(group=group, length=length, case=case, seconds=s, ratio=s / times[reference], reference=reference)
        for case, s in times.items()
    ]
