"""Every analysis that is more than a curve over depth, by name."""

from .walk import Analysis

ANALYSES: dict[str, Analysis] = {}
