"""The `looptap` command. Every subcommand imports what it needs when it runs, so that help is quick."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg
from tyro.extras import SubcommandApp

from ..benchmarks.bench_settings import (
    AnalysisBench,
    CaptureBench,
    EngineBench,
    KernelsBench,
    LoadBench,
    StoreBench,
    WatchBench,
)
from ..capture.settings import (
    ArchitectureStudySettings,
    CaptureSettings,
    DepthStudySettings,
    InspectSettings,
)

# by subcommand: its settings and what it does; `bench_NAME` of `benchmarks/bench_NAME.py` runs it
BENCHMARKS: dict[str, tuple[type, str]] = {
    "analysis": (AnalysisBench, "Measure what analysing a store costs beside reading it once."),
    "capture": (CaptureBench, "Measure a capture's cost as ratios to the same model's plain forward pass."),
    "engine": (EngineBench, "Measure what the engines cost per unit, and how soon they mend."),
    "kernels": (KernelsBench, "Measure every kernel beside what a user would call instead."),
    "load": (LoadBench, "Measure what loading a checkpoint takes beside reading its shards whole."),
    "store": (StoreBench, "Measure the store's goals beside the disk and the libraries that know Zarr."),
    "watch": (WatchBench, "Compare a watched transformers model with our own, in values and in cost."),
}


app = SubcommandApp()
bench = SubcommandApp()
study = SubcommandApp()

Settings = TypeVar("Settings")
Flat = OmitArgPrefixes[Annotated[Settings, arg(name="")]]  # parts are groups of options, and in no name
# text, as a URL does not survive a Path
StorePath = Annotated[str, Positional, arg(metavar="STORE", help="A store made by looptap capture.")]
StorePaths = Annotated[
    tuple[str, ...], Positional, arg(metavar="STORE", help="Stores, drawn side by side in this order.")
]


@app.command
def capture(settings: Flat[CaptureSettings]) -> int:
    """Run a model over a dataset and record what happens inside its loop.

    The same command continues a capture that was stopped or killed.
    """
    from ..capture.plan import make_plan
    from .progress import run_with_progress

    return 0 if run_with_progress(make_plan(settings)).complete else 1


@app.command
def status(store: StorePath) -> int:
    """Say how far a capture is, what failed, and who is at work on it."""
    from ..capture.store.care.status import store_status
    from .tables import print_status

    print_status(store, store_status(store))
    return 0


@app.command
def verify(store: StorePath, repair: Annotated[bool, FlagCreatePairsOff] = False) -> int:
    """Compare every file of a store with the checksum taken when it was written.

    Exit code 1 if a file is not what was committed, or if units are missing.

    Args:
        repair: Void units that are not as they were written, so that the capture's command runs them again;
            write again what the plan tells; remove what killed attempts left. What cannot be read, and what
            is no file of the store, stays as it is.
    """
    from ..capture.store.care.repair import repair_store
    from ..capture.store.care.verify import verify_store
    from .tables import print_repaired, print_verified

    if repair:
        repaired = repair_store(store)
        print_repaired(repaired)
        return 1 if repaired.irreparable or repaired.unread or repaired.units_missing else 0
    found = verify_store(store)
    print_verified(found)
    return 0 if found.ok and not found.units_missing else 1


@app.command
def info(
    target: Annotated[str, Positional, arg(metavar="TARGET")],
    loop: Annotated[str | None, arg(metavar="A-BxN")] = None,
    recurrences: Annotated[int | None, arg(metavar="TIMES")] = None,
    neurons: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Describe a store or a model: its loop, sizes, and what each quantity takes.

    Args:
        target: A store, a model directory, a Hub id, or a random: spec.
        loop: For a feedforward model, the layers to repeat: first-lastxtimes, for example 10-19x8.
        recurrences: For a looped model, passes through the core.
        neurons: Also show prediction and suppression neurons of every block: of a model from its weights,
            of a store as they were recorded.
    """
    from ..capture.store.places.address import is_url
    from .tables import print_model, print_neurons, print_store

    if is_url(target) or os.path.isdir(os.path.join(target, ".looptap")):
        print_store(target)
        if neurons:
            from ..capture.store.writing.commit import Store

            print_neurons(Store.open(target).plan.recorded_neurons())
        return 0
    from ..capture.models.load import find_model

    source = find_model(target, loop, recurrences)
    print_model(source)
    if neurons:
        from ..capture.probes.neurons import logit_moments, summarise

        print_neurons(summarise(logit_moments(source.load())))
    return 0


@app.command
def analyze(
    store: StorePath,
    out: Annotated[Path, arg(metavar="DIR")],
    table_format: Literal["parquet", "csv"] = "parquet",
) -> int:
    """Compute every measure of a store as tables, and every figure as png and svg.

    Args:
        out: Directory for the results.
        table_format: Of the tables.
    """
    from ..analysis.analyze import write_analysis

    for path in write_analysis(store, out, table_format=table_format):
        print(path)
    return 0


@app.command
def report(
    stores: StorePaths,
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
    title: Annotated[str | None, arg(metavar="TEXT")] = None,
) -> int:
    """Write one self-contained page about one or several captures, side by side.

    Args:
        out: The HTML file to write.
        title: Heading of the page; made from the captures if not given.
    """
    from ..analysis.pages.report import write_report

    print(write_report(stores, out, title))
    return 0


@app.command
def inspect(settings: Flat[InspectSettings]) -> int:
    """Run one prompt: its way through the loop, and attention maps with --out."""
    from ..capture.prompt import inspect_prompt
    from .tables import print_inspection

    inspection = inspect_prompt(settings)
    print_inspection(inspection)
    if settings.out is not None:
        from ..analysis.pages.inspection import write_inspection

        print(
            write_inspection(
                inspection.dataset, inspection.tokens, inspection.lens, settings.out, settings.prompt
            )
        )
    return 0


@app.command
def demo(out: Annotated[Path, arg(metavar="DIR")] = Path("demo")) -> int:
    """Capture two small models on bundled prompts and report on them; no download.

    Both are randomly initialised, 12 layers run 32 times, one with injection.

    Args:
        out: Directory for the two stores and the report.
    """
    from ..analysis.findings import find
    from ..analysis.pages.page import write_page
    from ..analysis.pages.report import render
    from .demo import capture_demo
    from .verdict_table import print_verdicts

    findings = find(capture_demo(out))
    page = render(findings, "Two loops: with and without input injection")
    path = write_page(page, out / "report.html")
    print_verdicts(findings)
    print(f"report: {path.absolute()}")
    return 0


app.command(study, name="study", help="Run many captures that answer one question, and report on them.")


@study.command(name="architecture")
def study_architecture(settings: Flat[ArchitectureStudySettings]) -> int:
    """Capture randomly initialised loops of many kinds, and say which converge.

    The grid is the paper's if nothing is given.

    The same command continues a study that was stopped or killed.
    """
    from ..analysis.studies.architecture_page import write_architecture_study
    from ..capture.studies.architecture import run_architecture_study
    from .study_progress import run_all_with_progress

    captured = run_architecture_study(settings, run_all_with_progress)
    if not captured.complete:
        return 1
    for path in write_architecture_study(captured.stores, settings.out):
        print(path)
    return 0


@study.command(name="depth")
def study_depth(settings: Flat[DepthStudySettings]) -> int:
    """Capture one checkpoint at many recurrence counts, and compare what comes of it.

    The same command continues a study that was stopped or killed.
    """
    from ..analysis.studies.depth_page import write_depth_study
    from ..capture.studies.depth import run_depth_study
    from .progress import run_with_progress

    captured = run_depth_study(settings, run_with_progress)
    if not captured.complete:
        return 1
    for path in write_depth_study(captured.stores, captured.own, settings.out):
        print(path)
    return 0


app.command(
    bench, name="bench", help="Measure what looptap costs beside the alternatives, as ratios in one run."
)


def _benchmark(name: str, settings_class: type) -> Callable[..., int]:
    def command(settings: Any) -> int:
        getattr(import_module(f"..benchmarks.bench_{name}", __package__), f"bench_{name}")(settings)
        return 0

    command.__annotations__["settings"] = OmitArgPrefixes[settings_class]
    return command


for _name, (_settings_class, _line) in BENCHMARKS.items():
    bench.command(name=_name, help=_line)(_benchmark(_name, _settings_class))
