"""The architecture study: a grid of ordinary captures, and numbers equal to their direct definitions."""

import os
import re
import shutil
import signal
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import looptap
from looptap.analysis.findings import find
from looptap.analysis.studies.architecture_axes import near_the_paper
from looptap.analysis.studies.architecture_page import write_architecture_study
from looptap.analysis.studies.architecture_study import (
    DISTANCES_AFTER,
    ArchitectureStudy,
    architecture_study,
)
from looptap.analysis.studies.boundary import boundary_table, find_crossing
from looptap.capture.models.random_spec import RandomModel
from looptap.capture.plan import Plan, make_plan
from looptap.capture.run import Outcome, run_capture
from looptap.capture.settings import ArchitectureStudySettings
from looptap.capture.store.cell import AXES
from looptap.capture.studies import estimate
from looptap.capture.studies.architecture import architecture_plans, cells_of, run_architecture_study
from looptap.cli import study_progress
from looptap.cli.entry import main
from looptap.cli.study_progress import run_all_with_progress, to_duration
from looptap.errors import ArchitectureError
from looptap.tests.pages import CHROMIUM, Page, open_in_browser

pytestmark = pytest.mark.slow

# width 16 has one head of 16 channels; 40 recurrences: 32 exist and 101 do not
TINY = {"norms": ("pre", "ouro"), "layers": (2, 3), "recurrences": (40,), "widths": (16,), "seeds": (0, 1)}
GAINS, STDS, WIDTHS = (0.2, 0.6, 1.8), (0.1, 1.0), (16, 32)
SCALES = {
    "norms": ("pre",),
    "injection": ("yes",),
    "layers": (2,),
    "recurrences": (40,),
    "gains": GAINS,
    "embedding_stds": STDS,
    "widths": WIDTHS,
    "seeds": (0, 1),
}


def settings_in(directory: Path, **changes) -> ArchitectureStudySettings:
    return ArchitectureStudySettings(**{"out": directory / "study", "limit": 2, **TINY, **changes})


def run_all(plans) -> list[Outcome]:
    return [run_capture(plan) for plan in plans]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Path]:
    """Stores of a grid like the paper's."""
    captured = run_architecture_study(settings_in(tmp_path_factory.mktemp("paper")), run_all)
    assert captured.complete
    return list(captured.stores)


@pytest.fixture(scope="module")
def study(stores) -> ArchitectureStudy:
    return architecture_study(stores)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> list[Path]:
    """Stores of a grid of scales."""
    captured = run_architecture_study(settings_in(tmp_path_factory.mktemp("scales"), **SCALES), run_all)
    return list(captured.stores)


@pytest.fixture(scope="module")
def written(stores, scaled, tmp_path_factory) -> dict[str, list[Path]]:
    """What is written of both grids."""
    return {
        name: write_architecture_study(captured, tmp_path_factory.mktemp(name))
        for name, captured in (("paper", stores), ("scales", scaled))
    }


def test_the_default_grid_is_the_papers():
    cells = list(cells_of(ArchitectureStudySettings(out=Path("out"))))
    assert len(cells) == len({cell.name for cell in cells}) == 3 * 2 * 3 * 3
    assert {(cell.recurrences, cell.width, cell.gain, cell.embedding_std) for cell in cells} == {
        (128, 256, 0.32, 1.0)
    }
    assert cells[0].name == "pre-injection-4x128-width256-gain0.32-embedding1-seed0"
    assert cells[-1].name == "ouro-no-injection-16x128-width256-gain0.32-embedding1-seed2"
    assert (
        cells[-1].spec(64)
        == "random:(0,16x128,0),norm=ouro,width=256,heads=4,gain=0.32,embedding_std=1,seed=2"
    )


@pytest.mark.parametrize(
    ("width", "head_width", "heads"), [(16, 64, 1), (64, 64, 1), (192, 64, 3), (48, 8, 6)]
)
def test_heads_keep_their_width(width, head_width, heads, tmp_path):
    (plan, *_) = architecture_plans(settings_in(tmp_path, widths=(width,), head_width=head_width))
    d = plan.description
    assert (d.num_heads, d.head_width, d.width) == (heads, min(width, head_width), width)


def test_every_cell_is_an_ordinary_capture(tmp_path):
    settings = settings_in(tmp_path, gains=(0.1, 1e-7), embedding_stds=(2.5,))
    for cell, plan in zip(cells_of(settings), architecture_plans(settings), strict=True):
        assert make_plan(plan.settings).stored().hash == plan.stored().hash
        assert isinstance(plan.source.origin, RandomModel)
        d, options = plan.description, plan.source.origin.options
        assert (d.block.norm, d.injection is not None) == (cell.norm, cell.injection)
        assert (d.prelude, d.core, d.recurrences, d.coda) == (0, cell.layers, cell.recurrences, 0)
        assert (options.gain, options.embedding_std, options.seed) == (cell.gain, 2.5, cell.seed)
        assert plan.settings.measure.seed == cell.seed
        assert Path(plan.store) == settings.out / f"{cell.name}.zarr"
        core = np.arange(d.depth).reshape(cell.recurrences, cell.layers)
        assert plan.state_depths == tuple(core[-1]) and plan.slots.num_units == 1
        assert plan.slots.unit_tokens == plan.dataset.num_tokens  # no padding in hundreds of stores


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norms": ()}, "--norms has no value; give at least one"),
        ({"embedding_stds": ()}, "--embedding-stds has no value"),
        ({"gains": (0.32, 1.0, 0.32)}, "--gains has 0.32 twice; give each once"),
        ({"seeds": (3, 3)}, "--seeds has 3 twice"),
        ({"injection": ("yes", "yes")}, "--injection has yes twice"),
        ({"norms": ("pre", "batch")}, "norm=batch is not known; choose one of pre, ouro, huginn, olmo2"),
        ({"widths": (64, 100)}, "--widths has 100, which heads of 64 channels do not divide"),
        ({"widths": (15,)}, "even head width, got 15"),
        ({"widths": (0,)}, "width=0 must be positive"),
        ({"head_width": 7}, "--head-width must be an even number from 2, got 7"),
        ({"layers": (4, 0)}, "at least 1 layer, and --layers has 0"),
        ({"recurrences": (1, 8)}, "from one recurrence to the next, which takes 2, and --recurrences has 1"),
        ({"gains": (0.0,)}, "gain=0 must be positive and finite"),
        ({"gains": (float("nan"),)}, "gain=nan must be positive and finite"),
        ({"seeds": (-1,)}, "seed must be from 0 to 2**63 - 1, got -1"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"data": Path("absent.txt")}, "absent.txt"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(changes, said, tmp_path):
    def run(plans):
        raise AssertionError("ran")

    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        run_architecture_study(settings_in(tmp_path, **changes), run)
    assert not (tmp_path / "study").exists()


def test_a_store_of_another_plan_is_found_before_anything_runs(tmp_path, files):
    """The last of the stores, so that a study that looked at one after the other would have begun."""
    settings = settings_in(tmp_path, norms=("ouro",), injection=("no",), layers=(3,), seeds=(1,), limit=1)
    run_architecture_study(settings, run_all)
    before = files(tmp_path)

    def run(plans):
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=r"seed1.zarr was begun with another plan[\s\S]*another --out"):
        run_architecture_study(settings_in(tmp_path), run)
    assert files(tmp_path) == before


def test_too_small_a_disk_is_found_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("looptap.capture.store.places.directory.LocalPlace.free_bytes", lambda self: 10_000)
    with pytest.raises(ValueError, match=r"need up to [\d.,]+ MiB more and its disk has 0.0 MiB free"):
        run_architecture_study(settings_in(tmp_path), run_all)
    assert not (tmp_path / "study").exists()


def test_the_same_study_goes_on_where_it_stopped_and_grows(tmp_path, files):
    settings = settings_in(tmp_path, norms=("pre",), layers=(2,))
    done: list[Outcome] = []

    def stops_after_two(plans):
        for plan in plans[:2]:
            done.append(run_capture(plan))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_architecture_study(settings, stops_after_two)
    before = files(settings.out)

    def again(plans):
        done[:] = run_all(plans)
        return done

    assert run_architecture_study(settings, again).complete
    assert [outcome.num_resumed for outcome in done] == [1, 1, 0, 0]
    after = files(settings.out)
    data = [path for path in before if "/.looptap" not in path and Path(path).is_file()]
    assert data and all(after[path] == before[path] for path in data)
    more = settings_in(tmp_path, norms=("pre",), layers=(2,), seeds=(0, 1, 7))
    assert len(run_architecture_study(more, again).stores) == 6
    assert [outcome.num_resumed for outcome in done] == [1, 1, 0, 1, 1, 0]


def test_progress_is_one_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_progress, "LINE_S", 0.0)
    settings = settings_in(tmp_path, norms=("pre",), layers=(2,))
    plans = architecture_plans(settings)
    run_capture(plans[0])
    assert all(outcome.complete for outcome in run_all_with_progress(plans))
    said = capsys.readouterr().err
    tokens = sum(map(len, plans[0].dataset.rows))
    assert "4, 1 of them there" in said and f"2 sequences, {tokens} tokens" in said
    assert "at least" in said and " on cpu" in said and "disk" in said
    lines = re.findall(r"(\d) of 4 captures, (\S+) left: (\S+)", said)
    assert [line[0] for line in lines] == ["2", "3", "4"] and lines[-1][1] == "0:00:00"
    assert lines[0][2] == "pre-injection-2x40-width16-gain0.32-embedding1-seed1"
    assert "4 of 4 captures are complete, 1 of them before" in said


def test_ctrl_c_ends_between_captures_and_the_same_command_goes_on(tmp_path, monkeypatch):
    plans = architecture_plans(settings_in(tmp_path, norms=("pre",), layers=(2,)))

    def run_and_ask(plan: Plan, on_event, goes_on) -> Outcome:
        outcome = run_capture(plan, on_event, goes_on)
        if plan is plans[1]:
            os.kill(os.getpid(), signal.SIGTERM)  # as a job is told that its time is over
        return outcome

    monkeypatch.setattr(study_progress, "run_capture", run_and_ask)
    with pytest.raises(KeyboardInterrupt):
        run_all_with_progress(plans)
    assert [Path(plan.store).exists() for plan in plans] == [True, True, False, False]
    monkeypatch.setattr(study_progress, "run_capture", run_capture)
    assert [outcome.num_resumed for outcome in run_all_with_progress(plans)] == [1, 1, 0, 0]


def test_expected_time_goes_by_block_invocations(tmp_path, monkeypatch):
    plans = architecture_plans(settings_in(tmp_path, norms=("pre",), widths=(16, 32), layers=(2, 4)))
    monkeypatch.setattr(estimate, "_time_a_block", lambda plan: 0.01 * plan.description.width)
    expected = estimate.expected_seconds(plans)
    assert len(expected) == len(plans)
    for plan in plans:
        seconds = 0.01 * plan.description.width * 40 * plan.description.core
        assert expected[str(plan.store)] == pytest.approx(seconds)
    said = [to_duration(seconds) for seconds in (0.034, 42.4, 300, 1234, 9000)]
    assert said == ["0.034 seconds", "42 seconds", "5 minutes", "21 minutes", "2.5 hours"]


def worst_medians(dataset: xr.Dataset, above: str) -> np.ndarray:
    """Exact median over tokens of a distance over the norm, in the slowest layer, [recurrence]."""
    filled = dataset.token_sequence.values >= 0
    R, L = int(dataset.recurrence.max()) + 1, int(dataset.layer.max()) + 1
    above_TRL, norm_TRL = (
        dataset[name].values[filled].astype(float).reshape(-1, R, L) for name in (above, "residual_norm")
    )
    below_TRL = norm_TRL if above == "step_norm" else norm_TRL[:, -1:]
    return np.median(above_TRL / below_TRL, axis=0).max(axis=1)


def least_cosine(dataset: xr.Dataset) -> float:
    """Least cosine between any two layers, over the last tokens of all sequences."""
    x_SLD = dataset["state"].values.astype(float)
    unit_SLD = x_SLD / np.linalg.norm(x_SLD, axis=-1, keepdims=True)
    return np.einsum("sld,smd->slm", unit_SLD, unit_SLD).mean(axis=0).min()


def test_captures_are_their_direct_definitions(stores, study):
    assert len(study.captures) == len(stores) == 16
    for store, row in zip(stores, study.captures.to_dict("records"), strict=True):
        dataset = looptap.open(store)
        distance_R, last_step = worst_medians(dataset, "gap_norm"), worst_medians(dataset, "step_norm")[-1]
        assert row["last_step"] == pytest.approx(last_step, rel=0.04)  # bins of 1/64 decade
        for times in DISTANCES_AFTER[:3]:
            assert row[f"distance_after_{times}"] == pytest.approx(distance_R[times - 1], rel=0.04)
        assert np.isnan(row["distance_after_101"])
        assert row["least_cosine"] == pytest.approx(least_cosine(dataset), rel=1e-5)
        name = f"{row['norm']}-{'injection' if row['injection'] else 'no-injection'}-{row['layers']}x40"
        assert store.name == f"{name}-width16-gain0.32-embedding1-seed{row['seed']}.zarr"


def test_verdicts_are_those_of_the_capture_s_own_report(stores, study):
    for findings, row in zip(find(stores[::5]), study.captures.to_dict("records")[::5], strict=True):
        said = {verdict.question.name: verdict for verdict in findings.verdicts}
        assert row["converged"] is said["converged"].answer and row["distinct"] is said["distinct"].answer
        assert row["last_step"] == said["converged"].value
        assert row["least_cosine"] == said["distinct"].value
    answers = study.captures["converged"]
    assert any(answer is True for answer in answers) and any(answer is False for answer in answers)


def test_injection_makes_pre_norm_converge_to_points_of_its_layers_own(study):
    """The paper's section 4.2 in small."""
    rows = study.combinations.set_index(["norm", "injection", "layers"])
    for layers in (2, 3):
        with_it, without = rows.loc[("pre", True, layers)], rows.loc[("pre", False, layers)]
        assert with_it["converged"] == with_it["distinct"] == with_it["told_apart"] == with_it["seeds"] == 2
        assert with_it["distance_after_32"] < 1e-5 and with_it["fixed_point"] == 1
        assert without["converged"] == 0 and without["least_cosine"] > with_it["least_cosine"]


def test_combinations_are_over_seeds(study):
    assert study.combinations[AXES].drop_duplicates().shape == (8, len(AXES))
    for row in study.combinations.to_dict("records"):
        same = np.all([study.captures[name] == row[name] for name in AXES], axis=0)
        captures = study.captures[same]
        assert sorted(captures["seed"]) == [0, 1] and row["seeds"] == 2
        assert row["converged"] == sum(answer is True for answer in captures["converged"])
        assert row["told_apart"] == sum(answer is not None for answer in captures["distinct"])
        for name in ("last_step", "distance_after_8", "least_cosine"):
            values = captures[name].to_numpy()
            np.testing.assert_allclose(row[name], np.median(values), rtol=1e-12)
            assert (row[f"{name}_low"], row[f"{name}_high"]) == (values.min(), values.max())


def test_distances_are_every_recurrence_but_the_last(stores, study):
    curves = [worst_medians(looptap.open(store), "gap_norm")[:-1] for store in stores[:2]]
    assert list(study.captures["seed"][:2]) == [0, 1]
    here = study.distances.iloc[:39]
    assert here["recurrence"].tolist() == list(range(39)) and len(study.distances) == 8 * 39
    np.testing.assert_allclose(here["distance"], np.mean(curves, axis=0), rtol=0.04)  # the median of two
    np.testing.assert_allclose(here["distance_low"], np.min(curves, axis=0), rtol=0.04)
    np.testing.assert_allclose(here["distance_high"], np.max(curves, axis=0), rtol=0.04)


def test_stores_that_are_no_study_are_refused(stores):
    datasets = [looptap.open(store) for store in stores[:2]]
    with pytest.raises(ArchitectureError, match="no store was given"):
        architecture_study([])
    with pytest.raises(ArchitectureError, match=r"two captures of norm pre, .* gain 0.32, .* seed 0"):
        architecture_study([datasets[0], datasets[0]])
    unfinished = datasets[1].assign_coords(unit_done=datasets[1].unit_done * 0)
    with pytest.raises(ArchitectureError, match="lacks step_norm and gap_norm"):
        architecture_study([datasets[0].drop_vars(["step_norm", "gap_norm"])])
    with pytest.raises(ArchitectureError, match="units of a capture are missing"):
        architecture_study([datasets[0], unfinished])
    plan = datasets[1].attrs["plan"]
    other = datasets[1].assign_attrs(plan=plan | {"data": plan["data"] | {"name": "other", "sha256": "1"}})
    with pytest.raises(ArchitectureError, match=r"the data differ: demo_prompts\.jsonl, other"):
        architecture_study([datasets[0], other])
    trained = datasets[1].assign_attrs(plan=plan | {"model": plan["model"] | {"spec": "ORG/NAME"}})
    with pytest.raises(ArchitectureError, match="ORG/NAME is no model of an architecture study"):
        architecture_study([trained])


def test_a_crossing_is_exact_where_steps_are_a_power_of_the_gain():
    gain_G = np.array([0.1, 0.2, 0.5, 1.0])
    found = find_crossing(gain_G, 1e-3 * (gain_G / 0.3) ** 4)
    assert found.gain == pytest.approx(0.3, rel=1e-12)
    assert (found.low, found.high, found.changes) == (0.2, 0.5, 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1e-7, 1e-6, 1e-4], (np.inf, 4.0, np.inf, 0)),
        ([1e-2, 1.0, 1.0], (0.0, 0.0, 1.0, 0)),
        ([1e-2, 1e-6, 1.0], (0.0, 0.0, 1.0, 2)),  # an island is no boundary
        ([1e-4, 1e-2, 1e-6], (2**0.5, 1.0, 2.0, 2)),  # half way in the logarithm of both
        ([1e-3, 1e-1, 1.0], (1.0, 1.0, 2.0, 1)),  # a step at the threshold converges
        ([np.nan, 1e-4, 1e-2], (8**0.5, 2.0, 4.0, 1)),
        ([0.0, 1e-3 * 1e-3 * 2**23, 1.0], (2**0.5, 1.0, 2.0, 1)),  # 0 counts as rounding, 2**-23
    ],
)
def test_crossings_of_known_steps(steps, expected):
    np.testing.assert_allclose(
        find_crossing(np.array([1.0, 2.0, 4.0]), np.array(steps)), expected, rtol=1e-12
    )


def test_no_step_that_is_a_number_is_no_crossing():
    with pytest.raises(ValueError, match="no last step is a number at the gains 1, 2"):
        find_crossing(np.array([1.0, 2.0]), np.array([np.nan, np.nan]))


def made_captures(crossings: dict[tuple[float, int], float]) -> pd.DataFrame:
    """Captures whose last step crosses the threshold where it is told to, by (embedding std, seed)."""
    gains = (4.0, 1.0, 0.5, 2.0)  # in no order
    rows = [
        {"norm": "pre", "injection": True, "layers": 2, "recurrences": 9, "width": 16, "gain": gain,
         "embedding_std": std, "seed": seed, "last_step": 1e-3 * (gain / at) ** 2}
        for gain, ((std, seed), at) in product(gains, crossings.items())
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_boundary_is_over_seeds():
    at = {
        (0.1, 0): 0.3,
        (0.1, 1): 0.6,
        (0.1, 2): 1.2,
        (1.0, 0): 1.5,
        (1.0, 1): 1.6,
        (3.0, 0): 3.0,
        (3.0, 1): 9.0,
    }
    first, second, third = boundary_table(made_captures(at)).to_dict("records")
    assert first["critical_gain"] == pytest.approx(0.6) and np.isnan(first["critical_gain_low"])
    assert first["critical_gain_high"] == pytest.approx(1.2)
    assert (first["seeds"], first["inside"], first["below"], first["above"]) == (3, 2, 1, 0)
    assert (first["bracket_low"], first["bracket_high"]) == (0.0, 2.0)
    assert second["critical_gain"] == pytest.approx((1.5 * 1.6) ** 0.5)
    assert (second["bracket_low"], second["bracket_high"], second["changes"]) == (1.0, 2.0, 1)
    assert np.isnan(third["critical_gain"]) and third["critical_gain_low"] == pytest.approx(3.0)
    assert (third["inside"], third["above"], third["bracket_high"]) == (1, 1, np.inf)
    lone = made_captures(at).query("gain == 2")
    assert boundary_table(pd.DataFrame(lone)).empty


def test_a_figure_takes_what_is_nearest_to_the_paper():
    table = pd.DataFrame(
        list(product((2, 9, 40), (0.1, 0.5, 2.0), (64,))), columns=["layers", "gain", "width"]
    )
    chosen, said = near_the_paper(table, ["layers", "width"])
    assert chosen["layers"].unique().tolist() == [9] and len(chosen) == 3 and said == "; at layers 9"
    chosen, said = near_the_paper(table, ["layers", "gain", "width"])
    assert chosen.values.tolist() == [[9, 0.5, 64]] and said == "; at layers 9, gain 0.5"


def test_the_page_holds_every_combination(study, written):
    paths = written["paper"]
    assert all(path.stat().st_size for path in paths) and paths[-1].name == "report.html"
    figures = {f"distance_by_recurrence.{end}" for end in ("png", "svg")}
    tables = {"captures.csv", "combinations.csv", "distances.csv"}
    assert {path.name for path in paths} == {*figures, *tables, "report.html"}
    table = pd.read_csv(paths[-1].with_name("combinations.csv"))
    np.testing.assert_allclose(table["last_step"], study.combinations["last_step"], rtol=1e-6)
    page = Page(paths[-1].read_text())
    assert page.loads == [] and {"combinations", "distance_by_recurrence"} <= page.ids
    assert not {"boundary", "convergence_map"} & page.ids
    text = " ".join(" ".join(page.text).split())
    assert text.count("2 of 2") >= 2 * 2 and "Random initialisation: 8 architectures" in text
    converged = sum(a is True for a in study.captures.query("norm == 'pre' and injection")["converged"])
    assert f"pre, injection: {converged} of 4 captures converge" in text
    assert len(page.json(**{"class": "spec"})) == 4


def test_the_map_and_the_boundary_hold_the_numbers(scaled, written):
    page = Page(written["scales"][-1].read_text())
    assert {"boundary", "convergence_map", "convergence_boundary"} <= page.ids
    (tables,) = page.json(id="tables")
    study = architecture_study(scaled)
    for width in WIDTHS:
        drawn = tables[f"map pre, injection, width {width}"]
        rows = study.combinations.query(f"width == {width}")
        for name in ("gain", "embedding_std", "last_step"):
            np.testing.assert_allclose(drawn[name], rows[name], rtol=1e-6)
        assert drawn["answer"] == [f"{converged}/2" for converged in rows["converged"]]
        edges = np.sqrt(np.array(GAINS[1:]) * GAINS[:-1])
        np.testing.assert_allclose(sorted(set(drawn["gain_from"]))[1:], edges, rtol=1e-6)
    inside = study.boundary.dropna(subset=["critical_gain"])
    assert len(inside)
    specs = {spec["table"]: spec["spec"] for spec in page.json(**{"class": "spec"})}
    lines = [
        spec["datasets"][layer["data"]["name"]]
        for spec in (specs[f"map pre, injection, width {width}"] for width in WIDTHS)
        for layer in spec["layer"]
        if layer["mark"]["type"] == "line"
    ]
    drawn = [(point["embedding_std"], point["critical_gain"]) for line in lines for point in line]
    assert sorted(drawn) == sorted(zip(inside["embedding_std"], inside["critical_gain"], strict=True))
    text = " ".join(" ".join(page.text).split())
    assert f"{float(inside['critical_gain'].iloc[0]):.3g}" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["paper", "scales"])
def test_the_page_draws_in_a_browser_without_an_error(which, width, tmp_path, written):
    path = Path(shutil.copy(written[which][-1], tmp_path))
    said, data = open_in_browser(path, width, tmp_path)
    assert not said
    page = Page(path.read_text())
    assert int(data["drawn"]) == len(page.json(**{"class": "spec"}))
    assert int(data["needed"]) <= int(data["width"]) and int(data["resources"]) == 0


def test_two_recurrences_of_one_layer_make_a_page(tmp_path):
    """No second distance, no second layer, no rate: what cannot be told is left out."""
    settings = settings_in(tmp_path, layers=(1,), recurrences=(2,), norms=("pre",), gains=(0.3, 0.6))
    study = architecture_study(run_architecture_study(settings, run_all).stores)
    assert np.isnan(
        study.combinations[["least_cosine", "half_life", "distance_after_8"]].to_numpy(float)
    ).all()
    assert np.isfinite(study.combinations[["last_step", "distance_after_1"]].to_numpy(float)).all()
    page = Page(write_architecture_study(sorted(settings.out.iterdir()), tmp_path / "page")[-1].read_text())
    assert "Least cosine" not in " ".join(page.text) and "convergence_map" in page.ids


def test_the_command(tmp_path, monkeypatch, capsys):
    given = ["--out", tmp_path / "study", "--norms", "pre", "--injection", "yes", "--layers", 2, "--seeds", 5]
    given += ["--widths", 16, "--recurrences", 4, "--limit", 1]
    monkeypatch.setattr("sys.argv", ["looptap", "study", "architecture", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    written = capsys.readouterr().out.split()
    assert written[-1] == str(tmp_path / "study" / "report.html")
    assert all(Path(path).is_file() for path in written)
    (store,) = (tmp_path / "study").glob("*.zarr")
    assert store.name == "pre-injection-2x4-width16-gain0.32-embedding1-seed5.zarr"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--widths", "100"], "looptap: --widths has 100, which heads of 64 channels do not divide"),
        (["--gains", "1", "1.0"], "looptap: --gains has 1.0 twice"),
        (["--norms", "layer"], "looptap: norm=layer is not known"),
        (["--recurrences", "1"], "looptap: a step is from one recurrence to the next"),
        (["--norms"], "norms"),
        (["--injection", "perhaps"], "perhaps"),
    ],
)
def test_a_mistake_ends_in_one_message(given, said, refusal):
    message = refusal("study", "architecture", "--out", "study", *given)
    assert said in message
    if said.startswith("looptap"):
        assert len(message.splitlines()) == 1
