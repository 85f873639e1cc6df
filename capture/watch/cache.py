"""Checks that a cache is the one that was watched while it was filled."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import WatchError
from .rows import Window
from .watched_sequence import WatchedSequence


@dataclass(frozen=True)
class OpenRows:
    """The rows that a pass with a cache goes on with: those of the pass before it."""

    first_id: int
    sequences: list[WatchedSequence]
    windows: tuple[Window, ...]  # real tokens among the columns
    width: int  # columns so far, padding included
    marks: list[Tensor]  # one number a key, by depth, [B, K, J]
    cache: Callable[[], Any] | None  # gives the cache object, while it lives


def refer_to(cache: Any) -> Callable[[], Any] | None:
    """Returns a weak reference to a cache; None without a cache, or if it takes none."""
    try:
        return None if cache is None else weakref.ref(cache)
    except TypeError:
        return None


def refuse_other_cache(opened: OpenRows, cache: Any) -> None:
    """Raises WatchError if the cache is not the object of the pass before, where both are known."""
    if cache is not None and opened.cache is not None and opened.cache() is not cache:
        raise WatchError(
            "past_key_values is another object than in the pass watched before: a copied cache, or that of "
            "another batch in between, cannot be watched; run one batch to its end after the other"
        )


def mark_keys(k_BKJC: Tensor) -> Tensor:
    """Returns one number a key, float32 [B, K, J], that hardly two different keys share."""
    C = k_BKJC.shape[-1]
    weight_C = torch.arange(1, C + 1, device=k_BKJC.device, dtype=torch.float32).cos()
    return k_BKJC.detach().float() @ weight_C


def refuse_other_keys(seen: Tensor, now: Tensor, windows: tuple[Window, ...], dtype: torch.dtype) -> None:
    """Compares the marks of real cached keys with those when they were new.

    Some modules keep something smaller and compute keys anew (DeepSeek's latent attention): those agree
    within rounding only.

    Raises:
        WatchError: another key.
    """
    # copies of key heads may be made in one pass and not in another
    K = min(seen.shape[1], now.shape[1])
    seen, now = (x[:, :: x.shape[1] // K] for x in (seen, now[..., : seen.shape[2]]))
    column_J = torch.arange(seen.shape[2], device=seen.device)
    start_B, end_B = torch.tensor(windows, device=seen.device).unbind(-1)
    is_real_BJ = (column_J >= start_B[:, None]) & (column_J < end_B[:, None])
    largest = seen.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
    is_close = (seen - now).abs() <= max(4 * torch.finfo(dtype).eps, 1e-4) * largest
    is_same = is_close | (seen == now) | (seen.isnan() & now.isnan())
    if not (is_same | ~is_real_BJ[:, None]).all():
        raise WatchError(
            "its cache holds other keys than were watched: rows that changed places (beam search), "
            "an edited or quantised cache, or another batch's, cannot be watched"
        )
