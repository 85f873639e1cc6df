"""`watch`, the context in which a module is listened to, and `Watched`, its results."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import xarray as xr
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import QuantityError, SelectionError, StoreExistsError, WatchError
from ..selection import select_tokens
from ..store.group import store_exists
from ..store.quantities import GROUPS, resolve_quantities
from ..store.reading.reader import open_store
from .arguments import read_mask
from .attention_calls import Listener
from .blocks import Blocks, find_blocks
from .hooks import Link, register
from .passes import WatchSettings
from .record import Recorder
from .write import hash_weights, write_store


class Watched:
    """Record of what a watched module did so far; it stays when the context is left."""

    def __init__(self, module: nn.Module, recorder: Recorder, name: str) -> None:
        self._module, self._recorder, self._name = module, recorder, name
        self._weights: tuple[int, str | None] = (-1, None)  # their hash, after so many passes

    @property
    def num_sequences(self) -> int:
        """Number of rows of all batches so far."""
        return len(self._recorder.sequences)

    @property
    def notation(self) -> str | None:
        """The loop that was found, as (prelude,core x recurrences,coda); None before the first pass."""
        structure = self._recorder.structure
        return None if structure is None else structure.notation

    def set_mask(self, mask_BT: Tensor) -> None:
        """Says which tokens of the next forward pass are real, for a module that is given no attention_mask.

        Args:
            mask_BT: 1 for real tokens, 0 for padding; [rows, tokens].
        """
        if (mask := read_mask(mask_BT)) is None:
            raise WatchError(
                f"a mask must be a tensor [rows, tokens], not {list(getattr(mask_BT, 'shape', ()))}"
            )
        self._recorder.next_mask = mask

    def save(self, path: str | Path) -> None:
        """Writes what was recorded to a store like that of a capture.

        Raises:
            WatchError: no forward pass was recorded.
            StoreExistsError: something is at the path. StoreFullError: no room.
        """
        if store_exists(path):
            raise _occupied(path)
        if self._weights[0] != self._recorder.num_passes:
            self._weights = self._recorder.num_passes, hash_weights(self._module)
        write_store(path, self._recorder, self._module, self._name, self._weights[1])

    def dataset(self) -> xr.Dataset:
        """Returns the store in memory, as `looptap.open` returns one."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "watched.zarr"
            self.save(path)
            return open_store(path).load()


@contextmanager
def watch(
    module: nn.Module,
    blocks: Blocks = None,
    *,
    quantities: Sequence[str] = ("residual", "steps", "gaps", "attention"),
    sink_tokens: int = 1,
    states: Sequence[str] = (),
    tokens: str = "all",
    seed: int = 0,
    store: str | Path | None = None,
    name: str | None = None,
) -> Iterator[Watched]:
    """Measures what happens inside a module's blocks whenever the module is called, as `capture` does.

        with looptap.watch(model, blocks="model.layers.*") as watched:
            model(input_ids, attention_mask=mask)
        dataset = watched.dataset()

    The module's results are what they are without it, bit for bit. Residuals are what a block is given (its
    first tensor argument, or hidden_states) and returns (or the first of a tuple), [rows, tokens, width] or
    [tokens, width]. Attention is what each block's one call of `scaled_dot_product_attention` computes, with
    any mask; other ways (eager, flash, nn.MultiheadAttention, torch.compile) cannot be seen, and are refused
    if attention is wanted. While it is, nn.MultiheadAttention elsewhere in the module takes its slower path.

    The loop is found from the order in which blocks are called: those called once before the first that
    repeats are the prelude, the cycle that repeats is the core, those after it the coda.

    Every row of a batch is a sequence, numbered over all calls. Which tokens are real is read from an
    `attention_mask` [rows, tokens] given to the module, or `set_mask`; without one, all are, also those that
    `generate` appends to rows that ended. Token ids are `input_ids` or the first tensor of whole numbers; -1
    where there is none of the residual's shape. A call with a cache goes on with the rows of the call before
    it, which must be those that the cache is of: its object and its keys are compared. That takes attention
    quantities; without them a call with a cache (past_key_values, a longer attention_mask) is refused. The
    caches of transformers have one place a layer: a layer that is repeated there needs use_cache=False.

    Residuals of equally many rows and tokens cannot be told from [tokens, rows, width], sequence first, which
    otherwise is refused where ids show it. Hooks that are registered inside the context run after those that
    measure, so what they change in a block's output is not in the record.

    Results are kept in memory until they are saved: 4 bytes a number, so for default quantities
    (7 + 4 · heads) · 4 bytes a token and block invocation. Gaps keep the core's residuals during a pass, and
    the first pass those of all blocks. Several contexts may watch one module, one inside the other; calls
    from other threads are refused.

    Args:
        module: what will be called; of an encoder-decoder, its encoder or its decoder.
        blocks: a name or a pattern, "model.layers.*" (a star stands for one part of a name); a module; a
            ModuleList, ModuleDict or Sequential, for all that it holds; or a list of these. None finds the
            module's lists of blocks, if they stand side by side and hold all blocks of one class.
        quantities: names and groups; those that read the model's head (lens, exit) or compare
            whole sequences (distances) are not to be had here.
        sink_tokens: first real keys of a row that count as the attention sink.
        states, tokens: selections of residuals that are kept whole, as in `capture`.
        seed: seed of token samples.
        store: saved there when the body ends without an error.
        name: name of the module in the store, by default that of its class.
    Raises:
        WatchError, on entering, in the module's forward pass or on saving: a case that cannot be measured
            exactly; says which and what to do. No hook is left behind, whatever raises.
    """
    if not isinstance(module, nn.Module):
        raise WatchError(f"a {type(module).__name__} was given as module: give a torch.nn.Module")
    settings = _make_settings(quantities, sink_tokens, states, tokens, seed)
    if store is not None and store_exists(store):
        raise _occupied(store)
    if any(parameter.is_meta or is_lazy(parameter) for parameter in module.parameters()):
        raise WatchError(
            "some parameters are on the meta device or not made yet (lazy): load the module whole, or "
            "call it once, before watching"
        )
    found = find_blocks(module, blocks)
    recorder = Recorder(module, found, settings)
    watched = Watched(module, recorder, name or type(module).__name__)
    with ExitStack() as stack:
        link = Link(recorder, module, *found.values())
        stack.callback(link.close)
        for handle in register(link, module, [*found.values()]):
            stack.callback(handle.remove)
        if settings.has_attention:
            stack.enter_context(Listener(recorder.attend))
        yield watched
    if store is not None:
        watched.save(store)


def _make_settings(
    quantities: Sequence[str], sink_tokens: int, states: Sequence[str], tokens: str, seed: int
) -> WatchSettings:
    quantities, states = ([given] if isinstance(given, str) else [*given] for given in (quantities, states))
    reason = "it reads a head or gate that a watched module does not show; capture the model instead"
    absent = dict.fromkeys((*GROUPS["lens"], *GROUPS["exit"]), reason)
    reason = "watching does not compare whole sequences; capture the model instead"
    absent |= dict.fromkeys(GROUPS["distances"], reason)
    names = [name for text in quantities for name in text.split(",")]
    try:
        wanted = resolve_quantities([*names, "state"] if states else names, absent)
        select_tokens(tokens, seed, 0, 1)  # their form
    except (QuantityError, SelectionError) as error:
        raise WatchError(str(error)) from None
    if "state" in wanted and not states:
        raise WatchError('the quantity state needs states=, for example states=("core[all]@last",)')
    if not isinstance(sink_tokens, int) or isinstance(sink_tokens, bool) or sink_tokens < 1:
        raise WatchError(f"sink_tokens must be a whole number of at least 1, got {sink_tokens}")
    return WatchSettings(
        quantities=wanted, sink_tokens=sink_tokens, states=tuple(states), tokens=tokens, seed=seed
    )


def _occupied(path: str | Path) -> StoreExistsError:
    return StoreExistsError(f"{path} holds a store: watching makes a new one, so choose another path")
