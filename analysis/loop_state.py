"""Measures of the loop state, by recurrence, placed at the depth where each recurrence ends.

Measures are curves over depth. A loop state is what the last layer of the core leaves, so its numbers stand
at that layer's depth and nowhere else.
"""

from collections.abc import Callable, Mapping

import numpy as np

from .depth_axis import Depths
from .folds import finite_mean


def mean_at_loop_state(name: str) -> Callable[[Mapping[str, np.ndarray], Depths], np.ndarray]:
    """Mean over tokens of a quantity [token, recurrence]."""
    return lambda arrays, depths: to_depths(finite_mean(arrays[name], 0), depths)


def settled_share(arrays: Mapping[str, np.ndarray], depths: Depths) -> np.ndarray:
    """Share of tokens whose likeliest next token is the one after the last recurrence already."""
    token_TR = arrays["lens_token"]
    return to_depths((token_TR == token_TR[:, -1:]).mean(axis=0), depths)


def to_depths(value_R: np.ndarray, depths: Depths) -> np.ndarray:
    """Puts a value for each recurrence at the depth of its last core layer; NaN elsewhere."""
    value_D = np.full(len(depths), np.nan)
    value_D[depths.core_RL[:, -1]] = value_R
    return value_D
