"""What is no curve of one measure, on the authors' stored residuals and attention, against float64.

The authors' tensors are replayed as `test_golden_measures.py` does, and every definition is written out here
from the same tensors. A limit asks for 12 recurrences and a profile for 4 layers, which the fixtures' loops
do not have: limits are held to known answers in `test_limits.py`, and profiles are compared here by the
function that does it.
"""

from functools import cache

import numpy as np
import pytest

from looptap.analysis.answers.rates import rates
from looptap.analysis.answers.settling import settling
from looptap.analysis.answers.similarity import attention_distance, residual_similarity
from looptap.analysis.answers.stages import STAGE_MEASURES, agreement
from looptap.analysis.answers.two_scale import acceleration, two_scale
from looptap.analysis.findings import find
from looptap.tests.golden_files import NAMES
from looptap.tests.synthetic import make_dataset
from looptap.tests.test_golden_measures import RTOL, definitions, replayed

LOOPED = [name for name in NAMES if name not in ("llama", "olmo2")]
replayed = cache(replayed)


def looped(name: str) -> tuple:
    """The fixture's Dataset; its core's residuals before and after each block in float64
    [sequence, token, recurrence, layer, hidden]; its shape.
    """
    dataset, x_S2TLD, _, _, _, (prelude, core, recurrences, coda) = replayed(name)
    inside = x_S2TLD[:, :, :, prelude : prelude + core * recurrences]
    before, after = inside.reshape(*inside.shape[:3], recurrences, core, -1).swapaxes(0, 1)
    return dataset, before, after, (prelude, core, recurrences, coda)


def at_ends(values_D: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """A curve's values where recurrences end."""
    prelude, core, recurrences, _ = shape
    return values_D[prelude + core - 1 : prelude + core * recurrences : core]


@pytest.mark.parametrize("name", LOOPED)
def test_rates_are_the_slopes_of_the_logarithms_of_steps(name):
    dataset, _, x_STRLD, _ = looped(name)
    step_STRL = np.linalg.norm(np.diff(x_STRLD, axis=2), axis=-1)
    S, T, R, L = step_STRL.shape
    assert R == 3 and (step_STRL > 1e-5).all()  # three steps above rounding, and so all of them count
    slope_STL = np.polynomial.polynomial.polyfit(
        np.arange(R), np.log(step_STRL).swapaxes(0, 2).reshape(R, -1), 1
    )
    rate_L = np.exp(slope_STL[1].reshape(T, S, L).mean((0, 1)))
    found = rates(dataset)
    np.testing.assert_allclose(found["rate"].sel(statistic="value"), rate_L, rtol=RTOL)
    half_L = np.where(rate_L < 1, np.log(0.5) / np.log(rate_L), np.inf)
    # a half-life of a rate near 1 is as much less exact as it is far away
    np.testing.assert_allclose(
        found["half_life"].sel(statistic="value"), half_L, rtol=RTOL / np.abs(np.log(rate_L)).min()
    )


@pytest.mark.parametrize("name", LOOPED)
def test_the_two_scales_equal_their_definitions(name):
    dataset, before_STRLD, x_STRLD, shape = looped(name)
    path_STR = np.linalg.norm(x_STRLD - before_STRLD, axis=-1).sum(-1)
    step_STR = np.linalg.norm(np.diff(x_STRLD[..., -1, :], axis=2), axis=-1)
    found = two_scale(dataset).sel(statistic="value")
    np.testing.assert_allclose(at_ends(found["path"].values, shape), path_STR.mean((0, 1)), rtol=RTOL)
    np.testing.assert_allclose(at_ends(found["step"].values, shape)[1:], step_STR.mean((0, 1)), rtol=RTOL)
    ratio_R = (step_STR / path_STR[:, :, 1:]).mean((0, 1))
    np.testing.assert_allclose(at_ends(found["ratio"].values, shape)[1:], ratio_R, rtol=RTOL)


@pytest.mark.parametrize("name", LOOPED)
def test_accelerations_equal_their_definitions(name):
    *_, x_STRLD, shape = looped(name)
    _, x_S2TLD, *_ = replayed(name)
    quantity = [{"residual_norm": np.linalg.norm(x[1], axis=-1).astype(np.float32)} for x in x_S2TLD]
    with_states = make_dataset(quantity, shape, states=[x[1].astype(np.float32) for x in x_S2TLD])
    found = acceleration(with_states).sel(statistic="value")
    x_SRLD = x_STRLD[:, -1]  # the last token's states are kept
    step_SRLD = np.diff(x_SRLD, axis=1)
    length_SRL = np.linalg.norm(np.diff(step_SRLD, axis=1), axis=-1)
    relative_SRL = length_SRL / np.linalg.norm(x_SRLD[:, 2:], axis=-1)
    now, last = step_SRLD[:, 1:], step_SRLD[:, :-1]
    turn_SRL = (now * last).sum(-1) / np.linalg.norm(now, axis=-1) / np.linalg.norm(last, axis=-1)
    prelude, core, recurrences, _ = shape
    wanted = {"acceleration": length_SRL, "relative_acceleration": relative_SRL, "step_turn": turn_SRL}
    for key, value_SRL in wanted.items():
        got = found[key].values[prelude : prelude + core * recurrences].reshape(recurrences, core)[2:]
        np.testing.assert_allclose(got, value_SRL.mean(0), rtol=RTOL, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", LOOPED)
def test_answers_settle_where_the_likeliest_token_stays(name):
    dataset, _, _, lens_STRV, *_ = replayed(name)
    token_STR = lens_STRV.argmax(-1)
    R = token_STR.shape[-1]
    stays_STR = np.stack([(token_STR[..., r:] == token_STR[..., -1:]).all(-1) for r in range(R)], -1)
    found = settling(dataset)
    np.testing.assert_allclose(found["settled"].sel(statistic="value"), stays_STR.mean((0, 1)), rtol=RTOL)
    first = R - stays_STR.sum(-1)
    assert float(found["mean_recurrence"].sel(statistic="value")) == pytest.approx(first.mean(), rel=RTOL)


@pytest.mark.parametrize("name", LOOPED)
def test_layers_are_like_themselves_and_others_by_definition(name):
    dataset, x_S2TLD, a_SLHTT, _, _, (prelude, core, recurrences, _) = replayed(name)
    x_STLD = x_S2TLD[:, 1]
    unit = x_STLD / np.linalg.norm(x_STLD, axis=-1, keepdims=True)
    cosine_SLL = np.einsum("stld,stmd->slm", unit, unit) / x_STLD.shape[1]
    apart_SLL = np.sqrt(((a_SLHTT[:, :, None] - a_SLHTT[:, None]) ** 2).sum((-1, -2))).mean(-1)
    for found, value_SLL in ((residual_similarity, cosine_SLL), (attention_distance, apart_SLL)):
        same, other = np.zeros((2, core))
        for layer in range(core):
            depths = [prelude + r * core + layer for r in range(recurrences)]
            same[layer] = np.mean([value_SLL[:, a, b] for a in depths for b in depths if a != b])
            beside = [(a, a - layer + m) for a in depths for m in range(core) if m != layer]
            other[layer] = np.mean([value_SLL[:, a, b] for a, b in beside])
        answer = found(dataset).sel(statistic="value")
        np.testing.assert_allclose(answer["same_layer"], same, rtol=RTOL, atol=1e-6)
        np.testing.assert_allclose(answer["other_layers"], other, rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("name", LOOPED)
def test_profiles_agree_as_defined(name):
    _, x_S2TLD, a_SLHTT, lens_STRV, gate_STR, shape = replayed(name)
    prelude, core, recurrences, _ = shape
    gate_TR = None if gate_STR is None else gate_STR[0]
    found = definitions(x_S2TLD[0], a_SLHTT[0], lens_STRV[0], gate_TR, shape)
    for key in STAGE_MEASURES:
        profile_RL = found[key][prelude : prelude + core * recurrences].reshape(recurrences, core)
        correlation_R, far_R = agreement(profile_RL, profile_RL[-1])
        wanted_R = [np.corrcoef(profile_L, profile_RL[-1])[0, 1] for profile_L in profile_RL]
        np.testing.assert_allclose(correlation_R, wanted_R, rtol=1e-9)
        apart_R = [np.linalg.norm(profile_L - profile_RL[-1]) / np.sqrt(core) for profile_L in profile_RL]
        np.testing.assert_allclose(far_R, np.array(apart_R) / np.ptp(profile_RL[-1]), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_everything_that_can_be_asked_of_a_fixture_is_answered(name):
    """Questions that have no answer say why."""
    (findings,) = find([replayed(name)[0]])
    why = {key: found for key, found in findings.answers.items() if isinstance(found, str)}
    assert all(why.values())
    if name in LOOPED:
        assert {"rates", "two_scale", "settling", "residual_similarity", "attention_distance"}.isdisjoint(why)
