"""Attention maps of one prompt for a page: chooses those that are shown, packs them, and says what they show.

Every map would be too much for a long loop, so a page holds the mean over heads of some depths, and single
heads of fewer. Weights are packed in thousandths, and only those of keys that a query can see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..depth_axis import Depths
from .words import number, place

WEIGHT_COLORS = ("#f4f5f7", "#c9dbea", "#86b0d3", "#3f7fb5", "#1d4d8c", "#0a1f4d")
MOST_MAPS = 60  # more are too small and too many to compare by eye
GRID_BYTES, HEAD_BYTES = 2_000_000, 3_000_000  # of one page: means over heads, single heads
_WEIGHT_BYTES = 3  # a weight in thousandths and a comma: most are below 100
_NOT_FINITE = -1


@dataclass(frozen=True)
class Shown:
    """Depths whose mean over heads a page shows, and those of them whose every head it holds."""

    outside: list[int]
    """Depths of prelude and coda, or of a feedforward model's layers."""
    recurrences: list[int]
    layers: list[int]
    core: list[int]
    """Depths of `recurrences` times `layers`, in the order they run."""
    every_head: list[int]

    @property
    def depths(self) -> list[int]:
        return sorted([*self.outside, *self.core])


def choose(depths: Depths, num_heads: int, num_tokens: int) -> Shown:
    """Chooses about `MOST_MAPS` depths, fewer of large maps: first and last recurrences, layers evenly."""
    map_bytes = _WEIGHT_BYTES * num_tokens * (num_tokens + 1) // 2
    room = min(MOST_MAPS, max(1, GRID_BYTES // map_bytes))
    R, L = depths.core_RL.shape
    outside = np.flatnonzero(depths.recurrence < 0).tolist()
    outside = thinned(outside, max(room // 3, room - R * L) if R else room)
    recurrences, layers = list(range(R)), list(range(L))
    room -= len(outside)
    if room < R * L:
        recurrences = thinned(_powers(R), max(2, room // L))
        layers = thinned(layers, max(1, room // len(recurrences)))
    core = [int(depths.core_RL[r, i]) for r in recurrences for i in layers]
    shown = sorted([*outside, *core])
    every_head = thinned(shown, HEAD_BYTES // (map_bytes * num_heads))
    return Shown(outside, recurrences, layers, core, every_head)


def thinned(values: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of the values, evenly spaced, including first and last if two may stay."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]


def left_out(shown: Shown, depths: Depths, num_heads: int) -> list[str]:
    """Returns sentences about what a page does not hold."""
    R, L = depths.core_RL.shape
    sentences = []
    if len(shown.depths) < len(depths):
        sentences.append(f"{len(shown.depths)} of {len(depths)} blocks' maps are shown")
        if len(shown.recurrences) < R:
            sentences[-1] += f", recurrences {_listed(shown.recurrences)} of {R}"
        if len(shown.layers) < L:
            sentences[-1] += f", core layers {_listed(shown.layers)} of {L}"
        rest = len(depths) - R * L
        if len(shown.outside) < rest:
            sentences[-1] += (
                f", {len(shown.outside)} of {rest} {'blocks outside the core' if R else 'layers'}"
            )
    if num_heads > 1 and len(shown.every_head) < len(shown.depths):
        held = len(shown.every_head)
        sentences.append(
            f"single heads are held for {held} of the {len(shown.depths)} blocks shown"
            if held
            else "single heads are left out"
        )
    return [f"To keep the page small, {sentence}." for sentence in sentences]


def sections(shown: Shown, depths: Depths) -> list[dict[str, Any]]:
    """Returns the maps by stage: prelude and coda in a row, the core as a grid wider than high."""
    result = []
    for stage in (0, 1, 2):
        found = [depth for depth in shown.outside if depths.stage[depth] == stage]
        if stage == 1 and shown.core:
            result.append({"name": "core", **_grid(shown)})
        elif found:
            name = depths.stages[stage] if len(depths.core_RL) else "layers"
            result.append({"name": name, "depths": [(depth, int(depths.layer[depth])) for depth in found]})
    return result


def _grid(shown: Shown) -> dict[str, Any]:
    depth_RL = np.reshape(shown.core, (len(shown.recurrences), len(shown.layers)))
    axes = [("recurrence", shown.recurrences), ("layer", shown.layers)]
    if len(shown.recurrences) > len(shown.layers):
        axes, depth_RL = axes[::-1], depth_RL.T
    (row_name, row_index), (column_name, column_index) = axes
    rows = [(f"{row_name} {i}", row) for i, row in zip(row_index, depth_RL.tolist(), strict=True)]
    return {"rows": rows, "columns": [f"{column_name} {i}" for i in column_index]}


def packed(attention_DHTT: np.ndarray, shown: Shown, depths: Depths, tokens: list[str]) -> dict[str, Any]:
    """Returns the data that the page's script draws from."""
    num_heads = attention_DHTT.shape[1]
    heads = shown.every_head if num_heads > 1 else []
    return {
        "tokens": tokens,
        "colors": WEIGHT_COLORS,
        "names": {depth: place(depths, depth) for depth in shown.depths},
        "mean": {d: _thousandths(attention_DHTT[d].mean(axis=0, dtype=np.float64)) for d in shown.depths},
        "heads": {d: [_thousandths(map_TT) for map_TT in attention_DHTT[d]] for d in heads},
        "num_heads": num_heads,
    }


def seen(attention_DHTT: np.ndarray, depths: Depths, tokens: list[str]) -> list[str]:
    """Returns sentences with numbers about all maps, including those that are not on the page."""
    visible_TT = np.tri(attention_DHTT.shape[-1], dtype=bool)
    bad = sum(int((~np.isfinite(map_HTT[:, visible_TT])).sum()) for map_HTT in attention_DHTT)
    sentences = (
        [f"{bad:,} weights are not finite; they are drawn in orange and left out here."] if bad else []
    )
    sentences += [_to_first(attention_DHTT, depths, tokens), _elsewhere(attention_DHTT, depths, tokens)]
    return [sentence for sentence in [*sentences, _change(attention_DHTT, depths)] if sentence]


def strongest(attention_DHTT: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns depth, head, query and key of the largest weight on neither the first token nor the query."""
    T = attention_DHTT.shape[-1]
    mask_TT = np.tril(np.ones((T, T), bool), -1) & (np.arange(T) > 0)
    best, found = 0.0, None
    for depth, map_HTT in enumerate(attention_DHTT):
        weight_HTT = np.where(mask_TT & np.isfinite(map_HTT), map_HTT, 0)
        if weight_HTT.max() > best:
            best = float(weight_HTT.max())
            head, query, key = np.unravel_index(int(weight_HTT.argmax()), weight_HTT.shape)
            found = depth, int(head), int(query), int(key)
    return found


def _to_first(attention_DHTT: np.ndarray, depths: Depths, tokens: list[str]) -> str:
    if len(tokens) < 2:
        return ""
    first_DH = np.stack([map_HTT[:, 1:, 0].mean(axis=1, dtype=np.float64) for map_HTT in attention_DHTT])
    if not np.isfinite(first_DH).any():
        return ""
    depth, head = np.unravel_index(int(np.nanargmax(first_DH)), first_DH.shape)
    return (
        f"Head {head} of {place(depths, int(depth))} puts most on the first token, “{tokens[0]}”: "
        f"{first_DH[depth, head]:.1%} of a later token's attention on average; the mean over all heads "
        f"and blocks is {np.nanmean(first_DH):.1%}."
    )


def _elsewhere(attention_DHTT: np.ndarray, depths: Depths, tokens: list[str]) -> str:
    found = strongest(attention_DHTT)
    if found is None:
        return ""
    depth, head, query, key = found
    return (
        f"Apart from the first token and a token itself, the largest weight goes from “{tokens[query]}” "
        f"(position {query}) to “{tokens[key]}” (position {key}): {number(attention_DHTT[found])}, in head "
        f"{head} of {place(depths, depth)}."
    )


def _change(attention_DHTT: np.ndarray, depths: Depths) -> str:
    """Says how far each core layer's maps move from recurrence 1 to the last, in Frobenius distance."""
    core_RL = depths.core_RL
    last = len(core_RL) - 1
    if last < 1 or attention_DHTT.shape[-1] < 2:
        return ""
    before = min(1, last - 1)  # of two recurrences the last is the second
    ends = list(zip(core_RL[before], core_RL[last], strict=True))
    moved_L = np.array([_norm(attention_DHTT[b] - attention_DHTT[a]) for a, b in ends])
    if not np.isfinite(moved_L).all():
        return ""
    size = float(np.mean([_norm(attention_DHTT[b]) for _, b in ends]))
    most, least = int(moved_L.argmax()), int(moved_L.argmin())
    text = f"From recurrence {before} to {last} the maps of core layer {most} "
    text += "change" if len(moved_L) == 1 else "change most"
    text += f", by {number(moved_L[most])} in Frobenius distance (mean over heads)"
    if len(moved_L) > 1:
        text += f", those of layer {least} least, by {number(moved_L[least])}"
    return f"{text}; a map's own norm is {number(size)} on average."


def _norm(map_HTT: np.ndarray) -> float:
    return float(np.linalg.norm(map_HTT.astype(np.float64), axis=(1, 2)).mean())


def _thousandths(map_TT: np.ndarray) -> list[int]:
    """Weights of the keys each query can see, row by row, in thousandths."""
    weights = map_TT[np.tril_indices(len(map_TT))]
    finite = np.isfinite(weights)
    return np.where(finite, np.rint(np.where(finite, weights, 0) * 1000), _NOT_FINITE).astype(int).tolist()


def _powers(num: int) -> list[int]:
    """0, the powers of two and the last of so many."""
    return [0, *(2**power for power in range(num.bit_length()) if 2**power < num - 1), num - 1]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
