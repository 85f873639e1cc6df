"""Records a module: hooks report forward passes, blocks and attention; a pass that ends well is added to its
rows.

Nothing is added before the end, so a pass that raises leaves no half sequence.
"""

import sys
import threading
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import SelectionError, WatchError
from ..models.loop_schedule import Schedule
from ..selection import select_depths, select_tokens
from ..store.quantities import QUANTITIES
from .arguments import read_arguments
from .attention_calls import read_call
from .cache import OpenRows, refer_to
from .passes import DTYPES, Begun, Pass, Sizes, WatchSettings
from .refusals import remembered
from .structure import find_structure, show_order
from .watched_sequence import WatchedSequence

_NO_ATTENTION = 'leave attention out with quantities=("residual", "steps", "gaps")'


class Recorder:
    """Listens to one module; `sequences` are its rows in the order of calls."""

    def __init__(self, module: nn.Module, blocks: dict[str, nn.Module], settings: WatchSettings) -> None:
        self.settings = settings
        self.names = list(blocks)
        self.sequences: list[WatchedSequence] = []
        self.structure: Schedule | None = None
        self.state_depths: tuple[int, ...] = ()
        self.sizes: Sizes | None = None
        self.seconds = 0.0
        self.num_passes = 0
        self.next_mask: Tensor | None = None
        self._title = type(module).__name__
        self._sequence_first = [_is_sequence_first(block) for block in blocks.values()]
        self._thread = threading.get_ident()
        self._begun: Begun | None = None  # the forward pass that runs
        self._pass: Pass | None = None  # the forward pass that runs, from its first block on
        self._is_empty = False  # it has no rows or no tokens: nothing is recorded
        self._handled: BaseException | None = None  # what was being handled when the pass began
        self._started_s = 0.0
        self._running: int | None = None  # the block that is at work
        self._has_attended = False
        self._before: BaseException | None = None  # what was being handled when that block began
        self._refusal: WatchError | None = None  # raised in this pass; the module may have caught it
        self._open: OpenRows | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a forward pass; called before the module runs."""
        self._check_thread()
        # an interrupt may have left them
        self._begun = self._pass = self._running = self._refusal = None
        self._is_empty = False
        self._handled, self._started_s = sys.exc_info()[1], time.perf_counter()
        arguments = read_arguments(module, args, kwargs)
        if self.next_mask is not None:
            arguments, self.next_mask = arguments._replace(mask_BT=self.next_mask), None
        self._begun = Begun(
            self.settings, arguments, self._open, self.structure, self.state_depths, self.sizes
        )

    @remembered
    def enter(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a block; called before it runs."""
        self._check_thread()
        name, begun, run = self.names[block], self._begun, self._pass
        if begun is None:
            raise WatchError(
                f"block {name} was called, but not by a forward pass of {self._title}: watch the module that "
                "is called; gradient checkpointing, which calls blocks again, cannot be watched"
            )
        if self._running is not None:
            raise WatchError(
                f"block {name} was called while {self.names[self._running]} was at work: blocks must run one "
                "after the other"
            )
        given = [kwargs.get("hidden_states"), *args, *kwargs.values()]
        first = next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
        x_BTD, sizes = self._residual(name, first, "is given", run.sizes if run else begun.sizes)
        B, T = x_BTD.shape[:2]
        if run is None or not run.order:
            self._is_empty = self._is_empty or not B * T
            if self._is_empty:
                return
            if self._sequence_first[block] and first is not None and first.ndim == 3:
                raise WatchError(
                    f"block {name} has batch_first=False, and its residual [tokens, rows, "
                    "width]: make the module with batch_first=True, or run one row as [tokens, width]"
                )
            run = self._pass = Pass(begun, sizes, B, T)
        self._check_rows(run, name, x_BTD, "is given")
        self._running, self._has_attended, self._before = block, False, sys.exc_info()[1]
        with torch.no_grad():
            run.enter(block, x_BTD)

    @remembered
    def attend(self, *args: Any, **kwargs: Any) -> None:
        """Measures attention; called after an attention call, with its arguments."""
        run = self._pass
        if run is None or self._running is None:
            return
        name = self.names[self._running]
        if self._has_attended:
            raise WatchError(
                f"block {name} calls scaled_dot_product_attention more than once, so that its attention is "
                f"not one matrix (cross-attention?): name smaller blocks, or {_NO_ATTENTION}"
            )
        self._has_attended = True
        try:
            with torch.no_grad():
                call = read_call(run.new.B, run.new.T, *args, **kwargs)
                # else the products of our own operation would be rounded
                with torch.autocast(call.q_BHTC.device.type, enabled=False):
                    run.measure_attention(call)
        except WatchError as error:
            raise WatchError(f"block {name}: {error}") from None

    @remembered
    def leave(self, block: int, output: Any) -> None:
        """Ends a block; called after it, whether it returned or raised."""
        run, name = self._pass, self.names[block]
        if self._is_foreign() or run is None or self._running != block:
            return  # entering it was refused, or there is nothing to record
        self._running = None
        if sys.exc_info()[1] is not self._before:
            run.forget_block()  # the module may catch what it raised, and call it again
            return
        if self.settings.has_attention and not self._has_attended:
            raise WatchError(
                f"block {name} ran without a call of scaled_dot_product_attention that can be seen (eager, "
                "flash or flex attention, nn.MultiheadAttention, compiled code): use "
                f'attn_implementation="sdpa" in transformers, or {_NO_ATTENTION}'
            )
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        x_BTD, _ = self._residual(name, first, "returns", run.sizes)
        self._check_rows(run, name, x_BTD, "returns")
        with torch.no_grad(), torch.autocast(x_BTD.device.type, enabled=False):
            run.measure_residual(x_BTD)

    def end(self) -> None:
        """Ends a forward pass; called after the module, whether it returned or raised."""
        if self._is_foreign():
            return
        handled, begun, run = self._handled, self._begun, self._pass
        self._begun = self._pass = self._running = self._handled = self._before = None
        if begun is None or sys.exc_info()[1] is not handled or self._is_empty:
            return
        if self._refusal is not None:
            raise self._refusal
        if run is None or not run.order:
            raise WatchError(
                f"a forward pass of {self._title} called none of the blocks {', '.join(self.names[:3])}"
                f"{', …' if len(self.names) > 3 else ''}: name blocks that it calls as modules"
            )
        structure = self._checked_structure(run)
        try:
            state_depths = select_depths(self.settings.states, structure)
        except SelectionError as error:
            raise WatchError(str(error)) from None
        with torch.no_grad():
            run.measure_gaps(structure)
            self._add(run, structure, state_depths)
        self.structure, self.state_depths, self.sizes = structure, state_depths, run.sizes
        self.seconds += time.perf_counter() - self._started_s
        self.num_passes += 1

    def refuse(self, error: WatchError) -> None:
        """Refuses to record the pass that runs."""
        if not self._is_foreign():
            self._refusal = self._refusal or error

    def _is_foreign(self) -> bool:
        return threading.get_ident() != self._thread

    def _check_thread(self) -> None:
        if self._is_foreign():
            raise WatchError(
                f"{self._title} was called by another thread than the one that watches it: watch in the "
                "thread that calls it (nn.DataParallel calls replicas in threads: watch the module alone)"
            )

    def _residual(self, name: str, x: Any, verb: str, known: Sizes | None) -> tuple[Tensor, Sizes]:
        """Returns a block's input or output as [B, T, D], checked against all before it, and their sizes."""
        if not isinstance(x, Tensor) or x.is_nested or x.ndim not in (2, 3):
            what = f"a {type(x).__name__}"
            if isinstance(x, Tensor):
                what = "a nested tensor" if x.is_nested else f"a tensor {list(x.shape)}"
            raise WatchError(
                f"block {name} {verb} {what}: its residual must be a tensor [rows, tokens, width] or "
                "[tokens, width], as first argument or hidden_states, and as what it returns or the first of "
                "a tuple"
            )
        if x.dtype not in DTYPES:
            raise WatchError(
                f"block {name} {verb} {x.dtype}, and what is measured is float32: run the module in "
                f"{', '.join(DTYPES.values())}"
            )
        sizes = known or Sizes(x.shape[-1], DTYPES[x.dtype], str(x.device))
        if (x.shape[-1], DTYPES[x.dtype]) != (sizes.width, sizes.dtype):
            raise WatchError(
                f"block {name} {verb} {list(x.shape)} in {DTYPES[x.dtype]} where other residuals are "
                f"{sizes.width} wide and {sizes.dtype}: watch blocks of one residual stream"
            )
        return x.detach() if x.ndim == 3 else x.detach().unsqueeze(0), sizes

    def _check_rows(self, run: Pass, name: str, x_BTD: Tensor, verb: str) -> None:
        B, T = run.new.B, run.new.T
        if tuple(x_BTD.shape[:2]) != (B, T):
            raise WatchError(
                f"block {name} {verb} {list(x_BTD.shape)} where the first block was given {B} rows of "
                f"{T} tokens: watch blocks that see the same tokens"
            )

    def _checked_structure(self, run: Pass) -> Schedule:
        known = self.structure
        if known is None or known.order == tuple(run.order):
            return known or find_structure(run.order, self.names)
        raise WatchError(
            f"this forward pass called {show_order(run.order, self.names)}, the first one "
            f"{show_order(known.order, self.names)}, {known.notation}: one store holds one structure, so "
            "watch passes of another one apart"
        )

    def _add(self, run: Pass, structure: Schedule, state_depths: tuple[int, ...]) -> None:
        """Adds what a pass left to its rows: all of it made arrays first, then row by row."""
        assert run.all is not None
        new, past = run.new, run.all.past
        arrays = _to_arrays(run, structure.depth)
        states = [_to_stored(run.states[depth]) for depth in state_depths]
        first_id = self._open.first_id if self._open and past else len(self.sequences)
        rows = self._open.sequences if self._open and past else [WatchedSequence() for _ in new.windows]
        start = 0
        for row, (sequence, window) in enumerate(zip(rows, new.windows, strict=True)):
            here, before = slice(start, start + window.size), sequence.length
            received = None
            if "attention_received" in self.settings.quantities and window.size:
                received = np.stack([_to_numpy(part[row]) for part in run.received], 1)
            sequence.extend(window.size, {name: values[here] for name, values in arrays.items()}, received)
            if states and window.size:
                tokens = self.settings.tokens
                chosen = select_tokens(tokens, self.settings.seed, first_id + row, sequence.length)
                chosen = chosen[chosen >= before]
                kept = np.stack([state[start + chosen - before] for state in states], 1)
                sequence.keep_states(chosen, kept, only=tokens == "last")
            start += window.size
        if not past:
            self.sequences += rows
        cache = refer_to(run.begun.arguments.cache)
        self._open = OpenRows(first_id, rows, run.all.windows, past + new.T, run.marks, cache)


def _is_sequence_first(block: nn.Module) -> bool:
    is_torchs = isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    return is_torchs and not block.self_attn.batch_first


def _to_arrays(run: Pass, depth: int) -> dict[str, np.ndarray]:
    """Token ids, and every quantity of the pass's own tokens as [N, depth] or [N, depth, H]."""
    ids, N = run.begun.arguments.token_id_BT, run.new.num_tokens
    token_id_N = np.full(N, -1, np.int32)
    if ids is not None and tuple(ids.shape) == (run.new.B, run.new.T):
        parts = [row_T[slice(*window)] for row_T, window in zip(_to_numpy(ids), run.new.windows, strict=True)]
        token_id_N = np.concatenate(parts).astype(np.int32)
    arrays: dict[str, np.ndarray] = {"token_id": token_id_N}
    for name in run.begun.settings.quantities:
        if name in ("state", "attention_received"):
            continue
        heads = (run.sizes.num_heads or 0,) if "head" in QUANTITIES[name].axes else ()
        arrays[name] = np.full((N, depth, *heads), np.nan, np.float32)
        for index, values in enumerate(run.values):
            if name in values:
                arrays[name][:, index] = _to_numpy(values[name])
    return arrays


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _to_stored(state_ND: Tensor) -> np.ndarray:
    """Returns values as NumPy arrays; bfloat16, which NumPy lacks, as its bits in uint16."""
    state_ND = state_ND.cpu()
    return state_ND.view(torch.uint16).numpy() if state_ND.dtype == torch.bfloat16 else state_ND.numpy()
