"""Places of the real tokens of one forward pass: among its new columns, and among those of a cache."""

from dataclasses import dataclass

from ...errors import WatchError
from .arguments import Arguments, refuse_other_masks
from .cache import OpenRows, refuse_other_cache
from .rows import Group, Window, groups, key_windows, read_windows, refuse_other_axes


@dataclass(frozen=True)
class NewTokens:
    """The rows and new tokens of a pass as its first block sees them."""

    B: int
    T: int
    windows: tuple[Window, ...]  # real tokens of each row

    @property
    def starts(self) -> list[int]:
        """Start of each row among the packed tokens."""
        return [sum(window.size for window in self.windows[:row]) for row in range(len(self.windows))]

    @property
    def num_tokens(self) -> int:
        return sum(window.size for window in self.windows)


@dataclass(frozen=True)
class AllTokens:
    """The rows of a pass with the tokens that a cache holds of them."""

    past: int  # columns in the cache
    windows: tuple[Window, ...]  # real tokens of each row among all columns
    groups: tuple[Group, ...]


def place_new(arguments: Arguments, B: int, T: int) -> NewTokens:
    """Finds the real tokens among those that the first block is given.

    Raises:
        WatchError: the mask or the ids are of other axes, or a row's real tokens do not stand together.
    """
    mask, ids = arguments.mask_BT, arguments.token_id_BT
    if ids is not None:
        refuse_other_axes(ids.shape, B, T)
    if mask is not None and (len(mask) != B or mask.shape[1] < T):
        raise WatchError(
            f"attention_mask is {list(mask.shape)} and the blocks see {B} rows of {T} tokens: give one "
            "number a token, and blocks whose residual is [rows, tokens, width]"
        )
    refuse_other_masks(arguments, B, T)
    return NewTokens(B, T, read_windows(None if mask is None else mask[:, mask.shape[1] - T :], B, T))


def place_all(arguments: Arguments, new: NewTokens, opened: OpenRows | None, past: int) -> AllTokens:
    """Finds the rows that a pass with so many cached tokens goes on with.

    Args:
        opened: the rows of the pass before.
    Raises:
        WatchError: the cache is not theirs, or the mask calls other tokens real than it did.
    """
    mask, earlier = arguments.mask_BT, tuple(Window(0, 0) for _ in new.windows)
    if past:
        if opened is None or (len(opened.windows), opened.width) != (new.B, past):
            was = f"{len(opened.windows)} rows of {opened.width}" if opened else "none"
            raise WatchError(
                f"attention sees {past} earlier tokens of {new.B} rows, and the pass watched before "
                f"left {was}: a cache that was filled outside the context, cropped, sliding, static or "
                "of other rows cannot be watched; start it inside, with a dynamic cache, or use none"
            )
        refuse_other_cache(opened, arguments.cache)
        earlier = opened.windows
    if mask is not None and mask.shape[1] not in (new.T, past + new.T):
        raise WatchError(
            f"attention_mask is {list(mask.shape)} where {past} tokens are cached and {new.T} new: give "
            "one number a token"
        )
    if mask is not None and mask.shape[1] > new.T and read_windows(mask[:, :past], 0, 0) != earlier:
        raise WatchError(
            "attention_mask calls other cached tokens real than it did when they were new: pass the same "
            "mask on, and one more number for each new token"
        )
    windows = key_windows(earlier, new.windows, past)
    return AllTokens(past, windows, tuple(groups(new.windows, windows)))


def place_without_attention(arguments: Arguments, new: NewTokens) -> AllTokens:
    """Returns the rows of a pass whose attention is not measured.

    Raises:
        WatchError: it goes on from a cache, and nothing tells of which rows.
    """
    mask = arguments.mask_BT
    if past := arguments.past or (0 if mask is None else mask.shape[1] - new.T):
        raise WatchError(
            f"this pass goes on from a cache of {past} tokens, and a cache can only be followed with "
            "attention quantities: add one of them, or use no cache (use_cache=False)"
        )
    return place_all(arguments, new, None, 0)
