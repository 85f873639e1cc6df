"""config.json, read so that every complaint names the field, its value and the file.

A field is read from the file or it is missing: the defaults of the authors' config classes are leftovers of
other models, so none is believed here.
"""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ModelError, shown
from .description import Llama3Scaling, Rotary
from .stored_tensors import listed

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Config:
    """config.json, or an object inside it, that notes which of its fields were read.

    A field that nobody read may change the forward pass: `refuse_unread` holds a config to what was read.
    """

    path: Path
    fields: dict[str, Any]
    prefix: str = ""
    """Begins the names of fields in messages."""
    _read: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _nested: dict[str, "Config"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = "a positive whole number" if least == 1 else f"a whole number from {least} on"
            raise self._wrong(name, f"must be {wanted}, got {shown(value)}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise self._wrong(name, f"must be a positive number, got {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool | None = False) -> bool:
        """A switch that is off unless the config turns it on; with default None it must be there."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, f"must be true or false, got {shown(value)}")
        return value

    def nested(self, name: str) -> "Config":
        """The fields of an object inside the config; none where there is no such object."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, f"must be an object, got {shown(value)}")
        return self._nested.setdefault(name, Config(self.path, value, f"{self.prefix}{name}."))

    def value(self, name: str) -> Any:
        """Returns what a field holds, unchecked; None where it is missing."""
        self._read.add(name)
        return self.fields.get(name)

    def must_be(self, name: str, wanted: object) -> None:
        """Refuses a config that asks for other than what is wired here; absent or null means wanted."""
        value = self.value(name)
        if value is not None and value != wanted:
            raise self._wrong(
                name, f"is {shown(value)}; only {wanted!r} is known here, so this is another wiring"
            )

    def refuse_unread(self, harmless: Collection[str]) -> None:
        """Refuses fields that were not read and are not known to be harmless: they may say what the model is.

        One that holds null, false or nothing says nothing.

        Raises:
            ModelError: names the fields and what they hold.
        """
        unread = [f"{name} ({shown(value)})" for name, value in self._unread(harmless)]
        if unread:
            raise ModelError(
                f"{self.path}: looptap does not know what {listed(unread)} "
                f"{'does' if len(unread) == 1 else 'do'} to a model of this type; if its code reads no such "
                "field, remove it from a copy of the directory and capture that"
            )

    def _unread(self, harmless: Collection[str]) -> Iterator[tuple[str, object]]:
        for name, value in self.fields.items():
            is_said = value is not None and value is not False and value not in ("", [], {})
            if is_said and name not in self._read and self.prefix + name not in harmless:
                yield self.prefix + name, value
        for part in self._nested.values():
            yield from part._unread(harmless)

    def _get(self, name: str, default: object) -> object:
        value = self.value(name)
        if value is None and default is None:
            raise ModelError(f"{self.path}: the field {self.prefix}{name} is missing")
        return default if value is None else value

    def _wrong(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self.path}: {self.prefix}{name} {what}")


def read_rotary(config: Config, default_theta: float | None = None) -> Rotary:
    """Reads the rotary settings: rope_theta and rope_scaling of old files, rope_parameters of newer ones.

    Args:
        default_theta: theta of files older than the field; None if there are no such files.
    """
    newer, older = config.nested("rope_parameters"), config.nested("rope_scaling")
    thetas = {part.number("rope_theta") for part in (newer, config) if part.value("rope_theta") is not None}
    kinds = {name for part in (newer, older) if (name := _scaling(part)) is not None}
    if len(thetas) > 1 or len(kinds) > 1:
        raise ModelError(
            f"{config.path}: rope_parameters says other than rope_theta or rope_scaling beside it; "
            "leave one of them"
        )
    for part in (config, newer, older):
        part.must_be("partial_rotary_factor", 1.0)
    theta = thetas.pop() if thetas else default_theta
    if theta is None:
        raise ModelError(f"{config.path}: the field rope_theta is missing")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        return Rotary(theta=theta)
    if kind != "llama3":
        raise ModelError(f"{config.path}: rotary scaling {kind!r} is not known; default and llama3 are")
    scaling = _llama3(older if _scaling(older) else newer)
    if _scaling(older) and _scaling(newer) and scaling != _llama3(newer):
        raise ModelError(f"{config.path}: rope_parameters and rope_scaling disagree; leave one of them")
    return Rotary(theta=theta, scaling=scaling)


def _scaling(part: Config) -> str | None:
    """The kind of scaling that an object names, as written; None where it names none."""
    kinds = {str(kind) for name in ("rope_type", "type") if (kind := part.value(name)) is not None}
    if len(kinds) > 1:
        raise ModelError(
            f"{part.path}: {part.prefix}rope_type and {part.prefix}type disagree; leave one of them"
        )
    return kinds.pop() if kinds else None


def _llama3(part: Config) -> Llama3Scaling:
    low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
    if not low < high:
        raise ModelError(
            f"{part.path}: low_freq_factor must be below high_freq_factor, got {low:g} and {high:g}"
        )
    return Llama3Scaling(
        factor=part.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=part.integer("original_max_position_embeddings"),
    )
