"""When answers settle, against a count by hand and against what each token says."""

import numpy as np
import pytest

from looptap.analysis.answers.settling import settled_at, settling
from looptap.errors import CannotTellError
from looptap.tests.synthetic import SHAPE, make_dataset, random_sequences

RECURRENCES = SHAPE[2]


def test_a_token_settles_where_its_answer_stays_to_the_end():
    token_TR = np.array([[5, 5, 5, 5], [1, 2, 5, 5], [5, 1, 5, 5], [1, 2, 3, 5], [5, 5, 1, 5], [7, 7, 7, 5]])
    np.testing.assert_array_equal(settled_at(token_TR), [0, 2, 2, 3, 3, 3])


def with_answers(seed: int = 0):
    rng = np.random.default_rng(seed)
    sequences, _ = random_sequences([5, 1, 9], SHAPE)
    for sequence in sequences:
        length = len(sequence["residual_norm"])
        sequence["lens_token"] = rng.integers(0, 3, (length, RECURRENCES)).astype(np.int32)
    return sequences


def test_shares_equal_their_definition():
    sequences = with_answers()
    found = settling(make_dataset(sequences, SHAPE, empty_units=1))
    share_SR, mean_S, count_R = [], [], np.zeros(RECURRENCES, int)
    for sequence in sequences:
        answers = sequence["lens_token"].tolist()
        at = [
            next(r for r in range(RECURRENCES) if all(a == token[-1] for a in token[r:])) for token in answers
        ]
        share_SR.append([np.mean([a <= r for a in at]) for r in range(RECURRENCES)])
        mean_S.append(np.mean(at))
        count_R += np.bincount(at, minlength=RECURRENCES)
    np.testing.assert_allclose(found["settled"].sel(statistic="value"), np.mean(share_SR, axis=0))
    np.testing.assert_allclose(found["mean_recurrence"].sel(statistic="value"), np.mean(mean_S))
    np.testing.assert_array_equal(found["count"], count_R)
    assert found.attrs["num_tokens"] == 15 and (found["settled"].values[3] == 3).all()


def test_answers_that_are_no_tokens_are_left_out():
    sequences = with_answers()
    sequences[0]["lens_token"][:2, 1] = -1
    assert settling(make_dataset(sequences, SHAPE)).attrs["num_tokens"] == 13


def test_without_a_lens_the_reason_says_what_to_capture():
    sequences, _ = random_sequences([5, 6], SHAPE)
    with pytest.raises(CannotTellError, match="--quantities lens"):
        settling(make_dataset(sequences, SHAPE).drop_vars("lens_token"))
