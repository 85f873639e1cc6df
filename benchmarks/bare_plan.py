"""A plan of no model in particular, for stores that benchmarks and tests fill by hand."""

from typing import Any

from ..capture.store.plan import StoredData, StoredModel, StoredPlan, StoredSettings


def bare_plan(num_units: int, unit_tokens: int = 1, unit_sequences: int = 1, **fields: Any) -> StoredPlan:
    """A plan of units of so many slots; `fields` are other fields of StoredPlan."""
    model = StoredModel(
        name="none", notation="(1,0,0)", norm="unknown", prelude=1, core=0, recurrences=0, coda=0, width=1,
        num_parameters=0,
    )  # fmt: skip
    known: dict[str, Any] = {
        "model": model,
        "data": StoredData(name="none"),
        "settings": StoredSettings(quantities=(), dtype="float32", device="cpu"),
        "num_sequences": num_units * unit_sequences,
        "num_tokens": num_units * unit_tokens,
        "dtype": "float32",
        "backend": "pytorch",
    }
    return StoredPlan(
        num_units=num_units, unit_tokens=unit_tokens, unit_sequences=unit_sequences, **(known | fields)
    )
