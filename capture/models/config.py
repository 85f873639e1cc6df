"""config.json, read so that every complaint names the field, its value and the file.

A field is read from the file or it is missing: the defaults of the authors' config classes are leftovers of
other models, so none is believed here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .description import Llama3Scaling, Rotary


@dataclass(frozen=True)
class Config:
    """config.json with its path, so that every complaint names both the field and the file."""

    path: Path
    fields: dict[str, Any]

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = "a positive whole number" if least == 1 else f"a whole number from {least} on"
            raise ModelError(f"{self.path}: {name} must be {wanted}, got {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self.path}: {name} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool | None = False) -> bool:
        """A switch that is off unless the config turns it on; with default None it must be there."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {name} must be true or false, got {value!r}")
        return value

    def nested(self, name: str) -> "Config":
        """The fields of an object inside the config; none where there is no such object."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise ModelError(f"{self.path}: {name} must be an object, got {value!r}")
        return Config(self.path, value)

    def must_be(self, name: str, wanted: object) -> None:
        """Refuses a config that asks for other than what is wired here; absent or null means wanted."""
        value = self.fields.get(name)
        if value is not None and value != wanted:
            raise ModelError(
                f"{self.path}: {name} is {value!r}; only {wanted!r} is known here, so this is another wiring"
            )

    def _get(self, name: str, default: object) -> object:
        value = self.fields.get(name)
        if value is None and default is None:
            raise ModelError(f"{self.path}: the field {name} is missing")
        return default if value is None else value


def read_rotary(config: Config, default_theta: float | None = None) -> Rotary:
    """Reads the rotary settings: rope_theta and rope_scaling of old files, rope_parameters of newer ones.

    Args:
        default_theta: theta of files older than the field; None if there are no such files.
    """
    newer, older = config.nested("rope_parameters"), config.nested("rope_scaling")
    thetas = {
        part.number("rope_theta") for part in (newer, config) if part.fields.get("rope_theta") is not None
    }
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
    kind = part.fields.get("rope_type", part.fields.get("type"))
    return kind if kind is None else str(kind)


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
