"""Looped language models, from a description and a set of weights."""
