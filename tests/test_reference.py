"""Which feedforward capture a loop is held against, and that the numbers are those of `stage_agreement`."""

import numpy as np
import pytest
import xarray as xr

from looptap.analysis.answers.stages import STAGE_MEASURES, stage_agreement
from looptap.analysis.figures.stage_figures import profiles_beside_the_reference, stages_like_the_reference
from looptap.analysis.findings import find
from looptap.analysis.measures import MEASURES
from looptap.tests.synthetic import make_dataset, random_sequences

LOOP, PLAIN = (1, 5, 3, 1), (9, 0, 0, 0)
LENGTHS = [5, 7, 4]


def capture(shape, name, weights=None, loop=None, data="test.jsonl") -> xr.Dataset:
    dataset = make_dataset(random_sequences(LENGTHS, shape)[0], shape, name=name)
    plan = dataset.attrs["plan"]
    plan["model"]["weights_sha256"] = weights
    plan["settings"]["loop"] = loop
    plan["data"]["name"] = data
    return dataset


def test_all_layers_of_another_model_at_the_same_relative_depth():
    loop, plain = capture(LOOP, "loop", "a"), capture(PLAIN, "plain", "b")
    found, of_plain = find([loop, plain])
    assert isinstance(found.reference, xr.Dataset)
    assert found.reference.attrs["reference"] == of_plain.label
    assert found.reference.attrs["layers"] == "all its layers"
    wanted = stage_agreement(loop, plain)
    assert list(found.reference["measure"]) == list(STAGE_MEASURES)
    for name in ("correlation", "distance"):
        np.testing.assert_array_equal(found.reference[name], wanted[name])
    assert of_plain.reference == "the model has no loop"


def test_the_same_layers_where_a_window_of_the_same_weights_loops():
    loop, other, plain = (
        capture(LOOP, "model", "a", "2-6x3"),
        capture(PLAIN, "other", "b"),
        capture(PLAIN, "model", "a"),
    )
    found = find([loop, other, plain])[0].reference
    assert isinstance(found, xr.Dataset)
    assert found.attrs["layers"] == "the same layers of itself, 2 to 6"
    wanted = stage_agreement(loop, plain, layers=slice(2, 7))
    np.testing.assert_array_equal(found["correlation"], wanted["correlation"])
    assert not np.allclose(wanted["correlation"][0], stage_agreement(loop, plain)["correlation"][0])


# the order in which captures are given decides nothing
@pytest.mark.parametrize("first", [0, 1])
def test_why_there_is_no_reference(first):
    pair = [capture(LOOP, "loop"), capture(PLAIN, "plain", data="other.jsonl")]
    found = find(pair if first == 0 else pair[::-1])
    assert found[first].reference == f"{found[1 - first].label} was captured over other data"
    (alone,) = find(pair[:1])
    assert alone.reference == "no capture of a feedforward model stands beside it"


def test_what_the_reference_lacks_is_named():
    plain = capture(PLAIN, "plain").drop_vars("attention_sink")
    found = find([capture(LOOP, "loop"), plain])[0].reference
    assert isinstance(found, xr.Dataset)
    assert list(found["measure"]) == [name for name in STAGE_MEASURES if name != "sink_score"]
    assert found.attrs["missing"]["sink_score"].startswith("in the reference: ")


def test_the_figure_and_the_verdict_hold_what_was_found():
    findings = find([capture(LOOP, "loop"), capture(PLAIN, "plain")])
    found = findings[0].reference
    figure = stages_like_the_reference(findings)
    (table,) = figure.tables.values()
    for name in STAGE_MEASURES:
        rows = table[table["measure"] == name.replace("_", " ")]
        np.testing.assert_array_equal(rows["value"], found["correlation"].sel(measure=name)[0])
    assert figure.absent == {findings[1].label: "the model has no loop"}
    first, last = found["correlation"].sel(measure="sink_score", statistic="value").values[[0, -1]]
    assert f"sink score {first:.2f} in the first recurrence, {last:.2f} in the last" in figure.caption[1]
    figure.chart().to_dict()  # checked against the Vega-Lite schema
    verdict = next(each for each in findings[0].verdicts if each.question.name == "stages_repeat")
    least = float(found["correlation"].sel(measure="mixing_score", statistic="value").min())
    assert f"beside {findings[1].label} (all its layers) the least of all" in verdict.detail
    assert f"mixing score {least:.2f}" in verdict.detail


def test_profiles_are_drawn_beside_the_reference_at_the_core_s_layers():
    findings = find([capture(LOOP, "loop"), capture(PLAIN, "plain")])
    figure = profiles_beside_the_reference(findings)
    assert [panel.label for panel in figure.panels] == [MEASURES[name].title for name in STAGE_MEASURES]
    (table,) = figure.tables.values()
    plain = findings[1].measures
    for name in STAGE_MEASURES:
        value_RL = findings[0].measures[name].sel(statistic="value").values[1:-1].reshape(3, 5)
        for recurrence in range(3):
            rows = table[table["recurrence"] == recurrence]
            np.testing.assert_array_equal(rows.sort_values("layer")[name], value_RL[recurrence])
        at = (np.arange(5) + 0.5) / 5 * 9 - 0.5  # the middle of each of 5 layers among 9
        wanted_L = np.interp(at, np.arange(9), plain[name].sel(statistic="value").values)
        np.testing.assert_allclose(table[table["recurrence"] == -1].sort_values("layer")[name], wanted_L)
    figure.chart().to_dict()  # checked against the Vega-Lite schema
