"""Limiting behaviour of series with known answers, and the shares folded from them."""

import itertools

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from looptap.analysis.answers.distinctness import distinctness
from looptap.analysis.answers.limits import (
    FIXED_POINT,
    LIMITS,
    ORBIT,
    RHO,
    SLIDER,
    TAU,
    UNKNOWN,
    _rises,
    classify,
    limits,
    wilson,
)
from looptap.analysis.registry import ANALYSES
from looptap.analysis.thresholds import DISTINCT_COSINE
from looptap.analysis.walk import answer, walk
from looptap.errors import CannotTellError
from looptap.tests.synthetic import (
    RNG_SEED,
    contraction,
    drift,
    make_dataset,
    random_sequences,
    rotation,
    write_store,
)

SERIES = 10_000


def cosines(x_SRD: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Cosine to the last state, [recurrence, series], of states with noise of that share of their norm."""
    size = noise * np.linalg.norm(x_SRD, axis=-1, keepdims=True) / np.sqrt(x_SRD.shape[-1])
    x_SRD = x_SRD + size * rng.standard_normal(x_SRD.shape, dtype=np.float32)
    x_SRD /= np.linalg.norm(x_SRD, axis=-1, keepdims=True)
    return np.einsum("srd,sd->rs", x_SRD, x_SRD[:, -1])


def many(kind: str, R: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States of 10,000 tokens, float32 [series, recurrence, hidden], and their periods."""
    t_R, D = np.arange(R, dtype=np.float32), 8
    centre, one, other = rng.standard_normal((3, SERIES, 1, D)).astype(np.float32)
    centre /= np.linalg.norm(centre, axis=-1, keepdims=True)
    one -= (one * centre).sum(-1, keepdims=True) * centre
    one /= np.linalg.norm(one, axis=-1, keepdims=True)
    other -= (other * centre).sum(-1, keepdims=True) * centre + (other * one).sum(-1, keepdims=True) * one
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    period_S = rng.integers(2, R // 3 + 1, SERIES)
    if kind == "unknown":
        return rng.standard_normal((SERIES, R, D), dtype=np.float32), period_S
    if kind == "fixed_point":  # half of the way in at most a tenth of the recurrences
        rate_S = 0.5 ** (1 / rng.uniform(0.2, R / 10, SERIES))
        return centre + (rate_S[:, None] ** t_R)[..., None].astype(np.float32) * one, period_S
    if kind == "slider":  # past its own norm, and up to twice
        way_S = rng.uniform(1, 2, (SERIES, 1, 1)).astype(np.float32)
        return centre + way_S * (t_R / (R - 1))[:, None] * one, period_S
    angle_SR = (2 * np.pi * t_R / period_S[:, None] + rng.uniform(0, 2 * np.pi, (SERIES, 1)))[..., None]
    radius_S = rng.uniform(0.5, 3, (SERIES, 1, 1))
    x_SRD = centre + radius_S * (np.cos(angle_SR) * one + np.sin(angle_SR) * other)
    return x_SRD.astype(np.float32), period_S


# noise of 0.03 of the norm moves a cosine by about tau; 24: the last two thirds are 16; 128: the paper's
@pytest.mark.parametrize("R", [24, 128])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.slow
def test_ten_thousand_noisy_series_are_told_apart(kind, noise, R):
    rng = np.random.default_rng(RNG_SEED)
    x_SRD, period_S = many(kind, R, rng)
    limit_S, found_S = classify(cosines(x_SRD, noise, rng))
    assert (limit_S == LIMITS.index(kind)).mean() >= 0.99, np.bincount(limit_S, minlength=4)
    right = found_S == (period_S if kind == "orbit" else 0)
    assert right.mean() >= 0.99, (found_S[~right][:20], period_S[~right][:20])


# two turns and less in the last two thirds are not seen twice; an orbit of one point more is
@pytest.mark.parametrize(
    "period, kind", [(16, ORBIT), (17, UNKNOWN), (30, UNKNOWN), (400, SLIDER), (1000, FIXED_POINT)]
)
def test_only_what_was_seen_twice_is_an_orbit(period, kind):
    angle_R = 2 * np.pi * np.arange(48) / period
    limit_S, period_S = classify(np.cos(angle_R - angle_R[-1])[:, None])
    assert limit_S[0] == kind and period_S[0] == (16 if kind == ORBIT else 0)


def test_a_period_between_two_recurrences_is_the_nearer_one():
    angle_R = 2 * np.pi * np.arange(128) / 7.03
    limit_S, period_S = classify(np.cos(angle_R - angle_R[-1])[:, None])
    assert (limit_S[0], period_S[0]) == (ORBIT, 7)


# a swing of two tau under noise that no single lag stands out of
def test_the_smallest_of_lags_that_agree_alike_is_the_period():
    rng = np.random.default_rng(RNG_SEED)
    cosine_RS = np.where(np.arange(128)[:, None] % 2, 1, 0.9) + 0.015 * rng.normal(size=(128, 2000))
    limit_S, period_S = classify(cosine_RS)
    assert ((limit_S == ORBIT) & (period_S == 2)).mean() >= 0.99


def test_an_orbit_comes_back_to_where_it_ends_and_repeats_on_the_way():
    t, rng = np.arange(48), np.random.default_rng(RNG_SEED)
    orbit = np.where(t % 4 == 3, 1, 0.5)
    assert classify(orbit[:, None])[0][0] == ORBIT
    not_there = np.where(t == 47, 1, orbit - 0.1)  # repeats elsewhere
    loose = orbit + 0.2 * np.where(t % 4 == 3, 0, rng.normal(size=48))  # comes back, each time another way
    for series in (not_there, loose):
        assert classify(series[:, None])[0][0] == UNKNOWN


# ramps with so much noise that about half of them rise, some with ties
@pytest.mark.parametrize("step", [0, 0.1])
def test_a_slider_rises_by_spearmans_correlation(step):
    rng = np.random.default_rng(RNG_SEED)
    tail_WS = np.linspace(0, 0.4, 40)[:, None] + rng.uniform(0.01, 0.1, 500) * rng.normal(size=(40, 500))
    tail_WS = np.round(tail_WS / step) * step if step else tail_WS
    rank_WS = pd.DataFrame(tail_WS).rank().values - 20.5
    later_W = np.arange(40) - 19.5
    want_S = later_W @ rank_WS / (later_W @ later_W) >= RHO
    assert 100 < want_S.sum() < 400
    np.testing.assert_array_equal(_rises(tail_WS), want_S)


# within tau of 1 for 90 % of the last two thirds, and one less: of 8 all, of 20 all but 2
@pytest.mark.parametrize("R, out", [(12, 0), (30, 2)])
def test_a_fixed_point_needs_nine_in_ten(R, out):
    for more, kind in ((0, FIXED_POINT), (1, UNKNOWN)):
        cosine_R = np.full(R, 1 - 0.99 * TAU)
        cosine_R[: R // 3] = -1  # the first third does not count
        cosine_R[R // 3 + 2 : R // 3 + 2 + out + more] = 1 - 1.01 * TAU
        assert classify(cosine_R[:, None])[0][0] == kind


def test_a_rotation_is_an_orbit_of_its_period_at_every_layer():
    found = limits(rotation(7))
    assert (found["count"].sel(limit="orbit") == 15).all() and found.attrs["num_tokens"] == 15
    assert (found["period_count"].sel(period=7) == 15).all() and found["period_count"].sum() == 45
    assert list(found["period"].values) == list(range(2, 17))


def test_a_drift_is_a_slider_at_every_layer():
    found = limits(drift(noise=0.005))
    assert (found["count"].sel(limit="slider") == 15).all()
    assert found["period_count"].sum() == 0


# every layer's own point, and one for all: the limits agree, distinctness tells them apart
@pytest.mark.parametrize("points, distinct", [(5 * np.eye(3, 8), True), (5 * np.ones((3, 8)), False)])
def test_a_collapse_is_a_fixed_point_that_is_not_distinct(points, distinct):
    dataset = contraction(0.5, points, recurrences=24)
    assert (limits(dataset)["count"].sel(limit="fixed_point") == 15).all()
    least = float(distinctness(dataset)["least_cosine"].sel(statistic="value"))
    assert (least < DISTINCT_COSINE) == distinct


def mixed() -> xr.Dataset:
    """Tokens of four kinds at two layers, in sequences of 6, 1 and 8; one cosine is not finite."""
    R, shape = 36, (1, 2, 36, 1)
    t = np.arange(R)
    kinds = [np.ones(R), 1 - 0.4 * (t[::-1] % 3 > 0), t / (R - 1), np.where(t < R - 1, -0.5, 1)]
    rng = np.random.default_rng(RNG_SEED)
    sequences = []
    for T in (6, 1, 8):
        cosine = np.full((T, 2 * R + 2), np.nan)
        for token in range(T):
            for layer in range(2):
                cosine[token, 1 + layer : -1 : 2] = kinds[rng.integers(4)]
        sequences.append({"residual_norm": np.ones_like(cosine), "gap_cosine": cosine})
    sequences[2]["gap_cosine"][3, 10] = np.nan
    return make_dataset(sequences, shape)


def kinds_of(dataset: xr.Dataset) -> list[np.ndarray]:
    """Returns the kinds [token, layer] of every sequence, -1 where not finite, read off its values."""
    found = []
    spans = zip(dataset["sequence_start"].values, dataset["sequence_length"].values, strict=True)
    for start, length in spans:
        if not length:
            continue
        c = dataset["gap_cosine"].values[start : start + length, 1:-1].reshape(length, -1, 2)
        kind = np.select([c[:, 0] == 1, c[:, 0] == 0, c[:, 0] == -0.5], [0, 2, 3], 1)
        found.append(np.where(np.isfinite(c).all(axis=1), kind, -1))
    return found


def test_shares_and_pairs_equal_their_definitions(monkeypatch):
    monkeypatch.setattr(
        "looptap.analysis.answers.limits._BLOCK_BYTES", 4 * 36 * 2 * 3
    )  # three tokens at a time
    dataset = mixed()
    found, kinds = limits(dataset), kinds_of(dataset)
    kind = np.concatenate(kinds)
    assert found.attrs["non_finite"] == [0, 1] or found.attrs["non_finite"] == [1, 0]
    for layer, other in itertools.product(range(2), repeat=2):
        for a, b in itertools.product(range(4), repeat=2):
            given = (kind[:, layer] == a) & (kind[:, other] >= 0)
            got = float(found["conditional"][layer, a, other, b])
            want = (kind[given, other] == b).mean() if given.any() else np.nan
            np.testing.assert_allclose(got, want)
    for layer, a in itertools.product(range(2), range(4)):
        valid = kind[kind[:, layer] >= 0, layer]
        assert int(found["count"][layer, a]) == (valid == a).sum()
        np.testing.assert_allclose(float(found["share"][0, layer, a]), (valid == a).mean())
    for a, b in itertools.product(range(4), repeat=2):
        any_a, any_b = (kind == a).any(axis=1), (kind == b).any(axis=1)
        both = (kind == a).all(axis=1) if a == b else any_a & any_b
        np.testing.assert_allclose(float(found["together"][0, a, b]), both.sum() / any_a.sum())


def test_intervals_are_wilsons_and_widen_where_sequences_differ():
    low, high = wilson(np.array([0.0, 0.5, 1.0, np.nan]), np.array([100, 40, 10, 0]))
    for place, (share, total) in enumerate(
        [(0, 100), (0.5, 40), (1, 10)]
    ):  # (share - p)^2 = z^2 p (1 - p) / n
        square = 1.96**2 / total
        roots = np.roots([1 + square, -2 * share - square, share**2])
        np.testing.assert_allclose(sorted(roots), [low[place], high[place]], atol=1e-9)
    assert np.isnan(low[3]) and np.isnan(high[3])
    alike, apart = ([0] * 5 + [2] * 5, [0] * 5 + [2] * 5), ([0] * 10, [2] * 10)
    width = []
    for kinds in (alike, apart):
        t = np.arange(24)
        series = {0: np.ones(24), 2: t / 23}
        sequences = [{"gap_cosine": np.stack([series[k] for k in each])} for each in kinds]
        share = limits(make_dataset(sequences, (0, 1, 24, 0)))["share"].sel(limit="slider", layer=0)
        assert float(share[0]) == 0.5 and float(share[3]) == 2
        width.append(float(share[2] - share[1]))
    assert width[0] == pytest.approx(np.diff(np.ravel(wilson(np.array(0.5), np.array(20)))).item())
    # all of one sequence and none of the other differ 20 times as much as 20 tokens would by chance
    assert width[1] == pytest.approx(np.diff(np.ravel(wilson(np.array(0.5), np.array(1)))).item())


def test_what_cannot_be_told_says_what_to_capture():
    sequences, _ = random_sequences([5], (0, 2, 4, 0))
    with pytest.raises(CannotTellError, match=r"4 recurrences are too few.*--recurrences 12 or more"):
        limits(make_dataset(sequences, (0, 2, 4, 0)))
    with pytest.raises(CannotTellError, match="capture again with --quantities gaps"):
        limits(make_dataset([{"residual_norm": np.ones((5, 48))}], (0, 2, 24, 0)))
    broken = {"gap_cosine": np.full((5, 48), np.nan)}
    with pytest.raises(CannotTellError, match="no token has a finite cosine"):
        limits(make_dataset([broken], (0, 2, 24, 0)))


def test_one_walk_over_a_store_on_disk_gives_the_same(tmp_path):
    dataset = rotation(5, noise=0.01)
    asked = [ANALYSES[name] for name in ("limits", "rates", "two_scale", "acceleration")]
    answers = walk(write_store(dataset, tmp_path / "all.zarr"), asked)
    for each in asked:
        found = answers[each.name]
        assert isinstance(found, xr.Dataset) and found.attrs["definition"] == each.definition
        xr.testing.assert_allclose(found.drop_attrs(), answer(dataset, each).drop_attrs())
