"""Packed sequences for the tests of attention kernels: awkward in memory, with their float64 answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from looptap.kernels import reference
from looptap.kernels.gpu import tiles
from looptap.kernels.gpu.tuned import Settings

GUARD = 4096  # elements: a tile of rows and more
# NaNs that no arithmetic makes: (integer of the same size, its value)
POISON = {
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float16: (torch.int16, 0x7EAD),
}


@dataclass(frozen=True)
class Packed:
    """Slices of one qkv matrix, whose other rows and columns are NaN."""

    q_NHC: Tensor
    k_NKC: Tensor
    v_NKC: Tensor
    lengths: tuple[int, ...]
    scale: float

    @property
    def cu_seqlens_S(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.q_NHC.device, torch.int32)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def real_lengths(self) -> list[int]:
        """Lengths without empty sequences, which the references do not take."""
        return [length for length in self.lengths if length]

    def scores(self) -> list[Tensor]:
        """Float64 [H, T, T] of each sequence, −∞ where a query does not look."""
        group = self.q_NHC.shape[1] // self.k_NKC.shape[1]
        found = []
        for q_THC, k_TKC in zip(
            self.q_NHC.split(self.real_lengths), self.k_NKC.split(self.real_lengths), strict=True
        ):
            k_THC = k_TKC.double().repeat_interleave(group, 1)
            s_HTT = torch.einsum("thc,shc->hts", q_THC.double(), k_THC) * self.scale
            found.append(s_HTT.masked_fill(torch.ones_like(s_HTT[0]).triu(1).bool(), float("-inf")))
        return found

    def largest_score(self) -> float:
        return max(s.masked_fill(s.isinf(), 0).abs().max().item() for s in self.scores())

    def answers(self, sink_tokens: int) -> dict[str, Tensor]:
        """Everything the kernels give, in float64."""
        found = reference.attention(
            self.q_NHC, self.k_NKC, self.v_NKC, self.real_lengths, self.scale, sink_tokens
        )
        found["lse"] = torch.cat([s_HTT.logsumexp(-1).T for s_HTT in self.scores()])
        return found

    def plain(self) -> Tensor:
        """o as PyTorch computes it step by step in the dtype of the inputs."""
        group = self.q_NHC.shape[1] // self.k_NKC.shape[1]
        parts = (x.split(self.real_lengths) for x in (self.q_NHC, self.k_NKC, self.v_NKC))
        rows = []
        for q, k, v in zip(*parts, strict=True):
            q, k, v = (
                x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
            )
            s_HTT = (q @ k.transpose(1, 2)) * self.scale
            s_HTT = s_HTT.masked_fill(torch.ones_like(s_HTT[0]).triu(1).bool(), float("-inf"))
            rows.append((s_HTT.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(rows)


def make_packed(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    largest: float | None = None,
    offset: int = 16,
    gap: int = 32,
) -> Packed:
    """Random sequences, heads = (H, K).

    Args:
        largest: queries are scaled until the largest score is this.
        offset, gap: NaN columns before and behind the heads; multiples of 8 keep tensors aligned.
    """
    H, K = heads
    N, columns = sum(lengths), (H + 2 * K) * width
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N, columns, generator=generator, dtype=torch.float64)
    matrix = torch.full((N + 2, offset + columns + gap), float("nan"), dtype=dtype)
    inside = matrix[1:-1, offset : offset + columns]
    inside.copy_(values)
    q, k, v = (x.unflatten(1, (-1, width)) for x in inside.split([H * width, K * width, K * width], dim=1))
    packed = Packed(q, k, v, lengths, width**-0.5)
    if largest is not None:
        q.copy_(q.double() * (largest / packed.largest_score()))
    moved = matrix.to(device)[1:-1, offset : offset + columns]
    q, k, v = (x.unflatten(1, (-1, width)) for x in moved.split([H * width, K * width, K * width], dim=1))
    return Packed(q, k, v, lengths, width**-0.5)


class Guards:
    """Makes outputs inside poisoned memory, in place of `tiles.make_empty`."""

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        integer, value = POISON[dtype]
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 2 * GUARD,), value, dtype=integer, device=like.device)
        self.made.append((memory, memory[GUARD : GUARD + size]))
        return memory[GUARD : GUARD + size].view(dtype).view(shape)

    def check(self) -> None:
        assert self.made
        for memory, inside in self.made:
            value = memory[0]
            assert (memory[:GUARD] == value).all() and (memory[-GUARD:] == value).all(), "written outside"
            assert (inside != value).all(), "left unwritten"


@contextmanager
def guarded() -> Iterator[None]:
    """All outputs made inside are filled, and nothing around them is touched."""
    guards = Guards()
    with mock.patch.object(tiles, "make_empty", guards):
        yield
    guards.check()


@contextmanager
def cut(rows: int, keys: int, *, descriptors: bool = False) -> Iterator[None]:
    """Launches take these tiles, whatever the table says."""
    settings = Settings(rows=rows, keys=keys, num_warps=4, num_stages=1, descriptors=descriptors)
    pointers = Settings(rows=rows, keys=keys, num_warps=4, num_stages=1)

    def find(
        kernel: str, width: int, dtype: torch.dtype, device: torch.device, *, for_any: bool = False
    ) -> Settings:
        return pointers if for_any else settings

    with mock.patch.object(tiles, "find_settings", find):
        yield


def poisoned(packed: Packed, sequences: tuple[int, ...], value: float) -> Packed:
    """A copy in the same layout, with q, k and v of some sequences set to a value."""
    ends = torch.tensor([0, *packed.lengths]).cumsum(0).tolist()
    matrix = packed.q_NHC._base
    assert matrix is not None
    copy = matrix.clone()
    views = []
    for x in (packed.q_NHC, packed.k_NKC, packed.v_NKC):
        view = copy.as_strided(x.shape, x.stride(), x.storage_offset())
        for sequence in sequences:
            view[ends[sequence] : ends[sequence + 1]] = value
        views.append(view)
    return Packed(*views, packed.lengths, packed.scale)
