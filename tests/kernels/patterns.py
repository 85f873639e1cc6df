"""Queries, keys and lse of several block invocations, and guards around what a kernel writes, for tests of
what compares attention patterns.
"""

import torch

from looptap.kernels import reference
from looptap.kernels.attention import make_cu_seqlens
from looptap.kernels.gpu import tiles

GUARD = 1000  # elements before and behind


class Patterns:
    """n invocations of packed sequences, each some way on from the one before.

    q, k and v of an invocation are slices of one matrix, as a model's are, so token strides are wide.
    """

    def __init__(
        self, n, lengths, H, K, C, *, dtype=torch.float32, device="cpu", moved=0.1, size=1.0, seed=0, extra=0
    ):
        generator = torch.Generator().manual_seed(seed)
        N, width = sum(lengths), (H + 2 * K) * C + extra
        matrices = [torch.randn(N, width, generator=generator) * size]
        for _ in range(n - 1):
            matrices.append(matrices[-1] + torch.randn(N, width, generator=generator) * size * moved)
        self.qkv = [matrix.to(device, dtype) for matrix in matrices]
        self.q = [x[:, extra : extra + H * C].unflatten(1, (H, C)) for x in self.qkv]
        self.k = [x[:, extra + H * C : extra + (H + K) * C].unflatten(1, (K, C)) for x in self.qkv]
        self.lengths, self.scale = lengths, C**-0.5
        self.where = (make_cu_seqlens(lengths, device), max(lengths, default=0))
        self.measure()

    def measure(self):
        """Takes lse anew, after q or k were changed."""
        self.lse = [
            reference.attention_lse(q, k, self.lengths, self.scale).float()
            for q, k in zip(self.q, self.k, strict=True)
        ]

    def matrices(self):
        """Float64 attention by invocation and sequence."""
        return [
            reference.attention_matrix(q, k, self.lengths, self.scale)
            for q, k in zip(self.q, self.k, strict=True)
        ]

    def chain(self, launch, pairs):
        return launch(self.q, self.k, self.lse, *self.where, self.scale, pairs)

    def gram(self, launch):
        stacked = (torch.stack(x) for x in (self.q, self.k, self.lse))
        return launch(*stacked, *self.where, self.scale)

    def wanted_chain(self, pairs):
        """Received [R, N, H] and distances [P, S, H], pairs flat."""
        a = self.matrices()
        received = torch.stack([torch.cat([x.sum(-2).T for x in maps]) for maps in a])
        flat = zip(pairs[::2], pairs[1::2], strict=True)
        return received, torch.stack([reference.attention_distance(a[i], a[j]) for i, j in flat])


class Guards:
    """What a launcher allocates starts as NaN and lies inside more of it."""

    def __init__(self, monkeypatch):
        self.guarded = []
        monkeypatch.setattr(tiles, "make_empty", self.make_empty)

    def make_empty(self, shape, dtype, like):
        size = torch.Size(shape).numel()
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=like.device)
        self.guarded.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    def check(self):
        assert self.guarded
        for memory, size in self.guarded:
            assert memory[:GUARD].isnan().all() and memory[GUARD + size :].isnan().all()
