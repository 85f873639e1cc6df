"""Rates of convergence on contractions whose rate is known, and where a rate is refused."""

import numpy as np
import pytest

from looptap.analysis.answers.rates import LEAST_STEPS, fit_rates, half_life, rates
from looptap.analysis.folds import BAND_Z
from looptap.errors import CannotTellError
from looptap.tests.synthetic import RNG_SEED, contraction, drift, make_dataset, random_sequences, rotation

SERIES = 10_000
POINTS_LD = 5 * np.eye(3, 8)


# 0.05: three steps above rounding and the window is all there is; 0.99: nothing near rounding; 1.02 runs away
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9, 0.99, 1.02])
@pytest.mark.parametrize("recurrences", [8, 48, 128])
def test_a_contraction_of_known_rate_within_two_percent(rate, recurrences):
    found = rates(contraction(rate, POINTS_LD, recurrences))
    np.testing.assert_allclose(found["rate"][:3], rate, rtol=0.02)
    np.testing.assert_allclose(found["token_rate"], rate, rtol=0.02)
    half = np.log(0.5) / np.log(rate) if rate < 1 else np.inf
    np.testing.assert_allclose(found["half_life"][0], half, rtol=0.02 / min(1, abs(np.log(rate))))
    assert (found["fitted"] == 15).all() and (found["refused"] == 0).all()


# steps of states rounded to float32 and bfloat16: the end of the window is as good as its start
@pytest.mark.parametrize(
    "dtype, rate", [("float32", 0.4), ("float32", 0.8), ("bfloat16", 0.8), ("bfloat16", 0.9)]
)
def test_rounded_states_give_the_rate_they_had(dtype, rate):
    rng = np.random.default_rng(RNG_SEED)
    R, T, D = 64, 200, 256
    point, offset = rng.normal(size=(2, T, 1, D))
    x_TRD = (point + rate ** np.arange(R)[:, None] * offset).astype(np.float32)
    if dtype == "bfloat16":  # to the nearest
        bits = x_TRD.view(np.uint32)
        x_TRD = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    step = np.full((T, R), np.nan)
    step[:, 1:] = np.linalg.norm(np.diff(x_TRD.astype(np.float64), axis=1), axis=-1)
    norm = np.linalg.norm(x_TRD, axis=-1)
    dataset = make_dataset([{"step_norm": step, "residual_norm": norm}], (0, 1, R, 0))
    dataset.attrs["plan"]["settings"]["dtype"] = dtype
    found = rates(dataset)
    assert float(found["rate"][0, 0]) == pytest.approx(rate, rel=0.02)
    assert float(found["window"][0, 0]) < R - 2 and int(found["fitted"][0]) == T


def test_ten_thousand_noisy_series_of_steps():
    rng = np.random.default_rng(RNG_SEED)
    rate_S = rng.uniform(0.3, 0.98, SERIES)
    step_RS = rate_S ** np.arange(127)[:, None] * np.exp(0.02 * rng.normal(size=(127, SERIES)))
    found_S, window_S = fit_rates(step_RS, np.full_like(step_RS, 5e-7))
    assert (np.abs(found_S / rate_S - 1) < 0.02).mean() >= 0.99
    expected_S = np.minimum(np.ceil(np.log(5e-7) / np.log(rate_S)), 127)
    assert (np.abs(window_S - expected_S) <= 1).all()


# a fast direction that holds most of the first step, and a slow one that decides in the end
def test_the_slow_direction_decides():
    t_R1 = np.arange(127)[:, None]
    found_S, _ = fit_rates(10 * 0.5**t_R1 + 0.9**t_R1, np.full((127, 1), 1e-9))
    assert found_S[0] == pytest.approx(0.9, rel=0.001)


def test_the_fit_equals_numpys_over_the_later_half():
    rng = np.random.default_rng(RNG_SEED)
    step_RS = np.exp(rng.normal(size=(20, 6)) - 0.2 * np.arange(20)[:, None])
    floor_RS = np.full_like(step_RS, 1e-12)
    for series, window in enumerate([20, 11, 5, 4, 3, 2]):
        step_RS[window : window + 1, series] = 0  # and above the floor again after that
    found_S, window_S = fit_rates(step_RS, floor_RS)
    assert list(window_S) == [20, 11, 5, 4, 3, 2] and np.isnan(found_S[5])
    for series, (first, last) in enumerate([(10, 20), (5, 11), (2, 5), (1, 4), (0, 3)]):
        slope = np.polyfit(np.arange(first, last), np.log(step_RS[first:last, series]), 1)[0]
        assert found_S[series] == pytest.approx(np.exp(slope), rel=1e-9)


def test_what_never_settles_has_no_half_life():
    for dataset in (rotation(7), drift()):
        found = rates(dataset)
        np.testing.assert_allclose(found["rate"][0], 1, rtol=1e-5)
        assert (found["half_life"][0] > 1e4).all()
    np.testing.assert_allclose(half_life(np.array([0.5, 0.25, 1, 1.5, 0])), [1, 0.5, np.inf, np.inf, 0])
    assert np.isnan(half_life(np.array([np.nan])))[0]


# sequences weigh alike whatever their length, in the mean of the logarithm, and tokens within them
def test_bands_are_over_sequences_and_tokens_without_a_rate_are_counted(monkeypatch):
    monkeypatch.setattr("looptap.analysis.answers.rates._BLOCK_BYTES", 8 * 11 * 2)  # two tokens at a time
    t = np.arange(1, 12)
    rate_of = [[0.5], [0.8, 0.7, 0.6], [0.9, 1e-5]]  # the last of all is at rounding after one step
    sequences = []
    for each in rate_of:
        step = np.array([[np.nan, *(rate**t)] for rate in each])
        sequences.append({"step_norm": step, "residual_norm": np.ones_like(step)})
    sequences[1]["step_norm"][2, 5] = np.inf
    found = rates(make_dataset(sequences, (0, 1, 12, 0)))
    log = [np.log(0.5), np.log([0.8, 0.7]).mean(), np.log(0.9)]
    error = np.std(log, ddof=1) / np.sqrt(3)
    want = np.exp(np.mean(log) + BAND_Z * error * np.array([0, -1, 1]))
    np.testing.assert_allclose(found["rate"][:3, 0], want, rtol=1e-5)
    np.testing.assert_allclose(found["half_life"][:3, 0], np.log(0.5) / np.log(want), rtol=1e-5)
    assert float(found["rate"][3, 0]) == 3
    assert (int(found["fitted"][0]), int(found["refused"][0]), found.attrs["non_finite"]) == (4, 1, [1])
    np.testing.assert_allclose(found["token_rate"].sel(quartile=0.5), 0.75, atol=0.051)


def test_too_few_recurrences_are_refused_with_what_to_do():
    for R in (2, LEAST_STEPS):
        sequences, _ = random_sequences([5], (0, 2, R, 0))
        with pytest.raises(CannotTellError, match=f"{R} recurrences .* --recurrences 4 or more"):
            rates(make_dataset(sequences, (0, 2, R, 0)))
    with pytest.raises(CannotTellError, match="no token's step stays above rounding in float32 for 3"):
        rates(contraction(1e-5, POINTS_LD))
    sequences, _ = random_sequences([5], (3, 0, 0, 0))
    with pytest.raises(CannotTellError, match="the model has no loop"):
        rates(make_dataset(sequences, (3, 0, 0, 0)))
