"""The group's metadata, `zarr.json` at the root: written when a store is made, checked when it is opened.

A store may come from anywhere. Every name that its metadata holds is checked here, once: what passes names
files of the store and nothing else, and is as this layout writes it.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StoreError, StoreExistsError, StoreMissingError
from .array_metadata import check_array
from .keys import ATTEMPTS, LEDGER, PLAN, STAGING
from .places.open import open_place
from .places.place import Place
from .plan import StoredPlan

FORMAT = 2
MAX_UNITS = 2**24
_REPAIR = "run `looptap verify --repair {place}`"


@dataclass(frozen=True)
class Group:
    """What the group's `zarr.json` says: the plan as a document, and the metadata of every array."""

    plan: dict[str, Any]
    coordinates: tuple[str, ...]
    """Names of arrays that are written when the store is made; units fill all others."""
    metadata: dict[str, dict[str, Any]]
    """Every array's own `zarr.json`, by name, coordinates first."""

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Metadata of the arrays that units fill, by name."""
        return {name: array for name, array in self.metadata.items() if name not in self.coordinates}

    def to_bytes(self) -> bytes:
        """Returns the content of `zarr.json`."""
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                "looptap_format": FORMAT,
                "plan": self.plan,
                "coordinates": " ".join(self.coordinates),
            },
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": self.metadata},
        }
        return json.dumps(group).encode()

    def plan_bytes(self) -> bytes:
        """Returns the content of the plan's copy."""
        return json.dumps(self.plan, indent=1).encode()

    def array_bytes(self, name: str) -> bytes:
        """Returns the content of an array's own `zarr.json`, as zarr-python writes it."""
        return json.dumps(self.metadata[name], indent=2).encode()

    def planned_keys(self) -> list[str]:
        """Returns the keys of all files that are written when the store is made and stay as they are."""
        keys = ["zarr.json", PLAN, *(f"{name}/zarr.json" for name in self.metadata)]
        chunks = (key for name in self.coordinates if name != "unit_done" for key in self.chunk_keys(name))
        return [*keys, *chunks]

    def chunk_keys(self, name: str) -> list[str]:
        """Returns the keys of an array's files, in the order of rows; other axes lie in one file whole."""
        array = self.metadata[name]
        shape, (rows, *_) = array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"]
        return [f"{name}/c.{i}{'.0' * (len(shape) - 1)}" for i in range(-(-shape[0] // rows))]


def parse_group(content: bytes, where: str) -> Group:
    """Reads and checks the content of `zarr.json`.

    Args:
        where: begins the messages of errors.
    Raises:
        StoreError: it is no group of this format, or names what a store of this format cannot hold.
    """
    try:
        group = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}/zarr.json is damaged ({error}): {_REPAIR.format(place=where)}") from None
    attributes = group.get("attributes") if isinstance(group, dict) else None
    number = attributes.get("looptap_format") if isinstance(attributes, dict) else None
    if attributes is None or number is None:
        raise StoreError(f"{where} is a Zarr group, not a looptap store: it has no attribute looptap_format")
    if number != FORMAT:
        is_newer = isinstance(number, int) and number > FORMAT
        raise StoreError(
            f"{where} is a store of format {number}, this looptap reads format {FORMAT}: "
            f"{'upgrade looptap' if is_newer else 'capture again'}"
        )
    try:
        plan, names = attributes["plan"], attributes["coordinates"].split()
        metadata = group["consolidated_metadata"]["metadata"]
        found = Group(dict(plan), tuple(names), dict(metadata))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{where}/zarr.json lacks what a store's has ({error}): {_REPAIR.format(place=where)}"
        ) from None
    check_group(found, where)
    return found


def check_group(group: Group, where: str) -> None:
    """Checks that all that a group names can be in a store of this layout, and that its parts fit together.

    Raises:
        StoreError: says what cannot be.
    """
    wrong = f"{where}/zarr.json is not as looptap writes it"
    plan = StoredPlan.from_json(group.plan, f"the plan of {where}")
    if not 0 < plan.num_units <= MAX_UNITS:
        raise StoreError(f"{wrong}: {plan.num_units} units; there are 1 to {MAX_UNITS}")
    if strange := [name for name in group.coordinates if name not in group.metadata]:
        raise StoreError(f"{wrong}: it has no array {strange[0]!r}")
    if "unit_done" not in group.coordinates:
        raise StoreError(f"{wrong}: unit_done is no coordinate")
    sizes: dict[str, tuple[str, int]] = {"unit": ("the plan", plan.num_units)}
    for name, array in group.metadata.items():
        try:
            check_array(name, array)
        except ValueError as error:
            raise StoreError(f"{wrong}: array {name!r}: {error}") from None
        for axis, size in zip(array["dimension_names"], array["shape"], strict=True):
            of, known = sizes.setdefault(axis, (name, size))
            if size != known:
                raise StoreError(f"{wrong}: axis {axis} has {size} entries in {name}, {known} in {of}")
    for name, array in group.arrays.items():
        rows, file_rows = array["shape"][0], array["chunk_grid"]["configuration"]["chunk_shape"][0]
        if rows % plan.num_units or not rows or (rows // plan.num_units) % file_rows:
            raise StoreError(
                f"{wrong}: {rows} rows of {name} in files of {file_rows} do not make {plan.num_units} units"
            )


def store_exists(path: str | Path) -> bool:
    """Whether a store is at the path; an empty directory, nothing, or what a killed beginning left is free.

    Raises:
        StoreExistsError: something else is there, or what is left of a store; the message says what.
    """
    place = open_place(path)
    names = sorted(place.names(""))
    if ".looptap" in names and "zarr.json" in names:
        return True
    if not names or place.holds_leftovers_only():
        return False
    shown = ", ".join(map(shown_name, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if lacking := remains_of(place, names):
        raise StoreExistsError(f"{lacking}; it holds {shown}, and nothing was changed")
    raise StoreExistsError(f"{place} is not a looptap store, it holds {shown}: choose another path")


def read_group(place: Place) -> Group:
    """Reads and checks the group's metadata of a store of this format.

    Raises:
        StoreMissingError: nothing is there.
        StoreError: what is there is not a store, or a store of another format, or not to be trusted.
    """
    try:
        content = place.read("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise no_store(place) from None
    group = parse_group(content, str(place))
    place.refuse_links([".looptap", LEDGER, ATTEMPTS, STAGING, *group.metadata])
    return group


def no_store(place: Place) -> StoreError:
    """Returns the error for a place without a `zarr.json`."""
    if not place.exists("") or place.holds_leftovers_only():
        return StoreMissingError(f"{place} does not exist: give the path of a store made by a capture")
    lacking = remains_of(place, place.names(""))
    return StoreError(lacking or f"{place} is not a looptap store: it has no zarr.json")


def remains_of(place: Place, names: Collection[str]) -> str | None:
    """Returns what is missing of a store that has lost its root, and what to do; None if there was none.

    Args:
        names: what lies at the place.
    """
    if ".looptap" in names and "zarr.json" not in names and place.exists(PLAN):
        return f"{place} was a store and has lost zarr.json; {PLAN} is there: {_REPAIR.format(place=place)}"
    if ".looptap" not in names and "zarr.json" in names and _is_of_looptap(place):
        return (
            f"{place} was a store and has lost .looptap, which says which units are there: copy it whole "
            "from where it came from, hidden folders included"
        )
    return None


def shown_name(name: str) -> str:
    """Returns a name that was found as text that any terminal and file takes."""
    return name if name.isprintable() else ascii(name)


def _is_of_looptap(place: Place) -> bool:
    try:
        parse_group(place.read("zarr.json"), str(place))
    except StoreError:
        return False
    return True
