"""Measures by head against their definitions over whole attention matrices, in float64."""

import numpy as np
import pandas as pd
import pytest

from looptap.analysis.analyze import write_analysis
from looptap.analysis.answers.heads import ANALYSES, HEAD_MEASURES, heads, long_table
from looptap.analysis.folds import BAND_Z
from looptap.analysis.measures import MEASURES, measure
from looptap.errors import CannotTellError
from looptap.tests.golden_files import NAMES
from looptap.tests.synthetic import (
    ATTENTION,
    RNG_SEED,
    SHAPE,
    make_dataset,
    quantities_of_attention,
    quantities_of_sequence,
    random_sequences,
    write_store,
)
from looptap.tests.test_golden_measures import ATOL, RTOL, replayed


def with_attention(lengths: list[int], shape=SHAPE, heads: int = 3):
    """Sequences and the attention behind them, each float64 [depth, head, query, key]."""
    rng, num_depths = np.random.default_rng(RNG_SEED), shape[0] + shape[1] * shape[2] + shape[3]
    sequences, maps = [], []
    for T in lengths:
        score_LHTT = rng.normal(size=(num_depths, heads, T, T)) * 2
        score_LHTT[:, 1, :, 0] += 3  # one head is more of a sink than others
        a_LHTT = np.exp(np.where(np.tril(np.ones((T, T), bool)), score_LHTT, -np.inf))
        a_LHTT /= a_LHTT.sum(-1, keepdims=True)
        maps.append(a_LHTT)
        of_sequence = quantities_of_sequence(rng.normal(size=(T, num_depths, 8)), a_LHTT, shape)
        sequences.append(quantities_of_attention(a_LHTT) | of_sequence)
    return sequences, maps


def definitions(a_LHTT: np.ndarray, shape) -> dict[str, np.ndarray]:
    """Every measure of one sequence, [depth, head], one head at a time."""
    prelude, core, recurrences, _ = shape
    L, H, T, _ = a_LHTT.shape
    out = {name: np.full((L, H), np.nan) for name in HEAD_MEASURES}
    for depth, head in np.ndindex(L, H):
        a_TT = a_LHTT[depth, head]
        out["sink_score"][depth, head] = sum(a_TT[:, 0]) / T
        out["mixing_score"][depth, head] = np.mean([entropy(row) for row in a_TT])
        out["attention_peak"][depth, head] = np.mean([max(row) for row in a_TT])
        if T > 1:
            share = [sum(a_TT[:, key]) / T for key in range(T)]
            out["colsum_concentration"][depth, head] = 1 - entropy(np.array(share)) / np.log(T)
        recurrence, layer = divmod(depth - prelude, core) if core else (-1, 0)
        if not 0 <= recurrence < recurrences:
            continue
        last_TT = a_LHTT[prelude + core * (recurrences - 1) + layer, head]
        out["attention_gap"][depth, head] = np.linalg.norm(a_TT - last_TT)
        if recurrence:
            before_TT = a_LHTT[depth - core, head]
            out["attention_step"][depth, head] = np.linalg.norm(a_TT - before_TT)
            moved = [abs(entropy(row) - entropy(old)) for row, old in zip(a_TT, before_TT, strict=True)]
            out["entropy_change"][depth, head] = np.mean(moved)
    return out


def entropy(p: np.ndarray) -> float:
    return -sum(x * np.log(x) for x in p if x > 0)


# 5 sequences over 3 units, the last half empty; 1: a sequence of one token, which has no concentration
def test_every_measure_and_its_band_equal_their_definition():
    sequences, maps = with_attention([7, 1, 4, 12, 5])
    found = heads(make_dataset(sequences, SHAPE, empty_units=1))
    each = [definitions(a_LHTT, SHAPE) for a_LHTT in maps]
    assert set(found.data_vars) == set(HEAD_MEASURES) and found.attrs["missing"] == {}
    for name, got in found.data_vars.items():
        value_SLH = np.stack([of[name] for of in each])
        count_LH = np.isfinite(value_SLH).sum(0)
        with np.errstate(invalid="ignore"):
            known = value_SLH if name != "colsum_concentration" else np.delete(value_SLH, 1, 0)
            mean, error = known.mean(0), known.std(0, ddof=1) / np.sqrt(len(known))
        assert got.dims == ("statistic", "depth", "head") and got.attrs["units"] == MEASURES[name].unit
        np.testing.assert_allclose(got.sel(statistic="value"), mean, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(got.sel(statistic="low"), mean - BAND_Z * error, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.sel(statistic="high"), mean + BAND_Z * error, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got.sel(statistic="sequences"), count_LH)


@pytest.mark.parametrize("name", NAMES)
def test_every_measure_equals_its_definition_on_the_authors_attention(name):
    dataset, _, a_SLHTT, _, _, shape = replayed(name)
    found = heads(dataset)
    each = [definitions(a_LHTT, shape) for a_LHTT in a_SLHTT]
    for measured in HEAD_MEASURES:
        wanted_LH = np.mean([of[measured] for of in each], 0)
        if measured not in found:
            assert np.isnan(wanted_LH).all() and not shape[1]
            continue
        got_LH = found[measured].sel(statistic="value")
        np.testing.assert_allclose(got_LH, wanted_LH, rtol=RTOL, atol=ATOL.get(measured, 1e-7))


def test_the_mean_over_heads_is_the_curve_over_depth():
    sequences, _ = random_sequences([7, 4, 12], SHAPE)
    dataset = make_dataset(sequences, SHAPE)
    found, curves = heads(dataset), measure(dataset, list(HEAD_MEASURES))
    for name in HEAD_MEASURES:
        mean_D = found[name].sel(statistic="value").mean("head")
        np.testing.assert_allclose(mean_D, curves[name].sel(statistic="value"), rtol=1e-10, err_msg=name)


def test_a_value_that_is_no_number_is_left_out_of_its_head_alone():
    sequences, maps = with_attention([4, 6])
    sequences[0]["attention_sink"][:, 2, 1] = np.nan
    found = heads(make_dataset(sequences, SHAPE))["sink_score"]
    value = found.sel(statistic="value", depth=2).values
    each = [definitions(a_LHTT, SHAPE)["sink_score"][2] for a_LHTT in maps]
    np.testing.assert_allclose(
        value, [(each[0] + each[1])[0] / 2, each[1][1], (each[0] + each[1])[2] / 2], rtol=1e-6
    )
    assert found.sel(statistic="sequences", depth=2).values.tolist() == [2, 1, 2]


def test_each_quantity_is_walked_alone():
    (needs,) = {len(each.needs) for each in ANALYSES}
    assert needs == 1  # or memory would hold several arrays [token, depth, head] of a unit


def test_what_is_missing_says_what_to_capture():
    sequences, _ = with_attention([4, 6])
    kept = [{k: v for k, v in s.items() if k in ATTENTION and k != "attention_sink"} for s in sequences]
    found = heads(make_dataset(kept, SHAPE))
    assert set(found.attrs["missing"]) == {"sink_score", "attention_step", "attention_gap"}
    assert "--quantities distances" in found.attrs["missing"]["attention_gap"]
    with pytest.raises(CannotTellError, match="capture again with --quantities attention"):
        heads(make_dataset([{"residual_norm": np.ones((4, 10))}], SHAPE))


def test_a_feedforward_model_has_heads_that_do_not_change():
    sequences, maps = with_attention([5, 6], (4, 0, 0, 0))
    kept = [{k: v for k, v in s.items() if k in ATTENTION} for s in sequences]
    found = heads(make_dataset(kept, (4, 0, 0, 0)))
    wanted = np.mean([definitions(a, (4, 0, 0, 0))["mixing_score"] for a in maps], 0)
    np.testing.assert_allclose(found["mixing_score"][0], wanted, rtol=1e-6)
    assert found.attrs["missing"]["entropy_change"] == "the model has no loop"


def test_the_table_has_a_row_for_every_measure_depth_and_head(tmp_path):
    sequences, _ = with_attention([4, 6, 5])
    path = write_store(make_dataset(sequences, SHAPE), tmp_path / "one.zarr", units=[0])
    written = write_analysis(path, tmp_path / "out", "csv", figure_format=())
    table = pd.read_csv(tmp_path / "out" / "heads.csv")
    assert not [p for p in written if p.stem.startswith("heads_")]
    found = heads(path)
    pd.testing.assert_frame_equal(table, long_table(found), check_dtype=False)
    row = table.query("measure == 'sink_score' and depth == 3 and head == 1").iloc[0]
    assert row["value"] == pytest.approx(float(found["sink_score"][0, 3, 1])) and row["sequences"] == 2
    assert (row["layer"], row["recurrence"], row["units"]) == (0, 1, "probability")
    assert len(table) == len(HEAD_MEASURES) * 10 * 3
