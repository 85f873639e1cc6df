"""Paths of several tokens in the plane of all states: against the SVD of the whole matrix, in little memory.
And what is measured of kept states, against float64 definitions on the authors' stored residuals.
"""

import json
import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from looptap.analysis.answers import common_plane as module
from looptap.analysis.answers.common_plane import MOST_PATHS, Scatter, trajectories
from looptap.analysis.answers.distinctness import distinctness
from looptap.analysis.answers.trajectory import trajectory
from looptap.analysis.figures import paths
from looptap.analysis.findings import find
from looptap.analysis.registry import ANALYSES
from looptap.analysis.walk import together
from looptap.errors import CannotTellError
from looptap.tests.golden_files import FEEDFORWARD, NAMES
from looptap.tests.synthetic import RNG_SEED, SHAPE, make_dataset, random_sequences, write_store
from looptap.tests.test_golden_measures import RTOL, replayed

LOOPED = [name for name in NAMES if name not in FEEDFORWARD]


def principal(x_PD: np.ndarray, components: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes [component, hidden], shares of variance and mean, from the SVD of all states at once."""
    x_PD = x_PD.astype(np.float64)
    _, scale, axis = np.linalg.svd(x_PD - x_PD.mean(axis=0), full_matrices=False)
    return axis[:components], (scale**2 / (scale**2).sum())[:components], x_PD.mean(axis=0)


def widest_angle(a_KD: np.ndarray, b_KD: np.ndarray) -> float:
    """Between two subspaces with orthonormal rows, radians; by its sine, which is exact near 0."""
    return float(np.arcsin(np.linalg.norm(b_KD - b_KD @ a_KD.T @ a_KD, 2)))


# 1, 7 and 64 vectors at once against a block of 16; one that all fill exactly; nothing
@pytest.mark.parametrize("sizes", [[1] * 40, [7] * 9, [64, 0, 3], [16, 16], [0]])
def test_scatter_is_that_of_all_at_once(sizes, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 16 * 5 * 8)
    # the mean is up to 1e7 times the spread: a sum of squares less the square of a sum would keep two digits
    x = np.random.default_rng(RNG_SEED).normal(size=(sum(sizes), 5)) * [3, 1, 1, 0.5, 0.1] + 1e6
    scatter = Scatter(5)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        scatter.add(part)
    scatter.merge()
    assert scatter.count == len(x)
    if len(x) > 1:
        centred = x - x.mean(axis=0)
        np.testing.assert_allclose(scatter.mean_D, x.mean(axis=0), rtol=1e-12)
        scale = np.sqrt(np.outer(*[(centred**2).sum(axis=0)] * 2))
        assert (np.abs(scatter.scatter_DD - centred.T @ centred) / scale).max() < 1e-8


def every_token(lengths, shape):
    """A Dataset that keeps every token's states, whose variances differ, and the states."""
    sequences, states = random_sequences(lengths, shape)
    states = [(x * np.geomspace(3, 0.3, x.shape[-1]) + 7).astype(np.float32) for x in states]
    dataset = make_dataset(sequences, shape)
    state = np.full((dataset.sizes["token"], *states[0].shape[1:]), np.nan, np.float32)
    for start, x in zip(dataset["sequence_start"].values, states, strict=False):
        state[start : start + len(x)] = x
    dataset["state"] = (("token", "depth_state", "hidden"), state)
    depth = np.arange(state.shape[1], dtype=np.int32)
    return dataset.assign_coords(state_depth=("depth_state", depth)), states


@pytest.mark.parametrize("block", [1, 3 * 8 * 8, module._BLOCK_BYTES])  # one state, three, all
def test_the_plane_is_that_of_all_states(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    prelude, core, recurrences, _ = SHAPE
    dataset, states = every_token([5, 6, 4, 9], SHAPE)
    found, inside = trajectories(dataset), slice(prelude, prelude + core * recurrences)
    axis_KD, share_K, mean_D = principal(np.concatenate([x[:, inside].reshape(-1, 8) for x in states]))
    assert found.attrs["num_states"] == 24 * core * recurrences and found.attrs["non_finite"] == 0
    for k in (1, 2, 3):
        assert widest_angle(found["axis"].values[:k], axis_KD[:k]) < 1e-8
    np.testing.assert_allclose(found["explained"], share_K, rtol=1e-8)
    np.testing.assert_allclose(found["mean"], mean_D, rtol=1e-12)
    assert found["sequence_id"].values.tolist() == [100, 101, 102, 103]
    assert found["token_position"].values.tolist() == [4, 5, 3, 8]
    assert found["recurrence"].values.tolist() == [r for r in range(recurrences) for _ in range(core)]
    assert found["layer"].values.tolist() == list(range(core)) * recurrences
    sign_K = np.sign((found["axis"].values * axis_KD).sum(axis=1))
    for x, position_PK in zip(states, found["position"].values, strict=True):
        wanted = (x[-1, inside].astype(np.float64) - mean_D) @ axis_KD.T * sign_K
        np.testing.assert_allclose(position_PK, wanted, rtol=1e-8, atol=1e-8)
    assert (found["position"].values[0, -1] > 0).all()


def test_a_store_on_disk_and_chosen_sequences(tmp_path):
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    dataset = make_dataset(sequences, SHAPE, states=states)
    every, some = trajectories(dataset), trajectories(dataset, [102, 100], components=2)
    assert some.sizes == {"path": 2, "point": 8, "component": 2, "hidden": 8}
    np.testing.assert_allclose(
        np.abs(some["position"]), np.abs(every["position"].values[[2, 0], :, :2]), rtol=1e-9
    )
    on_disk = trajectories(write_store(dataset, tmp_path / "all.zarr"))
    np.testing.assert_allclose(on_disk["position"], every["position"], rtol=1e-9)
    part = trajectories(write_store(dataset, tmp_path / "part.zarr", units=[1]))
    assert part["sequence_id"].values.tolist() == [102] and part.attrs["num_states"] == 8
    only = trajectories(make_dataset(sequences[2:], SHAPE, states=states[2:]))
    np.testing.assert_allclose(np.abs(part["position"]), np.abs(only["position"]), rtol=1e-9)


def test_more_paths_than_are_shown_still_make_the_plane():
    sequences, states = random_sequences([3] * (MOST_PATHS + 3), SHAPE)
    found = trajectories(make_dataset(sequences, SHAPE, states=states))
    assert found.sizes["path"] == MOST_PATHS and found.attrs["num_states"] == 8 * (MOST_PATHS + 3)


def test_states_that_are_not_finite_are_left_out_and_counted():
    dataset, states = every_token([5, 6], SHAPE)
    start = int(dataset["sequence_start"].values[1])
    dataset["state"].values[start + 5, 3, 2] = np.inf  # of the second path: recurrence 1, layer 0
    dataset["state"].values[start, 1:3] = np.nan  # of no path
    found = trajectories(dataset)
    whole = np.concatenate([x[:, 1:9].reshape(-1, 8) for x in states]).reshape(11, 8, 8)
    keep = np.ones((11, 8), bool)
    keep[10, 2] = keep[5, 0] = keep[5, 1] = False
    axis_KD, *_ = principal(whole[keep])
    assert (found.attrs["num_states"], found.attrs["non_finite"]) == (85, 3)
    assert widest_angle(found["axis"].values, axis_KD) < 1e-8
    is_bad_SP = np.isnan(found["position"].values).all(axis=2)
    assert np.argwhere(is_bad_SP).tolist() == [[1, 2]]
    assert np.isfinite(found["position"].values[~is_bad_SP]).all()
    figure = paths.trajectories(find([dataset]))
    assert figure is not None and [len(table) for table in figure.tables.values()] == [15]


def test_what_cannot_be_told_says_what_to_capture():
    sequences, states = random_sequences([5, 6], SHAPE)
    plain, whole = (4, 0, 0, 0), make_dataset(sequences, SHAPE, states=states)
    for dataset, wanted in (
        (make_dataset(sequences, SHAPE), "no states are kept: .* --quantities all,state --states core"),
        (whole.isel(depth_state=[0, 3]), r"1 core depths.*--states core"),
        (make_dataset(random_sequences([5], plain)[0], plain), "the model has no loop"),
        (make_dataset(sequences, SHAPE, states=[x * np.nan for x in states]), "they span no plane"),
    ):
        with pytest.raises(CannotTellError, match=wanted):
            trajectories(dataset)
    with pytest.raises(CannotTellError, match="no state of sequence 7 is kept; kept are 100, 101"):
        trajectories(whole, [100, 7])


def test_states_are_read_once_for_all_analyses():
    asking = [group for group in together(list(ANALYSES.values())) if "state" in group[1]]
    assert len(asking) == 1
    assert {"trajectories", "acceleration"} <= {each.name for each in asking[0][0]}


# 24 units against 3: eight times the store in the same memory
@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path):
    sequences, states = random_sequences([40, 40], (0, 3, 40, 0))
    peaks = []
    for repeats in (3, 24):
        dataset = make_dataset(sequences * repeats, (0, 3, 40, 0), states=states * repeats)
        path = write_store(dataset, tmp_path / f"{repeats}.zarr")
        trajectories(path)  # lazy imports and caches do not count
        tracemalloc.start()
        trajectories(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("name", LOOPED)
def test_kept_states_of_the_authors_residuals(name):
    """One token's plane, the plane of all, and how far layers lie apart, by their definitions."""
    _, x_S2TLD, *_, (prelude, core, recurrences, coda) = replayed(name)
    x_STLD = x_S2TLD[:, 1]
    sequences = [{"residual_norm": np.linalg.norm(x_TLD, axis=-1)} for x_TLD in x_STLD]
    dataset = make_dataset(sequences, (prelude, core, recurrences, coda), states=list(x_STLD))
    last_SPD = x_STLD[:, -1, prelude : prelude + core * recurrences]
    for s, x_PD in enumerate(last_SPD):
        found = trajectory(dataset, 100 + s)
        u, scale, _ = np.linalg.svd(x_PD - x_PD.mean(axis=0), full_matrices=False)
        wanted = (u * scale)[:, :3]
        scatter = np.abs(found["position"].values) - np.abs(wanted)
        assert np.abs(scatter).max() < RTOL * scale[0]
        np.testing.assert_allclose(found["explained"], (scale**2 / (scale**2).sum())[:3], rtol=RTOL)
    found = trajectories(dataset)
    axis_KD, share_K, mean_D = principal(last_SPD.reshape(-1, last_SPD.shape[-1]))
    assert widest_angle(found["axis"].values, axis_KD) < RTOL
    np.testing.assert_allclose(found["explained"], share_K, rtol=RTOL)
    far = np.linalg.norm(last_SPD - mean_D, axis=-1).max()
    for s, x_PD in enumerate(last_SPD):
        wanted = np.abs((x_PD - mean_D) @ axis_KD.T)
        assert np.abs(np.abs(found["position"].values[s]) - wanted).max() < RTOL * far
    if core < 2:
        return
    found, end_SLD = distinctness(dataset), last_SPD[:, -core:]
    apart_SLD = end_SLD - end_SLD.mean(1, keepdims=True)
    size = (np.sqrt((apart_SLD**2).sum(-1).mean(1)) / np.sqrt((end_SLD**2).sum(-1)).mean(1)).mean()
    assert float(found["cycle_size"].sel(statistic="value")) == pytest.approx(size, rel=RTOL)
    for a, b in combinations(range(core), 2):
        x, y = end_SLD[:, a], end_SLD[:, b]
        long, other = np.sqrt((x**2).sum(1)), np.sqrt((y**2).sum(1))
        cosine = ((x * y).sum(1) / long / other).mean()
        apart = (np.sqrt(((x - y) ** 2).sum(1)) / ((long + other) / 2)).mean()
        assert float(found["cosine"][a, b]) == pytest.approx(cosine, rel=RTOL)
        assert float(found["relative_distance"][a, b]) == pytest.approx(apart, rel=RTOL)


def test_the_figure_draws_every_path_as_found():
    dataset, _ = every_token([5, 6, 4], SHAPE)
    findings = find([dataset])
    figure = paths.trajectories(findings)
    assert figure is not None and not figure.notes
    (table,), found = figure.tables.values(), trajectories(dataset)
    for path, sequence in enumerate((100, 101, 102)):
        rows = table[table["sequence"] == sequence].sort_values("depth")
        np.testing.assert_array_equal(rows[["first", "second"]], found["position"].values[path, :, :2])
        np.testing.assert_array_equal(rows["layer"], found["layer"])
    assert "3 sequences in the plane of 120 states" in figure.subtitle
    # the claim of the caption, from the positions
    end = found["position"].values[:, -2:, :2]
    centre = end.mean(axis=0)
    within = np.sqrt(((end - centre) ** 2).sum(-1).mean())
    apart = np.sqrt(((centre - centre.mean(axis=0)) ** 2).sum(-1).mean())
    assert f"lie {within / apart:.3g} times as far" in figure.caption[1]
    chart = figure.chart().to_dict()  # checked against the Vega-Lite schema
    assert '"url"' not in json.dumps(chart)
    line = next(layer for layer in chart["concat"][0]["layer"] if layer["mark"]["type"] == "line")
    assert line["encoding"]["detail"]["field"] == "sequence"  # or all paths were joined into one


# 8 paths of 128 recurrences of 12 layers: more than a screen can show
def test_a_long_loop_is_thinned_lap_by_lap():
    shape, rng = (0, 12, 128, 0), np.random.default_rng(RNG_SEED)
    states = [rng.normal(size=(1, 12 * 128, 8)) for _ in range(8)]
    sequences = [{"residual_norm": np.linalg.norm(x, axis=-1)} for x in states]
    figure = paths.trajectories(find([make_dataset(sequences, shape, states=states)]))
    assert figure is not None
    (table,) = figure.tables.values()
    laps = np.unique(table["recurrence"])
    assert len(table) == len(laps) * 12 * 8 <= paths.MOST_POINTS  # whole laps of every path
    assert laps[0] == 0 and laps[-1] == 127 and len(laps) >= 10
    assert (np.diff(np.diff(laps)) >= -1).all()
    assert f"{len(laps)} of 128 recurrences are drawn" in figure.notes[0]


def test_what_cannot_be_drawn_says_why():
    sequences, states = random_sequences([5], SHAPE)
    both = find(
        [make_dataset(sequences, SHAPE, states=states), make_dataset(sequences, SHAPE, name="random:b")]
    )
    figure = paths.trajectories(both)
    assert figure is not None and "no states are kept" in figure.absent[both[1].label]
    assert paths.trajectories(both[1:]) is None
