"""The real tokens of a padded batch, their place among the keys, and what a mask lets them see."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import WatchError

# a key this far below a row's largest bias weighs nothing; below the second, the whole row is hidden
_HIDDEN_BELOW, _ROW_HIDDEN = 1e3, -9.9e3


class Window(NamedTuple):
    """A row's real tokens, one after the other: from start to before end."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def read_windows(mask_BT: Tensor | None, B: int, T: int) -> tuple[Window, ...]:
    """Returns each row's real tokens.

    Args:
        mask_BT: not 0 where a token is real; without one every token is.
    Raises:
        WatchError: a row's real tokens do not stand together.
    """
    if mask_BT is None:
        return (Window(0, T),) * B
    windows = []
    for row, is_real in enumerate((mask_BT != 0).tolist()):
        count = sum(is_real)
        start = is_real.index(True) if count else 0
        if not all(is_real[start : start + count]):
            raise WatchError(
                f"row {row} of the attention mask has a hole: its {count} real tokens do not stand together; "
                "pad on the left or on the right only"
            )
        windows.append(Window(start, start + count))
    return tuple(windows)


def refuse_other_axes(ids_shape: Sequence[int], B: int, T: int) -> None:
    """Compares the shape of token ids [rows, tokens] with the first two axes of a residual.

    Raises:
        WatchError: it is [tokens, rows], or all rows' tokens in one.
    """
    rows, tokens = ids_shape
    if rows != tokens and (tokens, rows) == (B, T):
        what = (
            f"[tokens, rows, width], sequence first: {B} and {T} where the ids have {rows} rows of {tokens}"
        )
    elif rows > 1 and (1, rows * tokens) == (B, T):
        what = f"[rows · tokens, width], flattened: {T} where the ids have {rows} rows of {tokens} tokens"
    else:
        return
    raise WatchError(
        f"the blocks' residual is {what}; it must be [rows, tokens, width], so run one row at a time, or "
        "make the module batch first"
    )


def key_windows(earlier: Sequence[Window], new: Sequence[Window], past: int) -> tuple[Window, ...]:
    """Returns each row's real tokens among the keys: those of a cache of `past` tokens, then the new ones.

    Raises:
        WatchError: padding stands between a row's earlier tokens and its new ones.
    """
    joined = []
    for row, (before, after) in enumerate(zip(earlier, new, strict=True)):
        if not after.size:
            joined.append(before)
        elif not before.size:
            joined.append(Window(past + after.start, past + after.end))
        elif before.end == past and after.start == 0:
            joined.append(Window(before.start, past + after.end))
        else:
            raise WatchError(
                f"row {row} has padding between its earlier tokens and the new ones: pad prompts on the left "
                "to go on from a cache"
            )
    return tuple(joined)


def pack(x_BTD: Tensor, windows: Sequence[Window]) -> Tensor:
    """Returns all rows' real tokens, [N, D]; always a copy, for modules that change a tensor in place."""
    return torch.cat(
        [row_TD[window.start : window.end] for row_TD, window in zip(x_BTD, windows, strict=True)]
    )


class Group(NamedTuple):
    """Rows of a batch whose queries and keys stand in the same places."""

    rows: list[int]
    queries: slice
    keys: slice


def groups(queries: Sequence[Window], keys: Sequence[Window]) -> Iterator[Group]:
    """Yields groups of rows that can be measured as one; rows without queries are left out."""
    together: dict[tuple[Window, Window], list[int]] = {}
    for row, pair in enumerate(zip(queries, keys, strict=True)):
        together.setdefault(pair, []).append(row)
    for (query, key), rows in together.items():
        if query.size:
            yield Group(rows, slice(*query), slice(*key))


def check_mask(mask: Tensor, group: Group, past: int) -> None:
    """Compares what real tokens may see with which tokens are real.

    Args:
        mask: [B or 1, H or 1, T or 1, J], as attention is given it.
        past: keys before the first query's own.
    Raises:
        WatchError: a real token sees padding, or does not see itself; names the row.
    """
    rows = mask if len(mask) == 1 else mask[group.rows]
    if rows.shape[2] > 1:
        rows = rows[:, :, group.queries]
    own = rows[..., group.keys]
    outside = (rows[..., : group.keys.start], rows[..., group.keys.stop :])
    first = past + group.queries.start - group.keys.start
    T = group.queries.stop - group.queries.start
    itself = own.expand(-1, -1, T, -1).diagonal(first, 2, 3)  # [.., T]
    if mask.dtype == torch.bool:
        hidden = ~itself
        seen = [part.amax(-1) for part in outside if part.shape[3]]
    else:
        most = own.amax(-1)
        hidden = (itself < most - _HIDDEN_BELOW) | (most < _ROW_HIDDEN) | most.isnan()
        seen = [part.amax(-1) > most - _HIDDEN_BELOW for part in outside if part.shape[3]]
    if (row := _first_row(hidden, group)) is not None:
        raise WatchError(
            f"row {row} has a token that its mask lets see nothing, or not itself: that is padding which no "
            "attention_mask [rows, tokens] declared; give the module one, or watched.set_mask"
        )
    for part in seen:
        if (row := _first_row(part, group)) is not None:
            raise unseen_padding(row, "its mask lets them")


def unseen_padding(row: int, why: str) -> WatchError:
    """Returns the error for attention that falls on padding, of a module that ignores attention_mask."""
    return WatchError(
        f"row {row} of the batch is padded, and its real tokens attend to the padding ({why}): the module "
        "ignores attention_mask there; run rows of equal length together, or one at a time"
    )


def _first_row(is_bad: Tensor, group: Group) -> int | None:
    """Returns the batch's row of the first bad element; the group's first for a mask of all rows."""
    if not is_bad.any():
        return None
    index = int(is_bad.flatten(1).any(1).nonzero()[0])
    return group.rows[index if len(is_bad) > 1 else 0]
