"""The scales of the loop and its accelerations against direct float64 definitions and known motions."""

import numpy as np
import pytest

import looptap
from looptap.analysis.answers.two_scale import acceleration, accelerations, two_scale
from looptap.analysis.folds import BAND_Z
from looptap.errors import CannotTellError
from looptap.tests.synthetic import SHAPE, contraction, make_dataset, random_sequences, rotation, write_store

PRELUDE, CORE, RECURRENCES, CODA = SHAPE
POINTS_LD = 5 * np.eye(3, 8)


def band(values: list[float]) -> list[float]:
    error = BAND_Z * np.std(values, ddof=1) / np.sqrt(len(values))
    return [np.mean(values), np.mean(values) - error, np.mean(values) + error, len(values)]


def test_scales_equal_their_definitions_at_every_depth():
    sequences, _ = random_sequences([5, 6, 4], SHAPE)
    rng = np.random.default_rng(0)
    for sequence in sequences:
        sequence["update_norm"] = rng.uniform(0.5, 2, sequence["step_norm"].shape)
    found = two_scale(make_dataset(sequences, SHAPE))
    for depth in range(len(found["depth"])):
        recurrence, layer = divmod(depth - PRELUDE, CORE)
        is_core = 0 <= recurrence < RECURRENCES
        is_end = is_core and layer == CORE - 1
        want = dict.fromkeys(found.data_vars, None)
        for name, defined in (
            ("path", is_end),
            ("step", is_end and recurrence > 0),
            ("ratio", is_end and recurrence > 0),
            ("block_ratio", is_core and recurrence > 0),
            ("step_change", is_core and recurrence > 1),
        ):
            if defined:
                want[name] = band([scale(name, q, depth) for q in sequences])
        for name, values in want.items():
            got = found[name].values[:, depth]
            np.testing.assert_allclose(got, [np.nan] * 3 + [0] if values is None else values, rtol=1e-5)


def scale(name: str, q: dict[str, np.ndarray], depth: int) -> float:
    step, first = q["step_norm"], depth - CORE + 1
    path = [sum(row[first : depth + 1]) for row in q["update_norm"]]
    return {
        "path": lambda: np.mean(path),
        "step": lambda: step[:, depth].mean(),
        "ratio": lambda: np.mean([s / p for s, p in zip(step[:, depth], path, strict=True)]),
        "block_ratio": lambda: np.mean(step[:, depth] / q["update_norm"][:, depth]),
        "step_change": lambda: np.mean(abs(step[:, depth] - step[:, depth - CORE])),
    }[name]()


def test_accelerations_equal_their_definition():
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    found = acceleration(make_dataset(sequences, SHAPE, states=states))
    for depth in range(len(found["depth"])):
        recurrence = (depth - PRELUDE) // CORE
        if not 2 <= recurrence < RECURRENCES:
            assert np.isnan(found["acceleration"][0, depth])
            continue
        length, relative, turn = [], [], []
        for x in states:  # the last token's is kept
            a, b, c = (x[-1, depth - back * CORE] for back in (2, 1, 0))
            length.append(np.linalg.norm(c - 2 * b + a))
            relative.append(length[-1] / np.linalg.norm(c))
            turn.append((c - b) @ (b - a) / np.linalg.norm(c - b) / np.linalg.norm(b - a))
        np.testing.assert_allclose(found["acceleration"][:, depth], band(length), rtol=1e-5)
        np.testing.assert_allclose(found["relative_acceleration"][:, depth], band(relative), rtol=1e-5)
        np.testing.assert_allclose(found["step_turn"][:, depth], band(turn), rtol=1e-4, atol=1e-6)
    assert (found.attrs["num_tokens"], found.attrs["non_finite"]) == (3, 0)


# steps of a contraction keep their direction and shrink; those of a rotation turn by its angle
def test_known_motions():
    depth_of_r5 = 5 * 3
    found = acceleration(contraction(0.5, POINTS_LD)).isel(statistic=0, depth=depth_of_r5)
    assert float(found["step_turn"]) == pytest.approx(1, abs=1e-5)
    assert float(found["acceleration"]) == pytest.approx(0.5**3 * 0.5**2, rel=1e-5)  # r^(t-2) (1 - r)^2
    found = acceleration(rotation(6)).isel(statistic=0, depth=depth_of_r5)
    assert float(found["step_turn"]) == pytest.approx(np.cos(2 * np.pi / 6), abs=1e-5)
    assert float(found["acceleration"]) == pytest.approx((2 * np.sin(np.pi / 6)) ** 2, rel=1e-5)


def test_a_step_of_nothing_has_no_direction_and_bad_states_are_counted():
    x = np.ones((4, 3))
    x[1, 2], x[3] = np.nan, 0
    length, relative, turn = accelerations(np.stack([np.zeros((4, 3)), x, x], axis=1))[..., 0]
    np.testing.assert_allclose(length, [3**0.5, np.nan, 3**0.5, 0])
    np.testing.assert_allclose(relative, [1, np.nan, 1, np.nan])
    assert np.isnan(turn).all()
    sequences, states = random_sequences([5, 6], SHAPE)
    states[0][-1, PRELUDE + CORE * 2] = np.inf  # layer 0, recurrence 2: in the triples of 2 and 3
    found = acceleration(make_dataset(sequences, SHAPE, states=states))
    assert found.attrs["non_finite"] == 2
    assert float(found["acceleration"].sel(statistic="sequences")[PRELUDE + CORE * 2]) == 1


def test_a_partly_kept_core_shows_what_it_can(tmp_path):
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    whole = make_dataset(sequences, SHAPE, states=states)
    path = write_store(whole, tmp_path / "all.zarr")
    np.testing.assert_allclose(acceleration(path)["acceleration"], acceleration(whole)["acceleration"])
    last = whole.isel(depth_state=[4, 6, 8])  # layer 1 of the last three recurrences
    found = acceleration(last)["acceleration"].sel(statistic="value")
    assert list(np.flatnonzero(np.isfinite(found))) == [8]
    np.testing.assert_allclose(found[8], acceleration(whole)["acceleration"][0, 8])
    with pytest.raises(CannotTellError, match=r"three successive recurrences.*--states core"):
        acceleration(whole.isel(depth_state=[2, 4, 8]))
    with pytest.raises(CannotTellError, match=r"no states are kept: .*--quantities all,state"):
        acceleration(make_dataset(sequences, SHAPE))
    twice, kept = random_sequences([5], (0, 2, 2, 0))
    with pytest.raises(CannotTellError, match="at least 3 recurrences"):
        acceleration(make_dataset(twice, (0, 2, 2, 0), states=kept))


# without injection the blocks' updates add up to the step: it can be no longer than the path
def test_a_capture_steps_no_further_than_its_path():
    dataset = looptap.capture(
        "random:(1,3x6,1),norm=pre,width=32,heads=4",
        [list(range(20)), list(range(30))],
        quantities=("residual", "steps"),
        states=("core",),
        unit_tokens=50,
    )
    found, bent = two_scale(dataset), acceleration(dataset)
    ends = [1 + 3 * r + 2 for r in range(1, 6)]
    ratio = found["ratio"].sel(statistic="value").values[ends]
    assert (ratio > 0.05).all() and (ratio <= 1).all()
    change, length = (
        data.sel(statistic="value").values for data in (found["step_change"], bent["acceleration"])
    )
    assert (np.isfinite(change) == np.isfinite(length)).all()
    assert (change[np.isfinite(change)] <= length[np.isfinite(length)] * (1 + 1e-5)).all()
