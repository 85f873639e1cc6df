"""Stage agreement against its definition, a sequence at a time, and resampling against straight lines."""

import numpy as np
import pytest

from looptap.analysis.answers.stages import agreement, resampled, stage_agreement
from looptap.analysis.measures import measure
from looptap.errors import CannotTellError
from looptap.tests.synthetic import make_dataset, random_sequences

SHAPE = (1, 5, 3, 1)
LENGTHS = [5, 1, 9]


def core(values_D: np.ndarray) -> np.ndarray:
    return values_D[1:-1].reshape(3, 5)


def sequences_of(shape=SHAPE):
    return random_sequences(LENGTHS, shape)[0]


def test_agreement_is_pearsons_and_the_distance_is_a_share_of_the_range():
    rng = np.random.default_rng(0)
    profile_RL, reference_L = rng.standard_normal((4, 6)), rng.standard_normal(6)
    correlation_R, far_R = agreement(profile_RL, reference_L)
    np.testing.assert_allclose(correlation_R, [np.corrcoef(p, reference_L)[0, 1] for p in profile_RL])
    far = [np.linalg.norm(p - reference_L) / np.sqrt(6) for p in profile_RL]
    np.testing.assert_allclose(far_R, np.array(far) / (reference_L.max() - reference_L.min()))


def test_a_flat_profile_has_no_correlation():
    assert np.isnan(agreement(np.ones((1, 5)), np.arange(5.0))[0, 0])


def test_resampling_keeps_straight_lines_within_the_middles_and_the_same_length():
    line = np.arange(8) + 0.5
    np.testing.assert_allclose(resampled(line, 4), [1, 3, 5, 7])
    np.testing.assert_array_equal(resampled(line, 8), line)
    assert resampled(line, 16)[0] == line[0]  # nothing is made up beyond the ends


def test_without_a_reference_each_sequence_is_beside_its_own_last_recurrence():
    sequences = sequences_of()
    found = stage_agreement(make_dataset(sequences, SHAPE), measures=["residual_norm"])
    z_SR, far_SR = [], []
    for sequence in sequences:
        profile_RL = core(sequence["residual_norm"].astype(np.float64).mean(axis=0))
        z_SR.append([np.arctanh(np.corrcoef(p, profile_RL[-1])[0, 1]) for p in profile_RL[:-1]])
        spread = profile_RL[-1].max() - profile_RL[-1].min()
        far_SR.append(np.sqrt(((profile_RL - profile_RL[-1]) ** 2).mean(axis=1)) / spread)
    value = found.sel(statistic="value", measure="residual_norm")
    np.testing.assert_allclose(
        value["correlation"][:-1], np.tanh(np.mean(z_SR, axis=0)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(value["correlation"][-1], 1)
    np.testing.assert_allclose(value["distance"], np.mean(far_SR, axis=0), rtol=1e-5, atol=1e-6)
    error = 1.96 * np.std(z_SR, axis=0, ddof=1) / np.sqrt(len(z_SR))
    low = found["correlation"].sel(statistic="low", measure="residual_norm")[:-1]
    np.testing.assert_allclose(low, np.tanh(np.mean(z_SR, axis=0) - error), rtol=1e-5, atol=1e-6)


def test_with_a_reference_every_recurrence_is_beside_its_resampled_depth():
    sequences, plain_shape = sequences_of(), (7, 0, 0, 0)
    plain = [{"residual_norm": np.abs(s["residual_norm"][:, :7]) + 1} for s in sequences_of()]
    reference = make_dataset(plain, plain_shape)
    found = stage_agreement(make_dataset(sequences, SHAPE), reference, ["residual_norm"])
    whole_D = measure(reference, ["residual_norm"])["residual_norm"].sel(statistic="value").values
    at = (np.arange(5) + 0.5) / 5 * 7 - 0.5
    reference_L = np.interp(at, np.arange(7), whole_D)
    z_SR = [
        [
            np.arctanh(np.corrcoef(p, reference_L)[0, 1])
            for p in core(s["residual_norm"].astype(float).mean(0))
        ]
        for s in sequences
    ]
    value = found["correlation"].sel(statistic="value", measure="residual_norm")
    np.testing.assert_allclose(value, np.tanh(np.mean(z_SR, axis=0)), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compared_is_named():
    dataset = make_dataset(sequences_of(), SHAPE)
    lacks = dataset.drop_vars("attention_sink")
    found = stage_agreement(lacks, measures=["residual_norm", "sink_score"])
    assert list(found["measure"].values) == ["residual_norm"]
    assert "--quantities attention" in found.attrs["missing"]["sink_score"]
    beside = stage_agreement(dataset, lacks, ["residual_norm", "sink_score"])
    assert beside.attrs["missing"]["sink_score"].startswith("in the reference: ")
    with pytest.raises(CannotTellError, match="3 layers"):
        stage_agreement(make_dataset(sequences_of((1, 3, 3, 1)), (1, 3, 3, 1)))
    with pytest.raises(CannotTellError, match="no loop"):
        stage_agreement(make_dataset(sequences_of((4, 0, 0, 0)), (4, 0, 0, 0)), measures=["residual_norm"])
    with pytest.raises(ValueError, match="'mixing' is not a measure"):
        stage_agreement(dataset, measures=["mixing"])
