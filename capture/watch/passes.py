"""One forward pass while it runs: which tokens are real, and what is measured of every block invocation.

Tensors are copied where they are kept until the pass ends, because a module may change them in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import WatchError
from ...kernels.residual_norm import STATISTICS, residual_statistics
from ..models.loop_schedule import Schedule
from ..store.quantities import GROUPS
from ..taps.history import BlockHistory
from .arguments import Arguments
from .attention_calls import AttentionCall
from .cache import OpenRows, mark_keys, refuse_other_keys
from .placing import AllTokens, place_all, place_new, place_without_attention
from .rows import pack

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Settings of a watch; `watch` explains and checks each field."""

    quantities: tuple[str, ...]
    sink_tokens: int
    states: tuple[str, ...]
    tokens: str
    seed: int

    @property
    def has_attention(self) -> bool:
        return any(name in GROUPS["attention"] for name in self.quantities)

    @property
    def has_steps(self) -> bool:
        return any(name in GROUPS["steps"] for name in self.quantities)

    @property
    def has_gaps(self) -> bool:
        return any(name in GROUPS["gaps"] for name in self.quantities)


@dataclass(frozen=True)
class Sizes:
    """Sizes that all block invocations share."""

    width: int
    dtype: str
    device: str
    num_heads: int | None = None  # until attention is seen
    num_key_heads: int | None = None


@dataclass(frozen=True)
class Begun:
    """A forward pass before its first block: what it is given, and what the passes before it told."""

    settings: WatchSettings
    arguments: Arguments
    opened: OpenRows | None
    structure: Schedule | None  # None in the first pass
    state_depths: tuple[int, ...]
    sizes: Sizes | None


class Pass:
    """A forward pass from its first block on, and what it has left so far.

    The recorder calls its methods in the order of events.
    """

    def __init__(self, begun: Begun, sizes: Sizes, B: int, T: int) -> None:
        self.begun, self.sizes = begun, sizes
        self.new = place_new(begun.arguments, B, T)
        self.all: AllTokens | None = None  # until attention is seen
        settings = begun.settings
        if not settings.has_attention:
            self.all = place_without_attention(begun.arguments, self.new)
        # one entry an invocation: its block, [N] or [N, H] by name, what each row's keys receive, their marks
        self.order: list[int] = []
        self.values: list[dict[str, Tensor]] = []
        self.received: list[dict[int, Tensor]] = []
        self.marks: list[Tensor] = []
        self.states: dict[int, Tensor] = {}  # by depth, packed
        self.history = BlockHistory(steps=settings.has_steps, gaps=settings.has_gaps)
        self._block_input_ND: Tensor | None = None

    def enter(self, block: int, x_BTD: Tensor) -> None:
        """Begins a block invocation."""
        self.order.append(block)
        self.values.append({})
        if "update_norm" in self.begun.settings.quantities:
            self._block_input_ND = pack(x_BTD, self.new.windows)

    def forget_block(self) -> None:
        """Forgets the block invocation that began and did not end."""
        self.order.pop()
        self.values.pop()
        del self.received[len(self.order) :], self.marks[len(self.order) :]
        self._block_input_ND = None

    def measure_attention(self, call: AttentionCall) -> None:
        """Measures the block's attention."""
        if self.all is None:
            self.all = place_all(self.begun.arguments, self.new, self.begun.opened, call.past)
        if call.past != self.all.past:
            raise WatchError(
                f"its attention sees {call.past} earlier tokens where that of other blocks saw "
                f"{self.all.past}: a sliding or cropped cache, or one that recurrences share, cannot be "
                "watched; use a cache that is full for every block and recurrence, or none (use_cache=False)"
            )
        self._check_heads(call)
        self._check_cache(call)
        H = call.q_BHTC.shape[1]
        starts, N = self.new.starts, self.new.num_tokens
        kinds = ("entropy", "peak", "sink")
        measured = {kind: torch.empty(N, H, device=call.q_BHTC.device, dtype=torch.float32) for kind in kinds}
        received: dict[int, Tensor] = {}
        for group in self.all.groups:
            found = call.measure(group, self.begun.settings.sink_tokens)
            parts = {name: x.unflatten(0, (len(group.rows), -1)) for name, x in found._asdict().items()}
            for index, row in enumerate(group.rows):
                here = slice(starts[row], starts[row] + self.new.windows[row].size)
                for kind in kinds:
                    measured[kind][here] = parts[f"{kind}_NH"][index]
                received[row] = parts["received_NH"][index]
        self._put(-1, {f"attention_{kind}": value for kind, value in measured.items()})
        self.received.append(received)

    def measure_residual(self, x_BTD: Tensor) -> None:
        """Measures what the block left."""
        begun, depth, block = self.begun, len(self.order) - 1, self.order[-1]
        x_ND = pack(x_BTD, self.new.windows)
        measured_SN = residual_statistics(x_ND, self._block_input_ND, self.history.previous(block))
        self._block_input_ND = None
        self._put(depth, dict(zip(STATISTICS, measured_SN, strict=True)))
        # in the first pass any block may be called again
        if begun.structure is None or block in _looped(begun.structure):
            self.history.add(block, depth, x_ND, measured_SN[STATISTICS.index("residual_norm")])
        if begun.settings.states and (begun.structure is None or depth in begun.state_depths):
            self.states[depth] = x_ND

    def measure_gaps(self, structure: Schedule) -> None:
        """Measures gaps, of every invocation in a loop to its block's last; called after the last block."""
        for block in _looped(structure):
            for depth, gap in self.history.gaps(block):
                self._put(depth, {"gap_norm": gap.norm_N, "gap_cosine": gap.cosine_N})

    def _put(self, depth: int, values: Mapping[str, Tensor]) -> None:
        """Keeps those values of one invocation that are wanted."""
        wanted = self.begun.settings.quantities
        self.values[depth] |= {name: x for name, x in values.items() if name in wanted}

    def _check_heads(self, call: AttentionCall) -> None:
        """Refuses blocks of different numbers of heads; key heads that are copies are not counted."""
        H = call.q_BHTC.shape[1]
        if self.sizes.num_heads is None:
            self.sizes = replace(self.sizes, num_heads=H, num_key_heads=_key_heads(call.k_BKJC))
        if self.sizes.num_heads != H:
            raise WatchError(
                f"its attention has {H} heads where that of other blocks or passes has "
                f"{self.sizes.num_heads}: watch blocks with as many heads only"
            )

    def _check_cache(self, call: AttentionCall) -> None:
        """Refuses cached keys that are not those that were seen when they were new."""
        marks, opened, depth = mark_keys(call.k_BKJC), self.begun.opened, len(self.order) - 1
        # a pass with more blocks than the one before is refused when it ends
        if call.past and opened is not None and depth < len(opened.marks):
            refuse_other_keys(opened.marks[depth], marks, opened.windows, call.k_BKJC.dtype)
        self.marks.append(marks)


def _looped(structure: Schedule) -> set[int]:
    """Returns the blocks that run in a loop."""
    return {block for loop in structure.loops for block in loop.blocks}


def _key_heads(k_BKJC: Tensor) -> int:
    """Returns the key heads that differ: transformers copies each for the query heads that share it."""
    K = k_BKJC.shape[1]
    for heads in range(1, K):
        if K % heads == 0:
            k = k_BKJC.unflatten(1, (heads, -1))
            if torch.equal(k, k[:, :, :1].expand_as(k)):
                return heads
    return K
