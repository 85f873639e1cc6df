"""The depth study: ordinary captures at every count, and numbers equal to their direct definitions."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import looptap
from looptap.analysis.studies.depth_page import write_depth_study
from looptap.analysis.studies.depth_study import ENDS, PLACE_MEASURES, depth_study, study_tables
from looptap.capture.models.load import load_model
from looptap.capture.models.starts import initial_state
from looptap.capture.models.tap import Packed
from looptap.capture.run import Outcome, run_capture
from looptap.capture.settings import DepthStudySettings
from looptap.capture.studies.depth import counts_of, depth_plans, run_depth_study
from looptap.cli.entry import main
from looptap.errors import PlanError, StudyError
from looptap.tests.oracle import Listening
from looptap.tests.pages import CHROMIUM, Page, open_in_browser

pytestmark = pytest.mark.slow

MODEL = "random:(1,2x3,1)I,width=64,heads=4"
# a lone token, ragged, more than one unit of them
TEXTS = ["ab cab", "x", "hello there, how long is this", "the square root of 16 is", "no"]
COUNTS, OWN = (1, 2, 3, 5), 3


def settings_in(directory: Path, **changes) -> DepthStudySettings:
    data = directory / "texts.txt"
    data.write_text("".join(f"{text}\n" for text in TEXTS))
    given = {"model": MODEL, "data": data, "out": directory / "study", "counts": COUNTS, "batch_tokens": 16}
    return DepthStudySettings.of(**{**given, **changes})


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> dict[int, xr.Dataset]:
    """A study's stores by count."""
    study = run_depth_study(settings_in(tmp_path_factory.mktemp("depth")), run_capture)
    assert study.complete and study.own == OWN
    return dict(zip(COUNTS, map(looptap.open, study.stores), strict=True))


@pytest.mark.parametrize(
    ("wanted", "own", "counts"),
    [
        ((), 1, [1, 2, 4]),
        ((), 3, [1, 2, 3, 4, 8]),
        ((), 4, [1, 2, 4, 8, 16]),
        ((16, 2), 4, [2, 4, 16]),
        ((4,), 4, [4]),
    ],
)
def test_the_models_own_count_is_always_among_them(wanted, own, counts):
    assert counts_of(wanted, own) == counts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": (0, 2)}, "at least once, and counts has 0"),
        ({"counts": (2, 4, 2)}, "counts has 2 twice"),
        ({"model": "random:(2,0,0),width=32"}, r"\(2,0,0\) has no loop to run more often; give a window"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(changes, said, tmp_path):
    def run(plan):
        raise AssertionError("ran")

    with pytest.raises(PlanError, match=said):
        run_depth_study(settings_in(tmp_path, **changes), run)
    assert not (tmp_path / "study").exists()


def test_every_count_is_an_ordinary_capture(tmp_path):
    own, plans = depth_plans(settings_in(tmp_path, model="random:(6,0,0),width=32", loop="2-3x3"))
    assert own == 3 and [plan.description.notation for plan in plans] == [
        f"(2,2x{count},2)" for count in COUNTS
    ]
    for count, plan in zip(COUNTS, plans, strict=True):
        assert plan.settings.model.loop == f"2-3x{count}" and plan.settings.model.recurrences is None
        assert Path(plan.store).name == f"recurrences-{count}.zarr"
        assert plan.state_depths == (plan.description.depth - 1,)
        again, first = (
            looptap.capture.plan.make_plan(plan.settings).stored().to_json(),
            plan.stored().to_json(),
        )
        assert again | {"created": ""} == first | {"created": ""}
    _, plans = depth_plans(settings_in(tmp_path, model="random:(0,2x3,0),width=32"))
    assert [plan.settings.model.recurrences for plan in plans] == list(COUNTS)
    assert [plan.state_depths for plan in plans] == [(2 * count - 1,) for count in COUNTS]


def test_the_same_study_goes_on_where_it_stopped(tmp_path):
    settings = settings_in(tmp_path, counts=(2, 3))
    outcomes: list[Outcome] = []

    def stops_after_one(plan):
        if outcomes:
            raise KeyboardInterrupt
        outcomes.append(run_capture(plan))
        return outcomes[-1]

    with pytest.raises(KeyboardInterrupt):
        run_depth_study(settings, stops_after_one)
    outcomes.clear()
    study = run_depth_study(settings, lambda plan: outcomes.append(run_capture(plan)) or outcomes[-1])
    assert study.complete and [each.num_resumed for each in outcomes] == [outcomes[0].num_units, 0]


def test_the_largest_count_holds_the_core_of_all_and_not_the_rest(captured):
    """Why every count is captured by itself."""
    most = captured[COUNTS[-1]]
    for count in COUNTS[:-1]:
        here = captured[count]
        core = here.isel(depth=here.recurrence.values >= 0)
        same = most.isel(depth=(most.recurrence.values >= 0) & (most.recurrence.values < count))
        for name in ("residual_norm", "update_norm", "step_norm", "attention_entropy", "attention_received"):
            np.testing.assert_array_equal(core[name].values, same[name].values)
        for name in ("lens_token", "lens_entropy"):
            np.testing.assert_array_equal(here[name].values, most[name].values[:, :count])
        coda, other = (each.isel(depth=each.stage.values == 2) for each in (here, most))
        assert not np.allclose(coda["residual_norm"], other["residual_norm"], equal_nan=True)
        assert not np.allclose(core["gap_norm"], same["gap_norm"], equal_nan=True)
        assert not np.allclose(here["lens_kl"], most["lens_kl"].values[:, :count], equal_nan=True)


def run_directly(count: int) -> list[dict[str, np.ndarray]]:
    """Every sequence alone through the plain model, float64 from there on."""
    model = load_model(MODEL, recurrences=count, dtype="float32")
    found = []
    for row, text in enumerate(TEXTS):
        ids_N, tap = torch.tensor(list(text.encode())), Listening()
        batch = Packed(ids_N, (len(ids_N),))
        state_ND = initial_state(None, model.description, 0, [row], batch.lengths, None)
        with torch.inference_mode():
            model(batch, tap, state_ND)
            logits_NV = model.logits(model.read_out(tap.loop_states[count - 1])).double()
        log_NV = logits_NV.log_softmax(-1)
        last = max(tap.residuals, key=lambda step: step.depth)
        found.append(
            {
                "output": tap.residuals[last].double().numpy(),
                "token": logits_NV.argmax(-1).numpy(),
                "entropy": -(log_NV.exp() * log_NV).sum(-1).numpy(),
            }
        )
    return found


def band(values: list[float]) -> tuple[float, float, float]:
    mean, error = np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, mean - error, mean + error


def test_ends_are_their_direct_definitions(captured):
    study = depth_study(list(captured.values())[::-1], OWN)  # in any order
    assert study["count"].values.tolist() == list(COUNTS)
    own = run_directly(OWN)
    for count in COUNTS:
        here = run_directly(count)
        cosines, same, entropies = [], [], []
        for a, b in zip(here, own, strict=True):
            lengths = np.linalg.norm(a["output"], axis=1) * np.linalg.norm(b["output"], axis=1)
            cosines.append(((a["output"] * b["output"]).sum(axis=1) / lengths).mean())
            same.append((a["token"] == b["token"]).mean())
            entropies.append(a["entropy"].mean())
        found = study.sel(count=count)
        for name, values in (("output_cosine", cosines), ("same_answer", same), ("lens_entropy", entropies)):
            np.testing.assert_allclose(found[name].values[:3], band(values), rtol=1e-5, atol=1e-6)
            assert found[name].values[3] == len(TEXTS)
    assert 0 < study["same_answer"].values[0, 0] < 1 and study["output_cosine"].values[0, 0] < 0.9


def test_the_last_step_is_the_slowest_layers_median(captured):
    slow = captured[5].load().copy(deep=True)
    slow["step_norm"].values[:, (slow.stage.values == 1) & (slow.layer.values == 0)] *= 3
    captured = captured | {5: slow}
    study = depth_study(list(captured.values()), OWN)
    assert np.isnan(study["last_step"].values[0]).all()  # a loop that ran once made no step
    for count in COUNTS[1:]:
        last = captured[count].isel(depth=captured[count].recurrence.values == count - 1)
        filled = last.token_sequence.values >= 0
        steps_TL = (last.step_norm / last.residual_norm).values[filled]
        expected = np.median(steps_TL, axis=0).max()
        assert abs(float(study["last_step"].sel(count=count)[0]) / expected - 1) < 0.04  # bins of 1/64 decade


def test_places_are_every_block_in_its_last_invocation(captured):
    study = depth_study(list(captured.values()), OWN)
    assert study["stage"].values.tolist() == [0, 1, 1, 2] and study["layer"].values.tolist() == [0, 0, 1, 0]
    for count in COUNTS:
        here = captured[count]
        depths = [0, 2 * count - 1, 2 * count, 2 * count + 1]
        sequences = here.token_sequence.values
        for name, quantity in (("mixing_score", "attention_entropy"), ("residual_norm", "residual_norm")):
            value_TD = here[quantity].values.astype(float)
            value_TD = value_TD.mean(axis=2) if value_TD.ndim == 3 else value_TD
            means = [
                value_TD[sequences == each][:, depths].mean(axis=0)
                for each in np.unique(sequences)
                if each >= 0
            ]
            expected = np.array([band([mean[place] for mean in means]) for place in range(4)]).T
            np.testing.assert_allclose(study[name].sel(count=count).values[:3], expected, rtol=1e-6)


def test_tables_hold_the_numbers(captured):
    study = depth_study(list(captured.values()), OWN)
    counts, places = study_tables(study).values()
    assert counts["recurrences"].tolist() == list(COUNTS) and counts["is_own"].tolist() == [
        False,
        False,
        True,
        False,
    ]
    for name in ENDS:
        np.testing.assert_array_equal(counts[f"{name}_low"], study[name].values[:, 1])
    assert places["place"].tolist() == [*range(4)] * 4 and places["recurrences"].tolist()[::4] == list(COUNTS)
    assert places["stage"].tolist()[:4] == ["prelude", "core", "core", "coda"]
    for name in PLACE_MEASURES:
        for index, end in enumerate(("", "_low", "_high")):
            values_CP = places[f"{name}{end}"].to_numpy().reshape(4, 4)
            np.testing.assert_array_equal(values_CP, study[name].values[:, index])


def spoiled(dataset: xr.Dataset, **changes) -> xr.Dataset:
    """The same capture of another plan."""
    plan = dataset.attrs["plan"]
    return dataset.assign_attrs(plan=plan | {name: plan[name] | value for name, value in changes.items()})


def test_stores_that_are_no_study_are_refused(captured):
    stores = list(captured.values())
    with pytest.raises(StudyError, match=r"model's own 4 recurrences is among the counts 1, 2, 3, 5"):
        depth_study(stores, 4)
    with pytest.raises(StudyError, match="two captures of one count"):
        depth_study([*stores, stores[0]], OWN)
    other = spoiled(stores[3], data={"sha256": "another"})
    with pytest.raises(StudyError, match="the data differs between 1 and 5 recurrences"):
        depth_study([*stores[:3], other], OWN)
    other = spoiled(stores[3], model={"weights_sha256": "another"})
    with pytest.raises(StudyError, match="the model differs between 1 and 5"):
        depth_study([*stores[:3], other], OWN)
    unfinished = stores[3].assign_coords(unit_done=stores[3].unit_done * 0)
    with pytest.raises(StudyError, match=r"units of 5 recurrences are missing: run the study again"):
        depth_study([*stores[:3], unfinished], OWN)
    with pytest.raises(StudyError, match="5 recurrences lacks state"):
        depth_study([*stores[:3], stores[3].drop_vars("state")], OWN)


def test_the_page_holds_every_count_and_figure(captured, tmp_path):
    paths = write_depth_study(list(captured.values()), OWN, tmp_path)
    assert all(path.stat().st_size for path in paths) and paths[-1].name == "report.html"
    assert {path.name for path in paths} >= {
        "counts.csv",
        "places.csv",
        "stages_by_count.png",
        "ends_by_count.svg",
    }
    page = Page(paths[-1].read_text())
    assert page.loads == [] and {"counts", "ends_by_count", "stages_by_count", "steps"} <= page.ids
    text = " ".join(" ".join(page.text).split())
    assert "3 (own)" in text and "the model's own count is 3" in text
    cosine = float(depth_study(list(captured.values()), OWN)["output_cosine"].values[0, 0])
    assert f"With 1 recurrences the output is at cosine {cosine:.3g} to that of 3" in text
    svg = (tmp_path / "stages_by_count.svg").read_text()
    strokes = Counter(re.findall(r'stroke="(#[0-9a-f]{6})"', svg))
    lines = [color for color, times in strokes.items() if times == len(PLACE_MEASURES) + 1]
    assert len(lines) == len(COUNTS)  # a colour for each count, in every panel and the legend


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_in_a_browser_without_an_error(captured, tmp_path, width):
    path = write_depth_study(list(captured.values()), OWN, tmp_path)[-1]
    said, data = open_in_browser(path, width, tmp_path)
    assert not said
    page = Page(path.read_text())
    assert int(data["drawn"]) == len(page.json(**{"class": "spec"}))
    assert int(data["needed"]) <= int(data["width"]) and int(data["resources"]) == 0


def test_one_count_alone_makes_a_page(captured, tmp_path):
    page = Page(write_depth_study([captured[OWN]], OWN, tmp_path)[-1].read_text())
    assert {"ends_by_count", "stages_by_count"} <= page.ids


def test_states_that_are_no_numbers_are_left_out(captured):
    broken = captured[5].load().copy(deep=True)
    sequence = broken.token_sequence.values
    broken["state"].values[np.flatnonzero(sequence == 2)[0]] = np.nan
    study = depth_study([*list(captured.values())[:3], broken], OWN)
    assert np.isfinite(study["output_cosine"].values).all()


def test_the_command(tmp_path, monkeypatch, capsys):
    settings = settings_in(tmp_path)
    given = ["--data", settings.data.data, "--out", settings.out, "--counts", 2, 3, "--batch-tokens", 16]
    monkeypatch.setattr("sys.argv", ["looptap", "study", "depth", MODEL, *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    written = capsys.readouterr().out.split()
    assert written[-1] == str(settings.out / "report.html") and all(Path(path).is_file() for path in written)
    assert sorted(path.name for path in settings.out.glob("*.zarr")) == [
        "recurrences-2.zarr",
        "recurrences-3.zarr",
    ]
    monkeypatch.setattr(
        "sys.argv", ["looptap", "study", "depth", MODEL, *map(str, given[:4]), "--counts", "0"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "at least once, and counts has 0" in capsys.readouterr().err
