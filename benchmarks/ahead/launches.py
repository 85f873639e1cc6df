"""What the launchers hand to Triton for a row of the settings' table, recorded without a GPU.

A launcher is called as an operation calls it, on meta tensors, while its kernel is kept from running. So what
is compiled ahead of time is what a launch compiles: the same signature, constants and options.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import JITFunction

from ...kernels.gpu import (
    attention,
    attention_chain,
    attention_columns,
    attention_gram,
    residual_distance,
    residual_norm,
    tuned,
)
from ...kernels.gpu.tuned import Entry, Settings

HEADS, LENGTH = 16, 500
# of tokens: AMD's compiler addresses tensors below 2 GiB otherwise than those above
FEW, MANY = 1000, 2_000_000
NORM_TENSORS = ("branch_weight", "stream_weight", "next_weight", "block_input", "previous", "last")
_SCALE, _EPS = 0.125, 1e-6


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments, constants and options that its launcher gives it."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def taking(entry: Entry) -> Iterator[None]:
    """Launches of the entry's kernel take the entry's settings, whatever the table says."""
    find = tuned._find

    def instead(kernel: str, *rest: Any) -> Settings:
        return entry.settings if kernel == entry.kernel else find(kernel, *rest)

    with mock.patch.object(tuned, "_find", instead):
        yield


def record(launcher: Callable[..., object], *given: Any) -> list[Launch]:
    """The launches that a launcher makes. Their kernels do not run: what it returns is not filled."""
    found = []

    def keep(kernel: JITFunction, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", keep):
        launcher(*given)
    return found


def launches(entry: Entry) -> dict[str, Launch]:
    """Launches of a row by name, which between them meet all that the compiler tells apart: both half types,
    full and narrow tiles, strides at 16 bytes and at any, few and many tokens, what is optional.
    """
    with taking(entry):
        return dict(_CASES[entry.kernel](entry))


Cases = Iterator[tuple[str, Launch]]


def _attention_cases(entry: Entry) -> Cases:
    for name, (q, k, v) in _head_cases(entry):
        if entry.kernel == "attention_columns":
            (launch,) = record(attention_columns.attention_columns, q, k, _lse(q), *_packing())
        elif entry.kernel == "attention":
            (launch,) = record(attention.attention, q, k, v, *_packing())
        else:
            (launch,) = record(attention.attention_with_statistics, q, k, v, *_packing(), 1, False)
        yield name, launch


def _chain_cases(entry: Entry) -> Cases:
    R = int(entry.kernel[-1])
    every = [r for a in range(R) for b in range(a) for r in (a, b)]
    neighbours = [r for a in range(R - 1) for r in (a, a + 1)]
    for index, (name, (q, k, _)) in enumerate(_head_cases(entry)):
        kind, pairs = ("neighbours", neighbours) if index else ("all pairs", every)
        tensors = ([q] * R, [k] * R, [_lse(q)] * R)
        (launch,) = record(attention_chain.attention_chain, *tensors, *_packing(), pairs)
        yield f"{name}, {kind}", launch


def _gram_cases(entry: Entry) -> Cases:
    for name, (q, k, _) in _head_cases(entry):
        yield name, _gram(2, q, k)[0]


def _gram_product_cases(entry: Entry) -> Cases:
    q, k, _ = _heads(FEW, torch.float16, 64, 8)
    yield "one block", _gram(entry.width, q, k)[1]
    if entry.width == attention_gram.LARGEST_BLOCK:  # more invocations are cut into blocks of so many
        yield "two blocks", _gram(entry.width + 1, q, k)[1]


def _gram(n: int, q_NHC: Tensor, k_NHC: Tensor) -> list[Launch]:
    """The first tiles of n invocations, and their product."""
    tensors = (x_NHC.expand(n, *x_NHC.shape).contiguous() for x_NHC in (q_NHC, k_NHC))
    lse_nNH = _lse(q_NHC).expand(n, -1, -1).contiguous()
    return record(attention_gram.attention_gram, *tensors, lse_nNH, *_packing())[:2]


def _residual_cases(entry: Entry) -> Cases:
    D = entry.width - 16  # masked
    if entry.dtype == "half":
        yield "bfloat16, plain", residual_launch(FEW, entry.width, torch.bfloat16, "next_weight")
    for dtype, N in _DTYPES[entry.dtype]:
        name = f"{_name(dtype)}, {N} rows"
        yield f"{name}, everything", residual_launch(N, D, dtype, *NORM_TENSORS, "statistics")
        x, y = (_meta(N, D, dtype=dtype) for _ in range(2))
        norms = [_meta(N, dtype=torch.float32) for _ in range(2)]
        yield f"{name}, distance", record(residual_distance.residual_distance, x, y, *norms)[0]


def residual_launch(N: int, D: int, dtype: torch.dtype, *given: str) -> Launch:
    """The residual add of N rows of D with these of NORM_TENSORS, and "statistics" if they are wanted."""
    x, branch = (_meta(N, D, dtype=dtype) for _ in range(2))
    sizes = {name: (D,) if name.endswith("_weight") else (N, D) for name in NORM_TENSORS}
    tensors = [_meta(*sizes[name], dtype=dtype) if name in given else None for name in NORM_TENSORS]
    weights, references = tensors[:3], tensors[3:]
    if "statistics" in given:
        return record(residual_norm.residual_norm_statistics, x, branch, *weights, _EPS, *references)[0]
    return record(residual_norm.residual_norm, x, branch, *weights, _EPS)[0]


_CASES: dict[str, Callable[[Entry], Cases]] = {
    "attention": _attention_cases,
    "attention_with_statistics": _attention_cases,
    "attention_columns": _attention_cases,
    **{f"attention_chain_{R}": _chain_cases for R in range(2, attention_chain.MOST_RECURRENCES + 1)},
    "attention_gram": _gram_cases,
    "attention_gram_product": _gram_product_cases,
    "residual_norm": _residual_cases,
}


def _head_cases(entry: Entry) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """q, k and v of heads as wide as the tile, and of narrower ones, whose strides are multiples of nothing
    where the row is for any target.
    """
    for dtype, N in _DTYPES[entry.dtype]:
        narrow = dtype != torch.bfloat16
        C = entry.width * 5 // 8 if narrow else entry.width
        unit = 1 if narrow and entry.target == "any" else 8
        yield f"{_name(dtype)}, {N} tokens, C={C}", _heads(N, dtype, C, unit)


# with how many tokens each is compiled
_DTYPES = {
    "half": ((torch.float16, MANY), (torch.bfloat16, MANY), (torch.bfloat16, FEW)),
    "float32": ((torch.float32, MANY), (torch.float32, FEW)),
}


def _heads(N: int, dtype: torch.dtype, C: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as models have them, parts of one matrix."""
    qkv = _meta(N, 3 * HEADS * C + unit % 8, dtype=dtype)[:, : 3 * HEADS * C]
    q, k, v = qkv.unflatten(1, (3 * HEADS, C)).split(HEADS, dim=1)
    return q, k, v


def _packing() -> tuple[Tensor, int, float]:
    return _meta(3, dtype=torch.int32), LENGTH, _SCALE


def _lse(q_NHC: Tensor) -> Tensor:
    return _meta(*q_NHC.shape[:2], dtype=torch.float32)


def _meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
