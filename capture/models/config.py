"""config.json, read so that every complaint names the field, its value and the file.

A field is read from the file or it is missing: the defaults of the authors' config classes are leftovers of
other models, so none is believed here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .description import Llama3Scaling, Rotary


class ModelError(ValueError):
    """A model that cannot be used as it is given; says what is wrong with it and what would be right."""


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
        """Refuses a config that asks for something other than what is wired here; absent means wanted."""
        if (value := self.fields.get(name, wanted)) != wanted:
            raise ModelError(
                f"{self.path}: {name} is {value!r}; only {wanted!r} is known here, so this is another wiring"
            )

    def _get(self, name: str, default: object) -> object:
        value = self.fields.get(name)
        if value is None and default is None:
            raise ModelError(f"{self.path}: the field {name} is missing")
        return default if value is None else value


def read_rotary(config: Config) -> Rotary:
    """Old files carry rope_theta and rope_scaling, newer ones rope_parameters with both inside."""
    newer, older = config.nested("rope_parameters"), config.nested("rope_scaling")
    scaling = older if older.fields else newer
    theta = (newer if "rope_theta" in newer.fields else config).number("rope_theta")
    for part in (config, newer, older):
        part.must_be("partial_rotary_factor", 1.0)
    kind = scaling.fields.get("rope_type", scaling.fields.get("type", "default"))
    if kind == "default":
        return Rotary(theta=theta)
    if kind != "llama3":
        raise ModelError(f"{config.path}: rotary scaling {kind!r} is not known; default and llama3 are")
    return Rotary(
        theta=theta,
        scaling=Llama3Scaling(
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_max_positions=scaling.integer("original_max_position_embeddings"),
        ),
    )
