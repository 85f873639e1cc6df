"""Faults of a finished store, beside one of the same plan that was captured in peace."""

import os
from pathlib import Path

import numpy as np


def find_faults(path: Path, calm_path: Path) -> list[str]:
    """Returns a line for everything that is not as in the calm store; none if nothing is."""
    import zarr

    from ..capture.store.care.verify import verify_store
    from ..capture.store.writing.commit import Store

    report = verify_store(path)
    faults = [f"torn: {problem}" for problem in report.problems]
    faults += [f"lost: unit {unit}" for unit in report.units_missing]
    faults += [f"left over: {file}" for file in report.uncommitted]
    group, calm_group = (zarr.open_group(str(p), mode="r") for p in (path, calm_path))
    for name, calm in calm_group.arrays():
        array = group[name]
        assert isinstance(array, zarr.Array)
        if np.asarray(array[...]).tobytes() != np.asarray(calm[...]).tobytes():
            faults.append(f"other values: {name}")
    store, calm_store = Store.open(path), Store.open(calm_path)
    if [entry["unit"] for entry in store.entries()] != [entry["unit"] for entry in calm_store.entries()]:
        faults.append("twice or lost: the ledgers list other units")
    attempts = _attempts(path, store.num_units)
    for entry, wanted in zip(store.entries(), calm_store.entries(), strict=True):
        unit = entry["unit"]
        if (entry["num_tokens"], entry["shards"]) != (wanted["num_tokens"], wanted["shards"]):
            faults.append(f"other files: unit {unit}")
        numbers, committed = attempts[unit], entry["attempt"]
        if numbers != list(range(1, len(numbers) + 1)) or committed not in numbers:
            faults.append(f"attempts {numbers}, of which {committed} is committed: unit {unit}")
    return faults


def _attempts(path: Path, num_units: int) -> dict[int, list[int]]:
    """Returns the numbers of the attempts at each unit, in order."""
    from ..capture.store.keys import ATTEMPTS

    found: dict[int, list[int]] = {unit: [] for unit in range(num_units)}
    for name in os.listdir(path / ATTEMPTS):
        if name.startswith("."):  # a note that was being written when its writer was killed
            continue
        unit, number = map(int, name.split("."))
        found[unit].append(number)
    return {unit: sorted(numbers) for unit, numbers in found.items()}
