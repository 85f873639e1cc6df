"""Figures of limits, rates, maps, settling and repeated stages hold the numbers that the analyses found."""

import numpy as np
import pytest

from looptap.analysis.answers.limits import LIMITS, limits
from looptap.analysis.answers.rates import rates
from looptap.analysis.answers.settling import settling
from looptap.analysis.answers.similarity import residual_similarity
from looptap.analysis.answers.stages import stage_agreement
from looptap.analysis.figures import answer_figures, map_figures, stage_figures
from looptap.analysis.figures.catalogue import FIGURES
from looptap.analysis.findings import find
from looptap.tests.synthetic import RNG_SEED, make_dataset, random_sequences

SHAPE = (1, 5, 26, 1)
DRAWN = ("residual_similarity", "attention_distance", "limits", "rates", "settling", "stages_repeat")


@pytest.fixture(scope="module")
def dataset():
    sequences, _ = random_sequences([5, 7, 4], SHAPE)
    rng, num_depths = np.random.default_rng(RNG_SEED), 2 + 5 * 26
    for sequence in sequences:
        for name in ("residual_similarity", "attention_distance"):
            sequence[name] = rng.uniform(0.2, 1, (1, num_depths, num_depths))
    return make_dataset(sequences, SHAPE)


@pytest.fixture(scope="module")
def findings(dataset):
    return find([dataset])


def table_of(figure):
    (table,) = figure.tables.values()
    return table


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.slow
def test_a_figure_is_a_chart_with_words_and_loads_nothing(findings, name):
    figure = {draw.__name__: draw for draw in FIGURES}[name](findings)
    chart = figure.chart().to_dict()  # checked against the Vega-Lite schema
    assert '"url"' not in str(chart).replace("'", '"') and len(chart["datasets"]) == 1
    assert len(figure.caption) == 2 and findings[0].label in figure.caption[1]


def test_limits_are_drawn_as_found(dataset, findings):
    table, found = table_of(answer_figures.limits(findings)), limits(dataset)
    for _, row in table.iterrows():
        assert row["limit"] == LIMITS[row["order"]].replace("_", " ")
        want = found["share"].sel(layer=row["layer"], limit=LIMITS[row["order"]])
        np.testing.assert_array_equal(row[["value", "low", "high"]].to_numpy(float), want[:3])
    assert len(table) == SHAPE[1] * len(LIMITS)


def test_curves_are_drawn_as_found(dataset, findings):
    table = table_of(answer_figures.rates(findings))
    np.testing.assert_array_equal(table[["value", "low", "high"]].T, rates(dataset)["rate"][:3])
    table = table_of(answer_figures.settling(findings))
    np.testing.assert_array_equal(table[["value", "low", "high"]].T, settling(dataset)["settled"][:3])
    table, found = table_of(stage_figures.stages_repeat(findings)), stage_agreement(dataset)
    for name in found["measure"].values:
        rows = table[table["measure"] == str(name).replace("_", " ")]
        np.testing.assert_array_equal(rows["value"], found["correlation"].sel(measure=name)[0])


def test_a_large_map_is_drawn_as_means_of_its_cells(dataset, findings):
    figure = map_figures.residual_similarity(findings)
    table = table_of(figure)
    whole_DD = residual_similarity(dataset)["residual_similarity"].sel(statistic="value").values
    assert len(whole_DD) > map_figures.MOST_BINS and len(table) == map_figures.MOST_BINS**2
    assert "a cell is the mean of 2 depths or fewer a side" in figure.notes[0]
    edges = set()
    for _, row in table.iloc[::97].iterrows():
        spans = [
            slice(int(row[a] + 0.5), int(row[b] + 0.5))
            for a, b in (("other_from", "other_to"), ("from", "to"))
        ]
        assert row["value"] == pytest.approx(whole_DD[spans[0], spans[1]].mean(), rel=1e-12)
        edges |= {row["from"], row["other_from"]}
    assert len(edges) > 100
    assert table["from"].min() == -0.5 and table["to"].max() == len(whole_DD) - 0.5
    area = (table["to"] - table["from"]) * (table["other_to"] - table["other_from"])
    assert area.sum() == len(whole_DD) ** 2  # no depth twice, none left out


def test_what_cannot_be_drawn_says_why(dataset):
    few, _ = random_sequences([5], (0, 2, 3, 0))
    both = find([dataset, make_dataset(few, (0, 2, 3, 0), name="random:few")])
    figure = answer_figures.limits(both)
    assert len(figure.panels) == 1 and "3 recurrences are too few" in figure.absent[both[1].label]
    assert answer_figures.limits(both[1:]) is None
