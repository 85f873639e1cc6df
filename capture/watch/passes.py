"""One forward pass while it runs: which tokens are real, and what is measured of every block invocation.

Tensors are copied where they are kept until the pass ends, because a module may change them in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import WatchError
from ...kernels.residual_norm import STATISTICS, residual_statistics
from ..models.schedule import Schedule
from ..store.quantities import GROUPS
from ..taps.history import BlockHistory
from .arguments import Arguments, refuse_other_masks
from .attention_calls import AttentionCall
from .cache import OpenRows, mark_keys, refuse_other_cache, refuse_other_keys
from .rows import Group, Window, groups, key_windows, pack, read_windows, refuse_other_axes

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is measured; `watch` says what each field means and checks it."""

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
    """What all block invocations share."""

    width: int
    dtype: str
    device: str
    num_heads: int | None = None  # until attention is seen
    num_key_heads: int | None = None


@dataclass
class Pass:
    """What one forward pass has left so far; the recorder calls its methods in the order of events."""

    settings: WatchSettings
    arguments: Arguments
    opened: OpenRows | None
    structure: Schedule | None  # of the passes before; None in the first
    state_depths: tuple[int, ...]
    sizes: Sizes | None
    B: int = -1
    T: int = -1
    windows: tuple[Window, ...] = ()  # real tokens among the new ones
    past: int | None = None  # columns in the cache
    keys: tuple[Window, ...] = ()  # real tokens among all columns
    groups: tuple[Group, ...] = ()
    is_empty: bool = False  # no rows or no tokens: nothing is recorded
    block_input_ND: Tensor | None = None
    # one entry an invocation: its block, [N] or [N, H] by name, what each row's keys receive, their marks
    order: list[int] = field(default_factory=list)
    values: list[dict[str, Tensor]] = field(default_factory=list)
    received: list[dict[int, Tensor]] = field(default_factory=list)
    marks: list[Tensor] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)  # by depth, packed
    history: BlockHistory = field(init=False)  # what invocations are compared with

    def __post_init__(self) -> None:
        self.history = BlockHistory(steps=self.settings.has_steps, gaps=self.settings.has_gaps)

    def place_rows(self, x_BTD: Tensor) -> None:
        """Finds the real tokens, from the first block's input."""
        self.B, self.T = B, T = x_BTD.shape[0], x_BTD.shape[1]
        mask, ids = self.arguments.mask_BT, self.arguments.token_id_BT
        if ids is not None:
            refuse_other_axes(ids.shape, B, T)
        if mask is not None and (len(mask) != B or mask.shape[1] < T):
            raise WatchError(
                f"attention_mask is {list(mask.shape)} and the blocks see {B} rows of {T} tokens: give one "
                "number a token, and blocks whose residual is [rows, tokens, width]"
            )
        refuse_other_masks(self.arguments, B, T)
        self.windows = read_windows(None if mask is None else mask[:, mask.shape[1] - T :], B, T)
        if not self.settings.has_attention:
            past = self.arguments.past or (0 if mask is None else mask.shape[1] - T)
            if past:  # nothing tells which rows it is of
                raise WatchError(
                    f"this pass goes on from a cache of {past} tokens, and a cache can only be followed with "
                    "attention quantities: add one of them, or use no cache (use_cache=False)"
                )
            self.place_keys(0)

    def place_keys(self, past: int) -> None:
        """Finds the rows that a pass with so many cached tokens goes on with."""
        self.past, mask, opened = past, self.arguments.mask_BT, self.opened
        earlier = tuple(Window(0, 0) for _ in self.windows)
        if past:
            if opened is None or (len(opened.windows), opened.width) != (self.B, past):
                was = f"{len(opened.windows)} rows of {opened.width}" if opened else "none"
                raise WatchError(
                    f"attention sees {past} earlier tokens of {self.B} rows, and the pass watched before "
                    f"left {was}: a cache that was filled outside the context, cropped, sliding, static or "
                    "of other rows cannot be watched; start it inside, with a dynamic cache, or use none"
                )
            refuse_other_cache(opened, self.arguments.cache)
            earlier = opened.windows
        if mask is not None and mask.shape[1] not in (self.T, past + self.T):
            raise WatchError(
                f"attention_mask is {list(mask.shape)} where {past} tokens are cached and {self.T} new: give "
                "one number a token"
            )
        if mask is not None and mask.shape[1] > self.T and read_windows(mask[:, :past], 0, 0) != earlier:
            raise WatchError(
                "attention_mask calls other cached tokens real than it did when they were new: pass the same "
                "mask on, and one more number for each new token"
            )
        self.keys = key_windows(earlier, self.windows, past)
        self.groups = tuple(groups(self.windows, self.keys))

    def enter(self, block: int, x_BTD: Tensor) -> None:
        """A block begins."""
        self.order.append(block)
        self.values.append({})
        if "update_norm" in self.settings.quantities:
            self.block_input_ND = pack(x_BTD, self.windows)

    def forget_block(self) -> None:
        """The block that began did not end: as if it had not begun."""
        self.order.pop()
        self.values.pop()
        del self.received[len(self.order) :], self.marks[len(self.order) :]
        self.block_input_ND = None

    def measure_attention(self, call: AttentionCall) -> None:
        """The block's attention."""
        if self.past is None:
            self.place_keys(call.past)
        if call.past != self.past:
            raise WatchError(
                f"its attention sees {call.past} earlier tokens where that of other blocks saw {self.past}: "
                "a sliding or cropped cache, or one that recurrences share, cannot be watched; use a cache "
                "that is full for every block and recurrence, or none (use_cache=False)"
            )
        self._check_heads(call)
        self._check_cache(call)
        H = call.q_BHTC.shape[1]
        starts, N = _starts(self.windows)
        kinds = ("entropy", "peak", "sink")
        measured = {kind: torch.empty(N, H, device=call.q_BHTC.device, dtype=torch.float32) for kind in kinds}
        received: dict[int, Tensor] = {}
        for group in self.groups:
            found = call.measure(group, self.settings.sink_tokens)
            parts = {name: x.unflatten(0, (len(group.rows), -1)) for name, x in found._asdict().items()}
            for index, row in enumerate(group.rows):
                here = slice(starts[row], starts[row] + self.windows[row].size)
                for kind in kinds:
                    measured[kind][here] = parts[f"{kind}_NH"][index]
                received[row] = parts["received_NH"][index]
        self._put(-1, {f"attention_{kind}": value for kind, value in measured.items()})
        self.received.append(received)

    def measure_residual(self, x_BTD: Tensor) -> None:
        """What the block left."""
        depth, block = len(self.order) - 1, self.order[-1]
        x_ND = pack(x_BTD, self.windows)
        measured_SN = residual_statistics(x_ND, self.block_input_ND, self.history.previous(block))
        self.block_input_ND = None
        self._put(depth, dict(zip(STATISTICS, measured_SN, strict=True)))
        # in the first pass any block may be called again
        if self.structure is None or block in _looped(self.structure):
            self.history.add(block, depth, x_ND, measured_SN[STATISTICS.index("residual_norm")])
        if self.settings.states and (self.structure is None or depth in self.state_depths):
            self.states[depth] = x_ND

    def measure_gaps(self, structure: Schedule) -> None:
        """Every invocation in a loop beside its block's last one; after the last block."""
        for block in _looped(structure):
            for depth, gap in self.history.gaps(block):
                self._put(depth, {"gap_norm": gap.norm_N, "gap_cosine": gap.cosine_N})

    def _put(self, depth: int, values: Mapping[str, Tensor]) -> None:
        """Keeps what is wanted of the values of one invocation."""
        self.values[depth] |= {name: x for name, x in values.items() if name in self.settings.quantities}

    def _check_heads(self, call: AttentionCall) -> None:
        """Every block has as many heads; key heads are counted without those that are copies."""
        assert self.sizes is not None
        H = call.q_BHTC.shape[1]
        if self.sizes.num_heads is None:
            self.sizes = replace(self.sizes, num_heads=H, num_key_heads=_key_heads(call.k_BKJC))
        if self.sizes.num_heads != H:
            raise WatchError(
                f"its attention has {H} heads where that of other blocks or passes has "
                f"{self.sizes.num_heads}: watch blocks with as many heads only"
            )

    def _check_cache(self, call: AttentionCall) -> None:
        """Cached keys must be those that were seen when they were new."""
        marks, opened, depth = mark_keys(call.k_BKJC), self.opened, len(self.order) - 1
        # a pass with more blocks than the one before is refused when it ends
        if self.past and opened is not None and depth < len(opened.marks):
            refuse_other_keys(opened.marks[depth], marks, opened.windows, call.k_BKJC.dtype)
        self.marks.append(marks)


def _looped(structure: Schedule) -> set[int]:
    """Blocks that run in a loop."""
    return {block for loop in structure.loops for block in loop.blocks}


def _starts(windows: tuple[Window, ...]) -> tuple[list[int], int]:
    """Where each row begins among the packed tokens, and how many there are."""
    starts, total = [], 0
    for window in windows:
        starts.append(total)
        total += window.size
    return starts, total


def _key_heads(k_BKJC: Tensor) -> int:
    """Key heads that differ: transformers copies each for the query heads that share it."""
    K = k_BKJC.shape[1]
    for heads in range(1, K):
        if K % heads == 0:
            k = k_BKJC.unflatten(1, (heads, -1))
            if torch.equal(k, k[:, :, :1].expand_as(k)):
                return heads
    return K
