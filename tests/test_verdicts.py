"""The report's verdicts on dynamics with known answers: what converges, what seems to, what lasts."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from looptap.analysis.findings import find
from looptap.analysis.questions import STABLE_GAP
from looptap.analysis.thresholds import REPEATED_STAGES
from looptap.analysis.trained import trained_count
from looptap.analysis.verdicts import Verdict
from looptap.capture.store.plan import StoredPlan, plan_of
from looptap.tests.synthetic import (
    RNG_SEED,
    contraction,
    drift,
    make_dataset,
    quantities_of_attention,
    rotation,
)

POINTS, ONE_POINT = 5 * np.eye(3, 8), 5 * np.ones((3, 8))
HUB = "hub/Looped-1B"


def verdict(name: str, *stores: xr.Dataset) -> Verdict:
    """Returns a verdict of the first capture."""
    (found,) = (each for each in find(stores)[0].verdicts if each.question.name == name)
    return found


# 0.03: nothing left after 10 recurrences; 0.97: 0.3 of the way to go after 48, steps of 1.6e-3 of the norm
@pytest.mark.parametrize(
    "dataset, converges, distinct",
    [
        (contraction(0.5, POINTS, 48), True, True),
        (contraction(0.03, POINTS, 48), True, True),
        (contraction(0.97, POINTS, 48), False, None),
        (contraction(0.5, ONE_POINT, 48), True, False),
        (contraction(1.01, POINTS, 48), False, None),
        (rotation(6), False, None),
        (rotation(6.5, noise=0.01), False, None),
        (drift(), False, None),
        (drift(noise=0.001), False, None),
        (drift(reach=0.02), False, None),
    ],
)
def test_verdicts_on_known_dynamics(dataset, converges, distinct):
    assert verdict("converged", dataset).answer is converges
    assert verdict("distinct", dataset).answer is distinct


def test_a_slow_drift_is_told_by_its_rate_and_not_by_its_steps():
    found = verdict("converged", drift(reach=0.02))
    assert found.value is not None and found.value <= found.question.threshold and found.recurrence is None
    assert "the slowest layer's steps do not shrink, and 48 recurrences ran" in found.detail


def test_noise_that_keeps_a_converged_loop_moving_is_no_drift():
    dataset = contraction(0.5, POINTS, 48)
    rng = np.random.default_rng(RNG_SEED)
    for name in ("step_norm", "gap_norm"):  # as arithmetic in less than float32 leaves it: 1e-5 of the norm
        noise = 5e-5 * rng.uniform(0.5, 1, dataset[name].shape)
        dataset[name] = np.maximum(dataset[name], noise.astype(np.float32))
    found, rates = verdict("converged", dataset), find([dataset])[0].answers["rates"]
    assert isinstance(rates, xr.Dataset) and float(rates["half_life"].sel(statistic="value").max()) > 48
    assert found.answer is True and "drifts" not in found.detail


def test_the_rate_and_where_tokens_end_up_stand_beside_the_answer():
    assert "steps halve in 1 recurrences" in verdict("converged", contraction(0.5, POINTS, 30)).detail
    assert "end 100 % at a fixed point" in verdict("converged", contraction(0.5, POINTS, 30)).detail
    assert "end 100 % on an orbit" in verdict("converged", rotation(6)).detail
    assert "end 100 % sliding" in verdict("converged", drift()).detail


def attention(profile_RL: np.ndarray, num_sequences: int = 2) -> xr.Dataset:
    """Attention that goes from even to the first key alone as a layer's entry in the profile goes to 1."""
    R, L, T, H = *profile_RL.shape, 6, 2
    causal = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    first = np.eye(T)[np.zeros(T, int)]
    sink = profile_RL.reshape(-1, 1, 1, 1)
    weights = np.broadcast_to((1 - sink) * causal + sink * first, (R * L, H, T, T))
    return make_dataset([quantities_of_attention(weights)] * num_sequences, (0, L, R, 0))


def stages(R: int, different: int) -> np.ndarray:
    """A profile over 6 layers in every recurrence, turned upside down in one of them."""
    profile_RL = np.tile([0.1, 0.3, 0.9, 0.6, 0.4, 0.2], (R, 1))
    profile_RL[different] = 1 - profile_RL[different]
    return profile_RL


def test_stages_that_repeat_from_the_second_recurrence_on():
    found = verdict("stages_repeat", attention(stages(5, 0)))
    assert found.answer is True and found.recurrence == 1
    assert found.value == pytest.approx(1)


# 4: the last one, which the others are held against; 3: only the last one itself is left after it
@pytest.mark.parametrize("different, repeats_from", [(1, 2), (2, 3), (3, None), (4, None)])
def test_stages_that_one_recurrence_does_not_repeat(different, repeats_from):
    found = verdict("stages_repeat", attention(stages(5, different)))
    assert found.answer is False
    assert found.value is not None and found.value < 0 < REPEATED_STAGES
    assert found.recurrence == repeats_from


def test_two_recurrences_are_held_against_each_other():
    assert verdict("stages_repeat", attention(stages(2, 0))).answer is False
    same = verdict("stages_repeat", attention(np.tile(stages(2, 0)[1], (2, 1))))
    assert same.answer is True and same.recurrence == 0


def test_a_flat_profile_tells_nothing():
    found = verdict("stages_repeat", attention(np.full((4, 6), 0.3)))
    assert found.answer is None and "flat" in found.detail


def on_a_way(way_R: list[float], name: str = HUB, **settings) -> xr.Dataset:
    """One layer's gaps as given, of states of norm 1."""
    gap = np.tile(np.array(way_R), (7, 1))
    dataset = make_dataset([{"residual_norm": np.ones_like(gap), "gap_norm": gap}], (0, 1, len(way_R), 0))
    plan = dataset.attrs["plan"]
    plan["model"] |= {"name": name, "weights_sha256": "aa"}
    plan["settings"] |= settings
    return dataset


# the window was trained to run once: the state after recurrence 0 is held against the last one
@pytest.mark.parametrize("first, answer", [(0.31, True), (0.32, False)])
def test_a_loop_made_of_a_feedforward_model_is_trained_to_run_once(first, answer):
    found = verdict("stable", on_a_way([first, 0.2, 0.1, 0], loop="4-7x4"))
    assert found.answer is answer and found.value == pytest.approx(first, rel=0.02)
    assert 0.31 < STABLE_GAP < 0.32 and "paper" in found.question.source


def test_a_capture_of_the_models_own_count_says_what_was_trained():
    own, beyond = on_a_way([9, 0]), on_a_way([9, 0.2, 0.4, 0.1, 0], recurrences=5)
    assert "capture again with --recurrences 8" in verdict("stable", own).detail
    assert "beside a capture of the same model" in verdict("stable", beyond).detail
    found = verdict("stable", beyond, own)  # recurrence 1 is the last that was trained: 9 does not count
    assert found.answer is False and found.value == pytest.approx(0.4, rel=0.02) and found.recurrence == 3
    steady = on_a_way([9, 0.2, 0.3, 0.1, 0], recurrences=5)
    assert verdict("stable", steady, own).answer is True


def test_what_was_trained_is_read_from_captures_of_the_same_weights_alone():
    beyond, own = plan_of(on_a_way([9, 0.2, 0], recurrences=3)), plan_of(on_a_way([9, 0]))
    assert trained_count(beyond, [own]) == 2
    assert "beside a capture" in str(trained_count(beyond, [with_weights(own, "bb")]))
    assert "beside a capture" in str(trained_count(with_weights(beyond, None), [with_weights(own, None)]))
    assert "random" in str(trained_count(plan_of(on_a_way([1, 0], name="random:(0,1x2,0)"))))


def with_weights(plan: StoredPlan, weights: str | None) -> StoredPlan:
    return replace(plan, model=replace(plan.model, weights_sha256=weights))


def test_every_verdict_says_its_threshold_where_it_is_from_and_its_figure():
    from looptap.analysis.figures.catalogue import FIGURES

    for verdict in find([contraction(0.5, POINTS, 30)])[0].verdicts:
        each = verdict.question
        assert each.reason and each.source and each.text and np.isfinite(each.threshold)
        assert each.figure in {draw.__name__ for draw in FIGURES}
