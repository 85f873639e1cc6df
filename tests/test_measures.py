"""Measures against direct float64 definitions, and verdicts on dynamics whose answers are known."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from looptap.analysis.answers.distinctness import distinctness
from looptap.analysis.answers.trajectory import trajectory
from looptap.analysis.depth_tables import depth_table, long_table
from looptap.analysis.findings import find, make_labels
from looptap.analysis.folds import BAND_Z, MeanFold, MedianFold
from looptap.analysis.measures import MEASURES, measure
from looptap.analysis.thresholds import CONVERGED_STEP
from looptap.analysis.verdicts import first_below, verdicts
from looptap.capture.store.plan import plan_of
from looptap.capture.store.quantities import GROUPS, QUANTITIES
from looptap.errors import CannotTellError, NothingCapturedError
from looptap.tests.synthetic import (
    ATTENTION,
    RESIDUAL,
    RNG_SEED,
    SHAPE,
    contraction,
    make_dataset,
    quantities_of_attention,
    quantities_of_states,
    random_sequences,
    write_store,
)


def oracle(name: str, q: dict[str, np.ndarray]) -> np.ndarray:
    """Value of a measure for one sequence, [depth], written out from its definition."""
    prelude, core, recurrences, _ = SHAPE
    T, L = q["residual_norm"].shape
    out = np.full(L, np.nan)
    for depth in range(L):
        if name in ("residual_norm", "residual_peak", "update_norm", "step_norm", "step_cosine", "gap_norm",
                    "gap_cosine", "attention_step", "attention_gap", "residual_entropy"):  # fmt: skip
            out[depth] = q[name][:, depth].mean()
        elif name == "residual_peak_max":
            out[depth] = q["residual_peak"][:, depth].max()
        elif name == "relative_step":
            out[depth] = np.mean([q["step_norm"][t, depth] / q["residual_norm"][t, depth] for t in range(T)])
        elif name == "relative_gap" and prelude <= depth < prelude + core * recurrences:
            last = prelude + (recurrences - 1) * core + (depth - prelude) % core
            out[depth] = np.mean([q["gap_norm"][t, depth] / q["residual_norm"][t, last] for t in range(T)])
        elif name in ("mixing_score", "attention_peak", "sink_score"):
            source = {"mixing_score": "attention_entropy", "sink_score": "attention_sink"}.get(name, name)
            out[depth] = q[source][:, depth].mean()
        elif name == "sink_rate":
            out[depth] = np.mean([score >= 0.3 for score in q["attention_sink"][:, depth].mean(axis=0)])
        elif name == "colsum_concentration":
            share = q["attention_received"][:, depth] / T
            out[depth] = np.mean(
                [1 + sum(c * np.log(c) for c in head if c > 0) / np.log(T) for head in share.T]
            )
        elif name in ("lens_kl", "lens_entropy", "exit_probability", "lens_settled"):
            recurrence, layer = divmod(depth - prelude, core)
            if 0 <= recurrence < recurrences and layer == core - 1:
                tokens = q["lens_token"]
                is_settled = [tokens[t, recurrence] == tokens[t, -1] for t in range(T)]
                out[depth] = np.mean(is_settled if name == "lens_settled" else q[name][:, recurrence])
        elif name in ("entropy_change", "received_change") and depth >= prelude + core and depth < L - 1:
            source = "attention_entropy" if name == "entropy_change" else "attention_received"
            change = np.abs(q[source][:, depth] - q[source][:, depth - core])
            out[depth] = change.mean() if name == "entropy_change" else 0.5 * change.sum(0).mean() / T
    return out


# 2: the shortest with a column-sum concentration; 17 and 30: ragged, over two units
@pytest.mark.parametrize("name", [name for name in MEASURES if not name.endswith("median")])
def test_measure_equals_its_definition(name):
    sequences, _ = random_sequences([17, 2, 30], SHAPE)
    got = measure(make_dataset(sequences, SHAPE), [name])[name]
    values = np.stack([oracle(name, sequence) for sequence in sequences])
    if name == "residual_peak_max":
        np.testing.assert_allclose(got.sel(statistic="value"), values.max(axis=0), rtol=1e-5)
        return
    mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(got.sel(statistic="value"), mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.sel(statistic="low"), mean - BAND_Z * error, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.sel(statistic="high"), mean + BAND_Z * error, rtol=1e-4, atol=1e-6)
    assert (got.sel(statistic="sequences").values == np.where(np.isnan(mean), 0, 3)).all()
    assert np.isfinite(mean).any()


# kept values give the median itself; what is beyond them goes into bins
@pytest.mark.parametrize("most_kept, error", [(2**15, 1e-6), (0, 0.02), (60 * 10, 0.02)])
@pytest.mark.parametrize("name", ["relative_step_median", "relative_gap_median"])
def test_median_over_tokens(monkeypatch, name, most_kept, error):
    monkeypatch.setattr(MedianFold, "MOST_KEPT", most_kept)
    sequences, _ = random_sequences([40, 21, 30], SHAPE)
    got = measure(make_dataset(sequences, SHAPE), [name])[name].sel(statistic="value").values
    kind, (prelude, core, recurrences, _) = name.split("_")[1], SHAPE
    for depth in range(prelude + core, prelude + core * (recurrences - 1)):
        below = depth if kind == "step" else prelude + (recurrences - 1) * core + (depth - prelude) % core
        exact = np.median(
            np.concatenate([q[f"{kind}_norm"][:, depth] / q["residual_norm"][:, below] for q in sequences])
        )
        assert got[depth] == pytest.approx(exact, rel=error)


@pytest.mark.parametrize("most_kept", [0, 2**15])
def test_median_fold_of_zeros_and_of_values_beyond_its_bins(monkeypatch, most_kept):
    monkeypatch.setattr(MedianFold, "MOST_KEPT", most_kept)
    fold = MedianFold(3)
    fold.add(np.array([[0.0, 1e30, np.nan], [0.0, 1e30, np.nan], [1.0, 1e30, np.inf]]))
    median, low, high, count = fold.result()
    assert median[0] == 0 and low[0] == 0 and high[0] == pytest.approx(0.5, abs=0.6)
    assert median[1] >= 1e5 and np.isnan(median[2])  # nothing beyond the top bin is taken for converged
    assert list(count) == [1, 1, 0]


def test_mean_fold_leaves_out_what_is_not_finite():
    values = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.inf], [6.0, np.nan, 5.0]])
    fold = MeanFold(3)
    for row in values:
        fold.add(row)
    mean, low, _, count = fold.result()
    np.testing.assert_allclose(mean, [3, np.nan, 4])
    np.testing.assert_allclose(low[0], 3 - BAND_Z * np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert list(count) == [3, 0, 2]


# 2**4 keys: ln T is exact enough to see 1e-6
def test_uniform_and_one_hot_attention():
    T, shape = 16, (3, 0, 0, 0)
    uniform = np.full((1, 2, T, T), 1 / T)
    causal = np.tril(np.ones((1, 2, T, T))) / np.arange(1, T + 1)[:, None]
    one_hot = np.zeros((1, 2, T, T))
    one_hot[..., 0] = 1
    weights = np.concatenate([uniform, causal, one_hot])
    got = measure(make_dataset([quantities_of_attention(weights)], shape)).sel(statistic="value")
    logs = np.log(np.arange(1, T + 1))
    np.testing.assert_allclose(got["mixing_score"], [np.log(T), logs.mean(), 0], atol=1e-6)
    np.testing.assert_allclose(got["colsum_concentration"][[0, 2]], [0, 1], atol=1e-6)
    assert 0 < got["colsum_concentration"][1] < 1
    harmonic = (1 / np.arange(1, T + 1)).sum()
    np.testing.assert_allclose(got["sink_score"], [1 / T, harmonic / T, 1], atol=1e-6)
    assert list(got["sink_rate"].values) == [0, 0, 1]
    np.testing.assert_allclose(got["attention_peak"][[0, 2]], [1 / T, 1], atol=1e-6)


def test_a_sequence_of_one_token_has_no_concentration():
    one = quantities_of_attention(np.ones((2, 1, 1, 1)))
    got = measure(make_dataset([one], (2, 0, 0, 0)))["colsum_concentration"]
    assert np.isnan(got.sel(statistic="value")).all() and (got.sel(statistic="sequences") == 0).all()


def test_contraction_has_its_rate_and_its_verdicts():
    rate, R = 0.5, 20
    points = 10 * np.eye(3, 8)
    dataset = contraction(rate, points, R)
    measures = measure(dataset)
    core_RL = find([dataset])[0].depths.core_RL
    step_RL = measures["step_norm"].sel(statistic="value").values[core_RL]
    gap_RL = measures["gap_norm"].sel(statistic="value").values[core_RL]
    t = np.arange(R)[:, None]
    np.testing.assert_allclose(
        step_RL[1:14], np.repeat((rate ** (t - 1) * (1 - rate))[1:14], 3, 1), rtol=1e-4
    )
    np.testing.assert_allclose(gap_RL[:10], np.repeat((rate**t - rate ** (R - 1))[:10], 3, 1), rtol=1e-4)
    converged, distinct, *_ = verdicts(measures, distinctness(dataset))
    exact = 1 + int(np.ceil(np.log(CONVERGED_STEP * 10 / (1 - rate)) / np.log(rate)))  # norm is about 10
    assert converged.answer and converged.recurrence in (exact - 1, exact, exact + 1)
    assert converged.value == pytest.approx(rate ** (R - 2) * (1 - rate) / 10, rel=0.05)
    assert distinct.answer and distinct.value == pytest.approx(0, abs=1e-4)


def test_collapse_to_one_point_is_converged_and_not_distinct():
    points = np.ones((3, 8)) * np.array([[1.0], [1.0], [1.0]]) * 5
    dataset = contraction(0.5, points, 24)
    converged, distinct, *_ = verdicts(measure(dataset), distinctness(dataset))
    assert converged.answer and distinct.answer is False
    assert distinct.value == pytest.approx(1, abs=1e-6)


def test_what_does_not_converge_has_no_fixed_points():
    dataset = contraction(1.02, 10 * np.eye(3, 8), 24)
    converged, distinct, settled, *_ = verdicts(measure(dataset), distinctness(dataset))
    assert converged.answer is False and converged.recurrence is None
    assert distinct.answer is None and distinct.value is not None and "without convergence" in distinct.detail
    assert settled.answer is None and "attention_entropy" in settled.detail


@pytest.mark.parametrize(("dtype", "answer"), [("float32", False), ("float16", False), ("bfloat16", None)])
def test_a_step_that_rounding_makes_is_no_evidence_against_convergence(dtype, answer):
    """A last step of 6e-3 is over the threshold; bfloat16 alone may make 4 · 2⁻⁷, float16 only 4e-3."""
    dataset = contraction(0.5, 10 * np.eye(3, 8), 5)
    dataset.attrs["plan"]["settings"]["dtype"] = dtype
    converged, distinct, *_ = verdicts(measure(dataset), distinctness(dataset))
    assert 5e-3 < converged.value < 7e-3
    assert converged.answer is answer and distinct.answer is None
    assert ("rounding" in converged.detail) is (answer is None)


@pytest.mark.parametrize(
    "series, first", [([1, 0.1, 0.01], 1), ([0.1, 1, 0.1], 2), ([np.nan, 0, 0], 1), ([0, 0, 1], None)]
)
def test_first_below_is_where_it_stays_below(series, first):
    assert first_below(np.array(series, float), 0.5) == first


def test_attention_settles_at_the_known_recurrence():
    T, R = 12, 6
    rng = np.random.default_rng(RNG_SEED)
    scores = rng.normal(size=(1, 2, T, T))
    other = rng.normal(size=(1, 2, T, T))
    mix = [0.0, 0.8, 1.0, 1.0, 1.0, 1.0]  # attention moves until recurrence 2
    weights = np.concatenate([np.exp(scores * m + other * (1 - m)) for m in mix])
    weights /= weights.sum(-1, keepdims=True)
    dataset = make_dataset([quantities_of_attention(weights)], (0, 1, R, 0))
    settled = verdicts(measure(dataset), "no states")[2]
    assert settled.answer and settled.recurrence == 3 and settled.value == 0


def test_empty_slots_and_missing_units_do_not_count():
    sequences, _ = random_sequences([4, 7, 5], SHAPE)
    plain = measure(make_dataset(sequences, SHAPE, empty_slots=0))
    padded = measure(make_dataset(sequences, SHAPE, empty_slots=11, empty_units=3))
    xr.testing.assert_allclose(plain.drop_attrs(), padded.drop_attrs())
    assert padded.attrs["num_sequences"] == 3 and padded.attrs["num_tokens"] == 16
    assert int(padded["non_finite"].sum()) == 0


def test_non_finite_values_are_counted_and_left_out():
    sequences, _ = random_sequences([6, 8], SHAPE)
    clean = measure(make_dataset([sequences[0], {k: v.copy() for k, v in sequences[1].items()}], SHAPE))
    sequences[1]["residual_norm"][3, 2] = np.inf
    sequences[1]["attention_entropy"][:, 4, 1] = np.nan
    got = measure(make_dataset(sequences, SHAPE))
    assert int(got["non_finite"].sel(quantity="residual_norm")[2]) == 1
    assert int(got["non_finite"].sel(quantity="attention_entropy")[4]) == 8
    assert int(got["non_finite"].sum()) == 9
    exact = [
        sequences[0]["residual_norm"][:, 2].mean(),
        np.delete(sequences[1]["residual_norm"][:, 2], 3).mean(),
    ]
    np.testing.assert_allclose(got["residual_norm"].sel(statistic="value")[2], np.mean(exact), rtol=1e-6)
    xr.testing.assert_allclose(got["sink_score"], clean["sink_score"])


@pytest.mark.parametrize(
    "gone", [RESIDUAL, ATTENTION, ("step_norm", "step_cosine"), ("gap_norm", "gap_cosine"), GROUPS["lens"]]
)
def test_what_was_not_captured_is_named_with_what_to_capture(gone):
    sequences, _ = random_sequences([6, 8], SHAPE)
    dataset = make_dataset([{k: v for k, v in s.items() if k not in gone} for s in sequences], SHAPE)
    got = measure(dataset)
    for name, each in MEASURES.items():
        lost = [need for need in each.needs if need in gone]
        assert (name in got) == (not lost)
        if lost:
            assert lost[0] in got.attrs["missing"][name] and "--quantities" in got.attrs["missing"][name]
            assert QUANTITIES[lost[0]].group in got.attrs["missing"][name]


def test_a_model_without_an_exit_gate_is_not_asked_for_one():
    sequences, _ = random_sequences([6], SHAPE)
    del sequences[0]["exit_probability"]
    missing = measure(make_dataset(sequences, SHAPE)).attrs["missing"]
    assert missing == {"exit_probability": "the model has no exit gate"}


def test_a_feedforward_model_has_stages_and_no_loop():
    sequences, states = random_sequences([6, 8], (5, 0, 0, 0))
    sequences = [{k: v for k, v in s.items() if k in RESIDUAL + ATTENTION} for s in sequences]
    (found,) = find([make_dataset(sequences, (5, 0, 0, 0), states=states)])
    assert "mixing_score" in found.measures and "relative_step" not in found.measures
    assert found.measures.attrs["missing"]["relative_step"] == "the model has no loop"
    assert [verdict.answer for verdict in found.verdicts] == [None] * 5
    assert all(found.answers[name] == "the model has no loop" for name in ("trajectory", "distinctness"))


def test_one_recurrence_and_one_sequence():
    sequences, states = random_sequences([6], (1, 3, 1, 0))
    (found,) = find([make_dataset(sequences, (1, 3, 1, 0), states=states)])
    assert "loop ran once" in found.measures.attrs["missing"]["relative_step"]
    assert np.isnan(found.measures["mixing_score"].sel(statistic="low")).all()  # one sequence has no spread
    assert isinstance(found.answers["trajectory"], xr.Dataset) and found.verdicts[0].answer is None


def test_nothing_captured_is_an_error():
    dataset = make_dataset([random_sequences([4], SHAPE)[0][0]], SHAPE)
    dataset["sequence_length"][:] = 0
    with pytest.raises(NothingCapturedError, match="nothing is captured yet"):
        measure(dataset)


def test_an_unknown_measure_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'mixing' is not a measure: choose from .*mixing_score"):
        measure(make_dataset(random_sequences([4], SHAPE)[0], SHAPE), ["mixing"])


# a circle in two of eight dimensions: two components hold everything, and distances survive
def test_trajectory_of_a_circle_keeps_its_distances():
    R, L = 3, 12
    angle = 2 * np.pi * np.arange(R * L) / L
    x = np.zeros((1, R * L, 8))
    x[0, :, 2], x[0, :, 5], x[0, :, 7] = np.cos(angle), np.sin(angle), 4
    dataset = make_dataset([quantities_of_states(x, (0, L, R, 0))], (0, L, R, 0), states=[x])
    path = trajectory(dataset, components=2)
    np.testing.assert_allclose(path["explained"].sum(), 1, rtol=1e-6)
    position = path["position"].values
    np.testing.assert_allclose(np.linalg.norm(position, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(position[:L], position[L : 2 * L], atol=1e-5)  # the last lap lies on the first
    assert list(path["layer"].values) == list(range(L)) * R and path.attrs["sequence_id"] == 100


def test_trajectory_of_a_chosen_sequence_and_of_bfloat16_bits():
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    dataset = make_dataset(sequences, SHAPE, states=states)
    path = trajectory(dataset, sequence_id=102)
    x = states[2][-1][1:-1]  # the core's depths of the last token
    x = x - x.mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(path["position"], axis=0), np.linalg.svd(x)[1][:3], rtol=1e-5)
    np.testing.assert_allclose(path["explained"], (np.linalg.svd(x)[1] ** 2)[:3] / (x**2).sum(), rtol=1e-5)
    bits = (dataset["state"].values.view(np.uint32) >> 16).astype(np.uint16)
    coded = dataset.assign(state=(dataset["state"].dims, bits, {"bits_of": "bfloat16"}))
    np.testing.assert_allclose(trajectory(coded, 102)["explained"], path["explained"], rtol=0.05)
    with pytest.raises(CannotTellError, match="no state of sequence 7 is kept; kept are 100, 101, 102"):
        trajectory(dataset, sequence_id=7)


def test_states_of_all_tokens_lie_on_the_token_axis():
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    last = make_dataset(sequences, SHAPE, states=states)
    every = make_dataset(sequences, SHAPE)
    state = np.full((every.sizes["token"], *states[0].shape[1:]), np.nan, np.float32)
    for start, x in zip(every["sequence_start"].values, states, strict=False):
        state[start : start + len(x)] = x
    every["state"] = (("token", "depth_state", "hidden"), state)
    every = every.assign_coords(state_depth=("depth_state", last["state_depth"].values))
    np.testing.assert_allclose(trajectory(every)["position"], trajectory(last)["position"], rtol=1e-5)
    assert distinctness(every).attrs["num_tokens"] == 15


def test_distinctness_equals_its_definition():
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    got = distinctness(make_dataset(sequences, SHAPE, states=states))
    prelude, core, recurrences, _ = SHAPE
    pair = [x[-1, prelude + (recurrences - 1) * core :][:core] for x in states]
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pair]
    distance = [np.linalg.norm(a - b) / np.mean([np.linalg.norm(a), np.linalg.norm(b)]) for a, b in pair]
    assert float(got["cosine"][0, 1]) == pytest.approx(np.mean(cosine), rel=1e-5)
    assert float(got["relative_distance"][1, 0]) == pytest.approx(np.mean(distance), rel=1e-5)
    low = np.mean(cosine) - BAND_Z * np.std(cosine, ddof=1) / np.sqrt(3)
    assert float(got["least_cosine"].sel(statistic="low")) == pytest.approx(low, rel=1e-4)
    spread = [np.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, 1))) for x in pair]
    size = [far / np.linalg.norm(x, axis=1).mean() for far, x in zip(spread, pair, strict=True)]
    assert float(got["cycle_size"].sel(statistic="value")) == pytest.approx(np.mean(size), rel=1e-5)


def test_states_that_were_not_kept_are_asked_for():
    sequences, states = random_sequences([5], SHAPE)
    with pytest.raises(CannotTellError, match="--quantities all,state"):
        trajectory(make_dataset(sequences, SHAPE))
    partly = make_dataset(sequences, SHAPE, states=states).isel(depth_state=[1, 2, 7])
    with pytest.raises(CannotTellError, match=r"1 of 2 core layers.*--states 'core\[all\]@last'"):
        distinctness(partly)


def test_a_store_on_disk_gives_the_same_numbers(tmp_path):
    sequences, states = random_sequences([5, 6, 4, 9], SHAPE)
    dataset = make_dataset(sequences, SHAPE, states=states)
    path = write_store(dataset, tmp_path / "all.zarr")
    xr.testing.assert_allclose(measure(path).drop_attrs(), measure(dataset).drop_attrs())
    np.testing.assert_allclose(trajectory(path)["position"], trajectory(dataset)["position"], rtol=1e-5)
    part = write_store(dataset, tmp_path / "part.zarr", units=[1])
    only = make_dataset(sequences[2:], SHAPE, states=states[2:])
    xr.testing.assert_allclose(measure(part).drop_attrs(), measure(only).drop_attrs())
    assert trajectory(part).attrs["sequence_id"] == 102 and distinctness(part).attrs["num_tokens"] == 2
    with pytest.raises(NothingCapturedError, match="0 of 2 units are done"):
        measure(write_store(dataset, tmp_path / "none.zarr", units=[]))


# 24 units against 6: four times the store in the same memory; 6 have more values than medians keep
@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path):
    sequences, _ = random_sequences([40, 40], (0, 3, 40, 0), heads=4)
    peaks = []
    for repeats in (6, 24):
        path = write_store(make_dataset(sequences * repeats, (0, 3, 40, 0)), tmp_path / f"{repeats}.zarr")
        measure(path)  # lazy imports and caches do not count
        tracemalloc.start()
        measure(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_tables_hold_every_number():
    sequences, _ = random_sequences([5, 6], SHAPE)
    measures = measure(make_dataset(sequences, SHAPE))
    wide, long = depth_table(measures), long_table(measures)
    assert set(long["measure"]) == set(MEASURES) and len(long) == len(MEASURES) * len(wide)
    one = long[long["measure"] == "mixing_score"]
    np.testing.assert_array_equal(one["value"], wide["mixing_score"])
    assert list(wide["stage"]) == ["prelude"] + ["core"] * 8 + ["coda"]


def test_labels_tell_captures_apart():
    base = plan_of(make_dataset(random_sequences([4], SHAPE)[0], SHAPE))

    def plan(**model):
        own = {"name": "random:(0,2x4,0)I,norm=pre,width=8", "notation": "(0,2x4,0)I", "norm": "pre"}
        return replace(base, model=replace(base.model, **own | {"width": 8, "spec": None} | model))

    assert make_labels([plan()]) == ["random (0,2\N{MULTIPLICATION SIGN}4,0)I"]
    assert make_labels([plan(), plan(norm="ouro")]) == [
        "random (0,2\N{MULTIPLICATION SIGN}4,0)I pre-norm",
        "random (0,2\N{MULTIPLICATION SIGN}4,0)I ouro norms",
    ]
    assert make_labels([plan(), plan(width=16), plan(name="hub/Some-Model")])[1:] == [
        "random (0,2\N{MULTIPLICATION SIGN}4,0)I width 16",
        "Some-Model (0,2\N{MULTIPLICATION SIGN}4,0)I width 8",
    ]
    assert len(set(make_labels([plan(), plan(), plan(spec="random:(0,2x4,0)I,seed=1")]))) == 3


def test_importing_analysis_is_light():
    code = (
        "from looptap.analysis import analyze, findings, measures; from looptap.analysis.pages import report"
    )
    code += "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    )
    assert not loaded & {"torch", "ray", "triton", "transformers", "altair", "vl_convert"}
