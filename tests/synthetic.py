"""Datasets and stores with known contents, laid out as a capture writes them."""

from pathlib import Path

import numpy as np
import xarray as xr

from looptap.capture.store.layout import ArraySpec, create_store
from looptap.capture.store.plan import StoredData, StoredModel, StoredPlan, StoredSettings, plan_of
from looptap.capture.store.quantities import QUANTITIES
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store

RNG_SEED = 7
SHAPE = (1, 2, 4, 1)  # every stage; more recurrences than layers, so that the two cannot be mixed up
RESIDUAL = ("residual_norm", "residual_peak", "update_norm")
ATTENTION = tuple(name for name, quantity in QUANTITIES.items() if quantity.group == "attention")


def make_dataset(
    sequences: list[dict[str, np.ndarray]],
    shape: tuple[int, int, int, int],
    unit_sequences: int = 2,
    empty_slots: int = 3,
    empty_units: int = 0,
    states: list[np.ndarray] | None = None,
    name: str = "random:test",
) -> xr.Dataset:
    """A Dataset laid out like a store.

    Args:
        sequences: quantity -> [token, depth, ...] of each sequence, packed in order; one row where a quantity
            is a whole sequence's.
        shape: prelude, core, recurrences, coda.
        empty_slots: slots at the end of every unit that belong to no sequence; they hold NaN.
        empty_units: units at the end that were never captured.
        states: [token, depth, hidden] of each sequence; the last token's is kept.
    """
    prelude, core, recurrences, coda = shape
    units = [sequences[i : i + unit_sequences] for i in range(0, len(sequences), unit_sequences)]
    lengths = [[len(next(iter(s.values()))) for s in unit] for unit in units]
    U, C, Q = len(units) + empty_units, max(map(sum, lengths), default=1) + empty_slots, unit_sequences
    stage, layer, recurrence = depth_coordinates(shape)
    coordinates = {
        "token_id": np.full(U * C, -1, np.int32),
        "token_position": np.full(U * C, -1, np.int32),
        "token_sequence": np.full(U * C, -1, np.int32),
        "sequence_start": np.full(U * Q, -1, np.int64),
        "sequence_length": np.zeros(U * Q, np.int32),
        "sequence_id": np.full(U * Q, -1, np.int64),
    }
    of_sequence = {key for key in sequences[0] if QUANTITIES[key].axes[0] == "sequence"}
    arrays = {
        key: np.full(
            (U * (Q if key in of_sequence else C), *values.shape[1:]),
            *(-1, np.int32) if values.dtype.kind == "i" else (np.nan, np.float32),
        )
        for key, values in sequences[0].items()
    }
    kept, kept_slot = [], np.full(U * Q, -1, np.int64)
    for unit, members in enumerate(units):
        slot = unit * C
        for place, sequence in enumerate(members):
            length, index = lengths[unit][place], unit * Q + place
            span = slice(slot, slot + length)
            coordinates["token_id"][span] = np.arange(length)
            coordinates["token_position"][span] = np.arange(length)
            coordinates["token_sequence"][span] = index
            coordinates["sequence_start"][index] = slot
            coordinates["sequence_length"][index] = length
            coordinates["sequence_id"][index] = 100 + unit * unit_sequences + place
            for key, values in sequence.items():
                arrays[key][slice(index, index + 1) if key in of_sequence else span] = values
            kept_slot[index] = slot + length - 1
            kept.append(index)
            slot += length
    variables = {key: (QUANTITIES[key].axes, values) for key, values in arrays.items()}
    coords = {
        "depth": ("depth", np.arange(len(stage), dtype=np.int32)),
        "stage": ("depth", stage),
        "layer": ("depth", layer),
        "recurrence": ("depth", recurrence),
        **{key: (key.split("_")[0], values) for key, values in coordinates.items()},
        "unit_done": ("unit", np.array([1] * len(units) + [0] * empty_units, np.uint8)),
    }
    if states is not None:
        state = np.full((U * Q, *states[0].shape[1:]), np.nan, np.float32)
        state[kept] = [x[-1] for x in states]
        variables["state"] = (("token_state", "depth_state", "hidden"), state)
        coords["state_depth"] = ("depth_state", np.arange(len(stage), dtype=np.int32))
        coords["state_token"] = ("token_state", kept_slot)
    loop = f"({prelude},{core}x{recurrences},{coda})" if core else f"({prelude},0,0)"
    plan = StoredPlan(
        model=StoredModel(
            name=name, notation=loop, prelude=prelude, core=core, recurrences=recurrences, coda=coda,
            norm="pre", width=8, num_parameters=1234, exit_gate="exit_probability" in arrays,
        ),
        data=StoredData(name="test.jsonl", field="text"),
        settings=StoredSettings(dtype="float32", device="cpu", quantities=tuple(arrays)),
        num_units=U, unit_tokens=C, unit_sequences=Q, num_state_rows=Q,
        num_sequences=len(sequences), num_tokens=sum(map(sum, lengths)), dtype="float32", backend="pytorch",
    ).to_json()  # fmt: skip
    attributes = {"looptap_format": 2, "plan": plan, "units_done": len(units), "units_total": U}
    return xr.Dataset(variables, coords, attributes)


def depth_coordinates(shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prelude, core, recurrences, coda = shape
    places = [(0, i, -1) for i in range(prelude)]
    places += [(1, i, r) for r in range(recurrences) for i in range(core)]
    places += [(2, i, -1) for i in range(coda)]
    stage, layer, recurrence = zip(*places, strict=True)
    return np.array(stage, np.int8), np.array(layer, np.int16), np.array(recurrence, np.int16)


def quantities_of_states(x_TLD: np.ndarray, shape: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """Every residual quantity of states [token, depth, hidden], by DESIGN.md's definitions."""
    prelude, core, recurrences, _ = shape
    T, L, _ = x_TLD.shape
    norm = np.linalg.norm(x_TLD, axis=-1)
    result = {"residual_norm": norm, "residual_peak": np.abs(x_TLD).max(axis=-1), "update_norm": norm * 0.1}
    for name in ("step_norm", "step_cosine", "gap_norm", "gap_cosine"):
        result[name] = np.full((T, L), np.nan)
    for r in range(recurrences):
        for i in range(core):
            depth = prelude + r * core + i
            for kind, other in (("gap", prelude + (recurrences - 1) * core + i), ("step", depth - core)):
                if kind == "step" and r == 0:
                    continue
                a, b = x_TLD[:, depth], x_TLD[:, other]
                result[f"{kind}_norm"][:, depth] = np.linalg.norm(a - b, axis=-1)
                result[f"{kind}_cosine"][:, depth] = (a * b).sum(-1) / norm[:, depth] / norm[:, other]
    return result


def quantities_of_attention(a_LHTT: np.ndarray) -> dict[str, np.ndarray]:
    """Every attention quantity of weights [depth, head, query, key], each [token, depth, head]."""
    log = np.log(np.where(a_LHTT > 0, a_LHTT, 1))
    return {
        "attention_entropy": -(a_LHTT * log).sum(-1).transpose(2, 0, 1),
        "attention_peak": a_LHTT.max(-1).transpose(2, 0, 1),
        "attention_sink": a_LHTT[..., 0].transpose(2, 0, 1),
        "attention_received": a_LHTT.sum(-2).transpose(2, 0, 1),
    }


def quantities_of_sequence(
    x_TLD: np.ndarray, a_LHTT: np.ndarray, shape: tuple[int, int, int, int]
) -> dict[str, np.ndarray]:
    """What a whole sequence has one value of at every depth, each [1, depth, ...]."""
    prelude, core, recurrences, _ = shape
    step_LH, gap_LH = np.full((2, *a_LHTT.shape[:2]), np.nan)
    for depth in range(prelude, prelude + core * recurrences):
        last = prelude + core * (recurrences - 1) + (depth - prelude) % core
        gap_LH[depth] = np.sqrt(np.square(a_LHTT[depth] - a_LHTT[last]).sum((1, 2)))
        if depth >= prelude + core:
            step_LH[depth] = np.sqrt(np.square(a_LHTT[depth] - a_LHTT[depth - core]).sum((1, 2)))
    share_LM = np.square(np.linalg.svd(x_TLD.swapaxes(0, 1), compute_uv=False))
    share_LM /= share_LM.sum(1, keepdims=True)
    entropy_L = -(share_LM * np.log(np.where(share_LM > 0, share_LM, 1))).sum(1)
    found = {"attention_step": step_LH, "attention_gap": gap_LH, "residual_entropy": entropy_L}
    return {name: values[None] for name, values in found.items()}


def quantities_of_loop(
    rng: np.random.Generator, num_tokens: int, num_recurrences: int
) -> dict[str, np.ndarray]:
    """Every quantity by recurrence, each [token, recurrence], of random readings among four tokens."""
    p_TRV = rng.dirichlet(np.ones(4), (num_tokens, num_recurrences))
    gate_TR = rng.uniform(size=(num_tokens, num_recurrences))
    left_TR = np.cumprod(1 - np.pad(gate_TR, ((0, 0), (1, 0)))[:, :-1], axis=1)
    gate_TR[:, -1] = 1
    return {
        "lens_kl": (p_TRV * np.log(p_TRV / p_TRV[:, -1:])).sum(-1),
        "lens_entropy": -(p_TRV * np.log(p_TRV)).sum(-1),
        "lens_token": p_TRV.argmax(-1),
        "exit_probability": gate_TR * left_TR,
    }


def random_sequences(lengths: list[int], shape: tuple[int, int, int, int], heads: int = 3):
    """Quantities and states of sequences with random states, causal attention and readings of the loop."""
    rng = np.random.default_rng(RNG_SEED)
    num_depths = shape[0] + shape[1] * shape[2] + shape[3]
    sequences, states = [], []
    for T in lengths:
        x = rng.normal(size=(T, num_depths, 8)) * rng.uniform(0.5, 2)
        scores = rng.normal(size=(num_depths, heads, T, T)) * 3
        scores[:, 0, :, 0] += 6  # one head with a sink
        weights = np.exp(np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        sequence = quantities_of_states(x, shape)
        sequence |= quantities_of_attention(weights) | quantities_of_sequence(x, weights, shape)
        sequences.append(sequence | (quantities_of_loop(rng, T, shape[2]) if shape[1] else {}))
        states.append(x)
    return sequences, states


def contraction(
    rate: float, points_LD: np.ndarray, recurrences: int = 16, lengths: tuple[int, ...] = (5, 1, 9), **more
) -> xr.Dataset:
    """x[l, t] = point_l + rate**t * offset, offset of length 1: converges at a known rate."""
    rng = np.random.default_rng(RNG_SEED)
    shape, (L, D) = (0, len(points_LD), recurrences, 0), points_LD.shape
    states = []
    for T in lengths:
        offset = rng.normal(size=(T, 1, 1, D))
        offset /= np.linalg.norm(offset, axis=-1, keepdims=True)
        x = points_LD + rate ** np.arange(recurrences)[:, None, None] * offset
        states.append(x.reshape(T, recurrences * L, D))
    return make_dataset([quantities_of_states(x, shape) for x in states], shape, states=states, **more)


def rotation(
    period: float, recurrences: int = 48, layers: int = 3, radius: float = 1.0, noise: float = 0.0, **more
) -> xr.Dataset:
    """x[l, t] circles, once in `period` recurrences, round a point at distance 1 of the origin."""
    angle_R = 2 * np.pi * np.arange(recurrences) / period
    return _of_core(lambda start_TL: radius * _turned(start_TL, angle_R), recurrences, layers, noise, **more)


def drift(
    recurrences: int = 48, layers: int = 3, reach: float = 1.0, noise: float = 0.0, **more
) -> xr.Dataset:
    """x[l, t] moves on a straight line, by `reach` times its first norm over all recurrences."""
    way_R = reach * np.arange(recurrences) / (recurrences - 1)

    def path(start_TL: np.ndarray) -> np.ndarray:
        first = _turned(start_TL, np.zeros(1))[:, 0]
        return np.moveaxis(way_R[:, None, None, None] * first, 0, 1)

    return _of_core(path, recurrences, layers, noise, **more)


def _turned(start_TL: np.ndarray, angle_R: np.ndarray) -> np.ndarray:
    """Points of the unit circle in the first two of eight dimensions, [token, recurrence, layer, hidden]."""
    angle_TRL = start_TL[:, None] + angle_R[:, None]
    return np.stack([np.cos(angle_TRL), np.sin(angle_TRL), *[np.zeros_like(angle_TRL)] * 6], axis=-1)


def _of_core(path, recurrences: int, layers: int, noise: float, lengths=(5, 1, 9), **more) -> xr.Dataset:
    """A core's states: a point for each layer, at right angles to the path, the path, and noise."""
    rng = np.random.default_rng(RNG_SEED)
    shape, states = (0, layers, recurrences, 0), []
    for T in lengths:
        x_TRLD = np.eye(6, 8, 2)[:layers] + path(rng.uniform(0, 2 * np.pi, (T, layers)))
        x_TRLD = x_TRLD + noise * rng.normal(size=x_TRLD.shape)
        states.append(x_TRLD.reshape(T, recurrences * layers, 8))
    return make_dataset([quantities_of_states(x, shape) for x in states], shape, states=states, **more)


def one_after_another(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Two Datasets of the same tokens as one, in which the second's loop runs after the first's.

    The loops' stages are core and core2.
    """
    variables = {}
    for name, values in first.data_vars.items():
        axis = values.dims.index("depth_state" if name == "state" else "depth")
        variables[name] = (values.dims, np.concatenate([values.values, second[name].values], axis))
    depths = [first.sizes["depth"], second.sizes["depth"]]
    coords = {
        name: c.variable for name, c in first.coords.items() if not {"depth", "depth_state"} & {*c.dims}
    }
    for name in ("layer", "recurrence"):
        coords[name] = ("depth", np.concatenate([first[name].values, second[name].values]))
    coords["stage"] = ("depth", np.repeat([0, 1], depths), {"flag_meanings": "core core2"})
    coords["depth"] = ("depth", np.arange(sum(depths)))
    if "state" in first:
        coords["state_depth"] = ("depth_state", np.arange(sum(depths)))
    return xr.Dataset(variables, coords, first.attrs)


def write_store(dataset: xr.Dataset, path: Path, units: list[int] | None = None) -> Path:
    """The Dataset as a store on disk, with only `units` done (all by default)."""
    plan, U = plan_of(dataset), dataset.sizes["unit"]
    rows = {axis: plan.unit_rows(axis) for axis in ("token", "token_state", "sequence")}
    create_store(
        path,
        plan=plan,
        coordinates={
            str(name): (tuple(map(str, c.dims)), c.values, dict(c.attrs))
            for name, c in dataset.coords.items()
            if name != "unit_done"
        },
        arrays={
            str(name): ArraySpec(
                dimensions=tuple(map(str, v.dims)), shape=v.shape, unit_rows=rows[str(v.dims[0])],
                dtype=str(v.dtype), attributes={}, codec="none" if name == "state" else "zstd",
            )
            for name, v in dataset.data_vars.items()
        },
    )  # fmt: skip
    store = Store.open(path)
    for unit in range(U) if units is None else units:
        attempt = begin_attempt(store, unit)
        for name, values in dataset.data_vars.items():
            n = rows[str(values.dims[0])]
            attempt.write(str(name), values.values[unit * n : (unit + 1) * n])
        attempt.commit(
            {"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}, "versions": {}}
        )
    return path
