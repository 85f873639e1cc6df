"""The report, the tables and the pictures: self-contained, complete, right, drawn without an error."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from looptap.analysis.analyze import write_analysis
from looptap.analysis.depth_tables import long_table
from looptap.analysis.figures.axes import log_ticks, value_domain
from looptap.analysis.figures.catalogue import FIGURES
from looptap.analysis.figures.convergence_figures import distance_to_the_fixed_point, steps
from looptap.analysis.figures.stage_figures import profiles_beside_the_reference, stages_like_the_reference
from looptap.analysis.figures.words import number
from looptap.analysis.findings import Findings, find
from looptap.analysis.measures import MEASURES, measure
from looptap.analysis.pages.report import write_report
from looptap.errors import FormatError, NothingCapturedError
from looptap.tests.pages import CHROMIUM, Page, open_in_browser
from looptap.tests.synthetic import (
    ATTENTION,
    RESIDUAL,
    RNG_SEED,
    SHAPE,
    contraction,
    make_dataset,
    random_sequences,
    write_store,
)

NAMES = {draw.__name__ for draw in FIGURES}
BESIDE = {draw.__name__ for draw in (stages_like_the_reference, profiles_beside_the_reference)}


def capture(**more) -> xr.Dataset:
    sequences, states = random_sequences([5, 6, 4], SHAPE)
    return make_dataset(sequences, SHAPE, states=states, **more)


def whole_capture() -> xr.Dataset:
    """A capture of all that can be captured, with recurrences enough for every figure."""
    shape = (1, 4, 12, 1)  # four layers have profiles that can be compared, twelve recurrences limits
    sequences, states = random_sequences([5, 6, 4], shape)
    num_depths = sequences[0]["residual_norm"].shape[1]
    maps = np.random.default_rng(RNG_SEED).uniform(0.2, 1, (2, 1, num_depths, num_depths))
    all_pairs = dict(zip(("residual_similarity", "attention_distance"), maps, strict=True))
    dataset = make_dataset([each | all_pairs for each in sequences], shape, states=states)
    blocks = [
        {"stage": stage, "layer": layer, "num_neurons": 9, "prediction": 0.3, "suppression": 0.1,
         "kurtosis": [3.0, 20.0]}
        for stage, layer in [("prelude", 0), *(("core", layer) for layer in range(4)), ("coda", 0)]
    ]  # fmt: skip
    told = {"threshold": 10.0, "quantiles": [0.5, 1.0], "blocks": blocks}
    dataset.attrs["plan"]["model"]["neurons"] = told
    return dataset


def feedforward() -> xr.Dataset:
    sequences, _ = random_sequences([5, 6], (4, 0, 0, 0))
    kept = [{k: v for k, v in s.items() if k in RESIDUAL + ATTENTION} for s in sequences]
    return make_dataset(kept, (4, 0, 0, 0), name="hub/Plain-1B")


def page_of(tmp_path: Path, *stores, **more) -> Page:
    return Page(write_report(stores, tmp_path / "report.html", **more).read_text())


@pytest.mark.slow
def test_report_holds_every_figure_and_loads_nothing(tmp_path):
    store = write_store(whole_capture(), tmp_path / "one.zarr")
    path = write_report([store, feedforward()], tmp_path / "deep" / "report.html")
    text = path.read_text()
    page = Page(text)
    assert page.loads == []
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert page.ids >= NAMES
    specs = page.json(**{"class": "spec"})
    assert len(specs) == len([i for i in page.ids if re.fullmatch(rf"({'|'.join(NAMES)})-\d+", i)])
    assert '"url"' not in json.dumps(specs)
    assert path.stat().st_size < 5e6


@pytest.mark.slow
def test_every_panel_finds_its_table_and_columns(tmp_path):
    page = page_of(tmp_path, capture(), contraction(0.5, 5 * np.eye(3, 8)), feedforward())
    (tables,) = page.json(id="tables")
    for spec in page.json(**{"class": "spec"}) + page.json(**{"class": "instead"}):
        table = tables[spec["table"]]
        lengths = {len(table[column]) for column in spec["columns"]}
        assert len(lengths) == 1 and lengths.pop() > 0
        fields = set(re.findall(r'"field":"(\w+)"', json.dumps(spec["spec"], separators=(",", ":"))))
        own = {"from", "to", "at", "text", "name"}  # of the inline data behind a plot: stages and thresholds
        own |= {"head_from", "head_to"}  # ends of cells, reckoned in the plot
        assert fields - own <= set(spec["columns"])


@pytest.mark.slow
def test_embedded_numbers_are_the_measured_ones(tmp_path):
    dataset = capture()
    (tables,) = page_of(tmp_path, dataset).json(id="tables")
    (name,) = (name for name in tables if name.startswith("capture "))
    got = np.array(tables[name]["mixing_score"], float)
    np.testing.assert_allclose(got, measure(dataset)["mixing_score"].sel(statistic="value"), rtol=1e-6)
    assert tables[name]["relative_step"][0] is None  # the prelude has no step: no number, never a zero


@pytest.mark.slow
def test_several_captures_stand_side_by_side(tmp_path):
    stores = [capture(), contraction(0.5, 5 * np.eye(3, 8), 30), feedforward()]
    page = page_of(tmp_path, *stores, title="Three <kinds>")
    text = " ".join(page.text)
    assert "Three <kinds>" in text and text.count("Plain-1B") > 5
    assert "Not drawn for Plain-1B" in text and "the model has no loop" in text
    drawn = {draw.__name__: draw(find(stores)) for draw in FIGURES}
    assert drawn["stages_by_depth"].columns == 2  # the contraction has no attention
    specs = [p.chart(hover=False).to_dict() for p in drawn["steps"].panels]
    domains = {json.dumps(d) for spec in specs[:2] for d in y_domains(spec)}
    assert len(domains) == 1  # one axis for all captures of a row


def y_domains(spec: dict) -> list:
    scales = [layer["encoding"]["y"].get("scale", {}) for layer in spec["layer"] if "y" in layer["encoding"]]
    return [scale["domain"] for scale in scales if "domain" in scale]


def caption_of(draw, found: Findings) -> Sequence[str]:
    figure = draw([found])
    assert figure is not None
    return figure.caption


@pytest.mark.slow
def test_verdicts_and_captions_carry_the_numbers_of_the_data(tmp_path):
    stores = [contraction(0.5, 5 * np.eye(3, 8), 24), contraction(1.02, 5 * np.eye(3, 8), 24)]
    first, second = find(stores)
    assert first.label != second.label
    text = re.sub(r"\s+", " ", " ".join(page_of(tmp_path, *stores).text))
    assert text.count(" yes ") >= 2 and " no " in text and " cannot tell " in text
    value = first.verdicts[0].value
    assert (
        value is not None
        and number(value) in text
        and f"from recurrence {first.verdicts[0].recurrence}" in text
    )
    step = first.measures["relative_step"].sel(statistic="value").values[first.depths.core_RL]
    course = caption_of(steps, first)[1]
    assert f"falls from {number(step[1].max())} of the norm at recurrence 1" in course
    assert f"to {number(step[-1].max())} at recurrence 23" in course
    distance = caption_of(distance_to_the_fixed_point, first)[1]
    assert "divides the distance by 2" in distance  # the contraction's rate is one half


@pytest.mark.slow
def test_a_label_cannot_break_out_of_the_page(tmp_path):
    page = page_of(tmp_path, capture(name="hub/</script><b>x&y"))
    assert "b" not in page.tags
    assert any("</script><b>x&y" in text for text in page.text)
    assert len(page.json(id="tables")) == 1


@pytest.mark.slow
def test_an_unfinished_store_with_missing_quantities_is_reported_as_such(tmp_path):
    sequences, _ = random_sequences([5, 6, 4], SHAPE)
    part = [{k: v for k, v in s.items() if k not in ("attention_sink", "gap_norm")} for s in sequences]
    part[0]["residual_norm"][2, 3] = np.nan
    dataset = make_dataset(part, SHAPE, unit_sequences=1)
    text = " ".join(page_of(tmp_path, write_store(dataset, tmp_path / "part.zarr", units=[0, 2])).text)
    assert "2 of 3: unfinished" in text
    assert "capture again with --quantities attention" in re.sub(r"\s+", " ", text)
    assert "no states are kept" in text
    assert "1 non-finite values are left out" in text


def test_errors_of_a_user(tmp_path):
    with pytest.raises(ValueError, match="no store was given"):
        write_report([], tmp_path / "r.html")
    empty = write_store(capture(), tmp_path / "empty.zarr", units=[])
    with pytest.raises(NothingCapturedError, match="0 of 2 units are done"):
        write_report([empty], tmp_path / "r.html")
    with pytest.raises(OSError, match=r"nothing\.zarr"):
        write_report([tmp_path / "nothing.zarr"], tmp_path / "r.html")
    with pytest.raises(FormatError, match="'xls' is not a table format: choose parquet or csv"):
        write_analysis(capture(), tmp_path / "out", table_format="xls")
    with pytest.raises(FormatError, match="'pdf' is not a figure format: choose png or svg"):
        write_analysis(capture(), tmp_path / "out", figure_format=("pdf",))
    assert not (tmp_path / "out").exists() and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("table_format", ["parquet", "csv"])
def test_analysis_writes_every_table(tmp_path, table_format):
    dataset = capture()
    paths = write_analysis(dataset, tmp_path, table_format, figure_format=())
    read = pd.read_parquet if table_format == "parquet" else pd.read_csv
    tables = {path.stem: read(path) for path in paths}
    assert {"measures", "verdicts", "non_finite", "trajectory", "distinctness", "cycle"} <= set(tables)
    pd.testing.assert_frame_equal(tables["measures"], long_table(measure(dataset)), check_dtype=False)
    assert len(tables["verdicts"]) == 5 and len(tables["non_finite"]) == 0
    assert len(tables["trajectory"]) == 3 * SHAPE[1] * SHAPE[2]
    assert len(tables["trajectories_position"]) == 3 * 3 * SHAPE[1] * SHAPE[2]


@pytest.mark.slow
def test_analysis_draws_every_figure(tmp_path):
    paths = write_analysis(whole_capture(), tmp_path)
    pictures = {path.name: path.read_bytes() for path in paths if path.suffix in (".png", ".svg")}
    assert set(pictures) == {f"{name}.{kind}" for name in NAMES - BESIDE for kind in ("png", "svg")}
    for name, data in pictures.items():
        assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data
    assert b"Mixing score (nat)" in pictures["stages_by_depth.svg"]
    assert b"core" in pictures["stages_by_depth.svg"] and b"recurrence" in pictures["steps.svg"]
    assert b"http" not in re.sub(rb'xmlns(:\w+)?="[^"]*"', b"", pictures["steps.svg"])


# every subset of what can be missing must still make a page; one group at a time and one group alone
@pytest.mark.parametrize(
    "kept", [RESIDUAL, ATTENTION, ("step_norm",), ("gap_norm", "residual_norm"), ("state",)]
)
@pytest.mark.slow
def test_any_choice_of_quantities_makes_a_page(tmp_path, kept):
    sequences, states = random_sequences([5, 6], SHAPE)
    some = kept if kept != ("state",) else ("residual_peak",)
    dataset = make_dataset(
        [{k: v for k, v in s.items() if k in some} for s in sequences],
        SHAPE,
        states=states if kept == ("state",) else None,
    )
    page = page_of(tmp_path, dataset)
    assert page.json(**{"class": "spec"}) or kept == ("step_norm",)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 1, 1, 0),
        pytest.param((0, 1, 2, 0), marks=pytest.mark.full),
        pytest.param((0, 2, 2, 0), marks=pytest.mark.full),
        (1, 3, 1, 2),
        pytest.param((0, 20, 60, 0), marks=pytest.mark.full),
    ],
)
@pytest.mark.slow
def test_small_and_large_loops_make_a_page(tmp_path, shape):
    sequences, states = random_sequences([3], shape, heads=1)
    dataset = make_dataset(sequences, shape, states=states)
    (found,) = find([dataset])
    for draw in FIGURES:
        figure = draw([found])
        if figure is not None:
            figure.chart().to_dict()  # checked against the Vega-Lite schema
            assert figure.caption
    assert page_of(tmp_path, dataset).json(**{"class": "spec"})


@pytest.mark.slow
def test_nothing_finite_still_makes_a_page(tmp_path):
    sequences, _ = random_sequences([5, 6], SHAPE)
    undefined = {"f": np.nan, "i": -1}
    broken = [{k: np.full_like(v, undefined[v.dtype.kind]) for k, v in s.items()} for s in sequences]
    (found,) = find([make_dataset(broken, SHAPE)])
    assert [verdict.answer for verdict in found.verdicts] == [None] * 5
    page_of(tmp_path, make_dataset(broken, SHAPE))


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.98765, "0.988"), (2.84e-7, "2.8e-7"), (3e-4, "3e-4"), (123456, "1.2e5"), (np.nan, "none")],
)
def test_numbers_in_sentences(value, text):
    assert number(value) == text


def test_axes():
    assert log_ticks(2e-8, 1.5) == [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert log_ticks(0.7, 12) == [1, 2, 5, 10]
    assert len(log_ticks(1e-30, 1)) <= 9
    low, high = value_domain([np.array([1.0, 3.0, np.nan])], [np.array([0.5, 3.5])], log=False)
    assert 0 <= low < 0.5 and 3.5 < high < 4
    low, high = value_domain([np.array([0.0, 1e-3, 1.0])], [], log=True, marks=[1e-5])
    assert 1e-6 < low < 1e-5 and 1 < high < 2
    low, high = value_domain([np.zeros(4)], [], log=False)
    assert low == 0 and high > 0  # a share is never shown below zero
    assert value_domain([np.array([np.nan])], [], log=False) == (0, 1)


def test_every_measure_has_a_unit_and_a_definition():
    assert all(each.unit and each.definition and each.title for each in MEASURES.values())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_in_a_browser_without_an_error(tmp_path, width):
    path = write_report(
        [capture(), contraction(0.5, 5 * np.eye(3, 8), 30), feedforward()], tmp_path / "r.html"
    )
    page = Page(path.read_text())
    said, data = open_in_browser(path, width, tmp_path)
    assert not said
    assert int(data["drawn"]) == len(page.json(**{"class": "spec"})) > 20
    assert int(data["needed"]) <= int(data["width"]) and width - 20 <= int(data["width"]) <= width
    assert int(data["resources"]) == 0
