"""Two loops one after another: what is measured of each is what is measured of it alone."""

import numpy as np
import pytest
import xarray as xr

from looptap.analysis.analyze import write_analysis
from looptap.analysis.answers.distinctness import distinctness
from looptap.analysis.answers.limits import limits
from looptap.analysis.answers.rates import rates
from looptap.analysis.answers.two_scale import acceleration, two_scale
from looptap.analysis.depth_axis import Depths, depths_of, of_loop
from looptap.analysis.findings import find
from looptap.analysis.measures import MEASURES, measure
from looptap.errors import CannotTellError
from looptap.tests.synthetic import (
    contraction,
    make_dataset,
    one_after_another,
    random_sequences,
    rotation,
    write_store,
)

# loops of unlike sizes, so that neither can be taken for the other: 3 layers 24 times, 2 layers 30 times
FIRST, SECOND = contraction(0.5, 5 * np.eye(3, 8), recurrences=24), rotation(7, recurrences=30, layers=2)


@pytest.fixture(scope="module")
def both() -> xr.Dataset:
    return one_after_another(FIRST, SECOND)


def test_loops_are_rectangles_of_depths(both):
    depths = depths_of(both)
    assert depths.loop_names == ["core", "core2"]
    first_RL, second_RL = depths.loops
    np.testing.assert_array_equal(first_RL, np.arange(72).reshape(24, 3))
    np.testing.assert_array_equal(second_RL, 72 + np.arange(60).reshape(30, 2))
    with pytest.raises(CannotTellError, match="2 loops, core, core2"):
        _ = depths.core_RL


def test_a_loop_inside_a_loops_recurrences_is_a_rectangle_too():
    """Stack 1 runs twice and then stack 2 once, three times over: 1 1 2, 1 1 2, 1 1 2."""
    stage = np.tile([1, 1, 1, 1, 2], 3)
    layer = np.tile([0, 1, 0, 1, 0], 3)
    recurrence = np.concatenate([[2 * r, 2 * r, 2 * r + 1, 2 * r + 1, r] for r in range(3)])
    depths = Depths(stage, layer, recurrence)
    inner_RL, outer_RL = depths.loops
    np.testing.assert_array_equal(inner_RL[:, 0], [0, 2, 5, 7, 10, 12])
    np.testing.assert_array_equal(inner_RL[:, 1], [1, 3, 6, 8, 11, 13])
    np.testing.assert_array_equal(outer_RL, [[4], [9], [14]])
    (later, earlier), (outer_later, outer_earlier) = depths.steps
    np.testing.assert_array_equal(later, [2, 3, 5, 6, 7, 8, 10, 11, 12, 13])
    np.testing.assert_array_equal(earlier, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11])
    np.testing.assert_array_equal(outer_later, [9, 14])
    np.testing.assert_array_equal(outer_earlier, [4, 9])


def test_measures_of_each_loop_are_its_own(both):
    got = measure(both)
    for alone, here in ((FIRST, slice(72)), (SECOND, slice(72, None))):
        wanted = measure(alone)
        for name in MEASURES:
            assert (name in got) == (name in wanted)
            if name in got:
                np.testing.assert_array_equal(got[name].values[:, here], wanted[name].values)
    assert int(got["non_finite"].sum()) == 0


# heads change from one recurrence to the next in each loop, and not from the first loop's end to the second
def test_attention_changes_inside_loops_alone():
    shapes = (0, 2, 4, 0), (0, 3, 5, 0)
    first, second = (make_dataset(random_sequences([5, 7], shape)[0], shape) for shape in shapes)
    both = one_after_another(_by_depth(first), _by_depth(second))
    got = measure(both, ["entropy_change", "received_change"])
    for alone, here in ((first, slice(8)), (second, slice(8, None))):
        for name in ("entropy_change", "received_change"):
            np.testing.assert_array_equal(got[name].values[:, here], measure(alone, [name])[name].values)


@pytest.mark.parametrize("ask", [limits, rates, distinctness])
def test_answers_about_one_loop_are_given_of_each(both, ask):
    with pytest.raises(CannotTellError, match=r"2 loops, core, core2: .*of_loop"):
        ask(both)
    for name, alone in (("core", FIRST), ("core2", SECOND)):
        xr.testing.assert_identical(ask(of_loop(both, name)), ask(alone))


def test_limits_and_rates_of_two_loops_are_those_that_they_were_made_with(both):
    first, second = of_loop(both, "core"), of_loop(both, "core2")
    assert (limits(first)["count"].sel(limit="fixed_point") == 15).all()
    assert (limits(second)["count"].sel(limit="orbit") == 15).all()
    assert (limits(second)["period_count"].sel(period=7) == 15).all()
    np.testing.assert_allclose(rates(first)["rate"].sel(statistic="value"), 0.5, rtol=1e-3)
    np.testing.assert_allclose(rates(second)["rate"].sel(statistic="value"), 1, rtol=1e-3)


@pytest.mark.parametrize("ask", [two_scale, acceleration])
def test_answers_over_depth_hold_all_loops(both, ask):
    got = ask(both)
    for alone, here in ((FIRST, slice(72)), (SECOND, slice(72, None))):
        wanted = ask(alone)
        for name in wanted.data_vars:
            np.testing.assert_array_equal(got[name].values[:, here], wanted[name].values)


def test_no_loop_of_that_name(both):
    with pytest.raises(CannotTellError, match="'core3': choose from core, core2"):
        of_loop(both, "core3")


def test_what_is_by_recurrence_is_not_told_of_several_loops(both):
    lens = both.assign(lens_kl=(("token", "recurrence"), np.zeros((both.sizes["token"], 24))))
    for dataset in (lens, of_loop(lens, "core")):
        assert "several loops" in measure(dataset, ["lens_kl"]).attrs["missing"]["lens_kl"]


def test_findings_and_tables_of_each_loop(both, tmp_path):
    first, second = find([both])
    assert first.label.endswith(" core") and second.label.endswith(" core2")
    assert first.verdicts[0].answer and second.verdicts[0].answer is False
    store = write_store(both, tmp_path / "both.zarr")
    paths = write_analysis(store, tmp_path / "out", table_format="csv", figure_format=())
    assert {path.parent.name for path in paths} == {"core", "core2"}
    assert len({path.name for path in paths}) < len(paths)


def _by_depth(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.drop_vars(
        [name for name, values in dataset.data_vars.items() if "depth" not in values.dims]
    )
