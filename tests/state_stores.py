"""Stores with states of every kind, ragged and unfinished, and what must be read from them.

    python -m looptap.tests.state_stores DIR

writes some, each with the values that plain readers must find in it.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.layout import BFLOAT16_NAN, ArraySpec, Codec, create_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store

DEPTHS, HEADS, HIDDEN, RECURRENCES, SEQUENCES = 4, 3, 6, 2, 5
STATE_DEPTHS = [1, 4, 7]  # numbers of the kept depths, not their places
BITS = {"bits_of": "bfloat16"}


def make_states(
    path: str | Path,
    unit_tokens: int,
    shard_rows: int | None = None,
    num_units: int = 4,
    kept: int | None = 3,
    codec: Codec = "none",
) -> Store:
    """An empty store: every token's states bare and losslessly compressed, and `state`.

    Args:
        shard_rows: of the states on the token axis; a unit has one shard if not given.
        kept: `state` is of every so many-th token; None: of all, on the token axis.
        codec: of `state`.
    """
    whole, kept = kept is None, kept or 1
    U, C, K = num_units, unit_tokens, -(-unit_tokens // kept)
    plan = bare_plan(
        U,
        C,
        SEQUENCES,
        num_state_rows=None if whole else K,
        recorded_hash=f"{path} {C} {shard_rows}",
    )
    shape, of_token = (U * C, len(STATE_DEPTHS), HIDDEN), ("token", "depth_state", "hidden")
    # the last unit is as good as empty
    num_tokens = [tokens_of(u, C) for u in range(U)]
    slot = np.arange(U * C)
    sequence = np.where(slot % C < np.repeat(num_tokens, C), slot // C * SEQUENCES, -1)
    chosen = np.full(U * K, -1)
    for u, num in enumerate(num_tokens):
        chosen[u * K : u * K + -(-num // kept)] = u * C + np.arange(0, num, kept)
    length = np.zeros((U, SEQUENCES), np.int32)
    length[:, 0] = num_tokens
    coordinates = {
        "token_id": (("token",), slot.astype(np.int32), {}),
        "token_sequence": (("token",), sequence.astype(np.int32), {}),
        "sequence_length": (("sequence",), length.reshape(-1), {}),
        "state_depth": (("depth_state",), np.array(STATE_DEPTHS, np.int32), {}),
    }
    if not whole:
        coordinates["state_token"] = (("token_state",), chosen.astype(np.int64), {})
    arrays = {
        "residual_norm": ArraySpec(("token", "depth"), (U * C, DEPTHS), C, "float32", {}),
        "attention_entropy": ArraySpec(("token", "depth", "head"), (U * C, DEPTHS, HEADS), C, "float32", {}),
        "lens_token": ArraySpec(("token", "recurrence"), (U * C, RECURRENCES), C, "int32", {}),
        "state": ArraySpec(
            of_token if whole else ("token_state", *of_token[1:]),
            (U * K, *shape[1:]),
            K,
            "uint16",
            dict(BITS),
            codec,
            shard_rows if whole else None,
        ),
        "state_all": ArraySpec(of_token, shape, C, "uint16", dict(BITS), "none", shard_rows),
        "state_wide": ArraySpec(of_token, shape, C, "float32", {}, "none", shard_rows),
        "state_half": ArraySpec(of_token, shape, C, "float16", {}, "none"),
        "state_packed": ArraySpec(of_token, shape, C, "uint16", dict(BITS), "lossless", shard_rows),
    }
    create_store(path, plan=plan, coordinates=coordinates, arrays=arrays)
    return Store.open(path)


def tokens_of(unit: int, unit_tokens: int) -> int:
    """Returns a unit's tokens: unit 0 is full, then less and less: whole chunks, then whole shards are
    missing.
    """
    return [unit_tokens, max(1, unit_tokens - 7), max(1, unit_tokens // 3), 1][unit % 4]


def unit_values(store: Store, unit: int) -> dict[str, np.ndarray]:
    """Values that differ from their neighbours on every axis."""
    values = {}
    for name, array in store.arrays.items():
        num_rows, rest = store.unit_rows(name), array["shape"][1:]
        num = tokens_of(unit, store.plan.unit_tokens)
        rows = (
            num if num_rows == store.plan.unit_tokens else -(-num // -(-store.plan.unit_tokens // num_rows))
        )
        count = (unit * num_rows + np.arange(rows)).reshape(-1, *(1 for _ in rest)) * 257
        count = count + np.arange(np.prod(rest)).reshape(rest)
        # below 0x7F80: as bits of bfloat16 no NaN, so that all can be told apart as floats too
        values[name] = (count % 0x7F80 if array["data_type"] == "uint16" else count % 30011).astype(
            array["data_type"]
        )
        if name == "state":  # which row and depth it is
            row = unit * num_rows + np.arange(rows)
            values[name][:, :, 0], values[name][:, :, 1] = row[:, None] % 1000, row[:, None] // 1000
            values[name][:, :, 2] = np.arange(len(STATE_DEPTHS))
    return values


def commit_unit(store: Store, unit: int) -> None:
    with begin_attempt(store, unit) as attempt:
        for name, values in unit_values(store, unit).items():
            attempt.write(name, values)
        attempt.commit({"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}})


def whole_arrays(store: Store, units: Iterable[int]) -> dict[str, np.ndarray]:
    """What is stored when these units are, by numpy alone."""
    whole = {}
    for name, array in store.arrays.items():
        fill = {"u": BFLOAT16_NAN, "i": -1, "f": np.nan}[np.dtype(array["data_type"]).kind]
        whole[name] = np.full(array["shape"], fill, array["data_type"])
        for unit in units:
            values, start = unit_values(store, unit)[name], unit * store.unit_rows(name)
            whole[name][start : start + len(values)] = values
    return whole


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_plain_stores(directory: Path) -> list[tuple[Path, Path]]:
    """Stores that lack a unit, or are finished, each with its EXPECTED.npz for plain_readers.py."""
    written = []
    for unit_tokens, shard_rows in [(7, None), (700, 350), (2048, 1024)]:
        for units in ([0, 2, 3], [0, 1, 2, 3]):
            path = directory / f"{unit_tokens}-{len(units)}.zarr"
            store = make_states(path, unit_tokens, shard_rows)
            for unit in units:
                commit_unit(store, unit)
            is_done = np.isin(np.arange(4), units)
            if is_done.all():
                store.finish()
            expected = whole_arrays(store, units)
            expected["token_id"] = np.arange(4 * unit_tokens, dtype=np.int32)
            expected["state_depth"] = np.array(STATE_DEPTHS, np.int32)
            expected["unit_done"] = np.full(4, is_done.all(), np.uint8)  # written when all are there
            np.savez(path.with_suffix(".npz"), is_done=is_done, **expected)
            written.append((path, path.with_suffix(".npz")))
    return written


if __name__ == "__main__":
    write_plain_stores(Path(sys.argv[1]))
