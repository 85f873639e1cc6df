"""Stores, models and prompts as text on stdout, for the commands that only look."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..analysis.thresholds import CONVERGED_STEP, rounding_step
from ..capture.models.description import Description
from ..capture.models.load import ModelSource
from ..capture.plan import absent_quantities
from ..capture.probes.contraction import Contraction
from ..capture.prompt import Inspection
from ..capture.store.care.examined import Problem
from ..capture.store.care.repair import Repair
from ..capture.store.care.status import StoreStatus
from ..capture.store.care.verify import Report
from ..capture.store.plan import StoredSettings, plan_of
from ..capture.store.quantities import QUANTITIES
from ..capture.store.writing.commit import Store
from ..errors import shown


def make_console(stderr: bool) -> Console:
    """Makes a console for plain text; breaks lines to fit a terminal, and leaves them whole elsewhere."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


console = make_console(stderr=False)


def print_status(path: str | Path, status: StoreStatus) -> None:
    """Prints the result of `store_status`."""
    table = Table.grid(padding=(0, 2))
    done = f"{status.units_done} of {status.units_total}"
    table.add_row("units", done + (", complete" if status.complete else ""))
    table.add_row("captured", f"{status.num_sequences} sequences, {status.num_tokens} tokens")
    table.add_row("on disk", to_size(status.num_bytes))
    table.add_row("time", f"{status.seconds:.1f} s of work; last commit {status.last_commit or 'never'}")
    if status.num_non_finite:
        table.add_row("non-finite", f"{status.num_non_finite} values are infinite or undefined")
    driver = status.driver
    table.add_row("at work", f"process {driver.pid} on {driver.host}" if driver else "nobody")
    failed = [failure for failure in status.failures if not failure.done]
    if mended := len(status.failures) - len(failed):
        table.add_row("mended", f"{mended} failed attempts at units that are done by now")
    for failure in failed:
        table.add_row("failed", f"unit {failure.unit}, attempt {failure.attempt}: {failure.error}")
    console.print(str(path))
    console.print(table)


def print_verified(report: Report) -> None:
    """Prints the result of `verify_store`."""
    done, missing = len(report.units_done), len(report.units_missing)
    console.print(
        f"{report.path}: {done} of {done + missing} units; "
        f"read {report.num_files} files, {to_size(report.num_bytes)}"
    )
    for problem in report.problems:
        console.print(f"  {problem}", style="red")
    _print_unread(report.unread)
    if report.uncommitted:
        console.print(
            f"  {len(report.uncommitted)} files belong to no committed unit; the next run replaces them: "
            f"{_first(report.uncommitted)}"
        )
    if report.drafts:
        console.print(
            f"  {len(report.drafts)} attempts are writing, or were killed while they wrote; the next run "
            f"removes what those left: {_first(report.drafts)}"
        )
    _print_foreign(report.foreign)
    if missing:
        console.print(f"  {missing} units are missing; the capture's command continues it")
    if report.problems:
        console.print("  looptap verify --repair undoes the units that are damaged")
    if report.ok:
        console.print("every committed file is as it was written")
    else:
        unread = f", {len(report.unread)} files could not be read" if report.unread else ""
        console.print(f"{len(report.problems)} problems{unread}")


def _print_unread(unread: Sequence[Problem]) -> None:
    for problem in unread:
        console.print(f"  {problem.file} could not be read and may be sound: {problem.what}", style="red")


def _print_foreign(foreign: Sequence[str]) -> None:
    if foreign:
        console.print(
            f"  {len(foreign)} names are of no file of this store, and are left alone: {_first(foreign)}"
        )


def _first(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def print_repaired(repair: Repair) -> None:
    """Prints the result of `repair_store`, and what is left to do."""
    console.print(f"{repair.path}: {len(repair.problems)} problems")
    for problem in repair.problems:
        console.print(f"  {problem}", style="red")
    _print_unread(repair.unread)
    _print_foreign(repair.foreign)
    for file in repair.files_restored:
        console.print(f"  {file} was written again from what the rest of the store tells")
    if repair.files_removed:
        console.print(f"  {repair.files_removed} files of no committed unit were removed")
    if repair.units_voided:
        shown = ", ".join(map(str, repair.units_voided[:10])) + (", …" if repair.units_voided[10:] else "")
        console.print(f"  {len(repair.units_voided)} units are to do again: {shown}")
    if repair.irreparable:
        console.print(
            f"  {len(repair.irreparable)} files are not as they were: the capture's own command, begun "
            "again, writes what only its data tell",
            style="red",
        )
    if repair.units_missing:
        console.print(
            f"{len(repair.units_missing)} units are missing; finish with the capture's own command: "
            f"looptap capture MODEL --data FILE --store {repair.path} and the settings it had "
            f"(looptap info {repair.path})"
        )
    elif not repair.irreparable and not repair.unread:
        console.print("every unit is there and as it was written")


def print_store(path: str | Path) -> None:
    """Prints the plan that a store was made from."""
    plan = Store.open(path).plan
    model, data, settings = plan.model, plan.data, plan.settings
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{model.name}  {model.notation}, {model.norm} norms, {plan.dtype}")
    weights = "unknown" if model.weights_sha256 is None else f"{model.weights_sha256[:16]}…"
    table.add_row("weights", f"{model.num_parameters} parameters, sha256 {weights}")
    table.add_row("data", f"{data.name}, {plan.num_sequences} sequences, {plan.num_tokens} tokens")
    if plan.tokenizer is not None and plan.tokenizer.beginning:
        table.add_row("rows begin", to_tokens(plan.tokenizer.beginning))
    table.add_row("units", f"{plan.num_units} of {plan.unit_tokens} token slots")
    table.add_row("quantities", ", ".join(settings.quantities))
    if settings.states:
        table.add_row("states", f"{' '.join(settings.states)} of tokens {settings.tokens}")
    if changed := _interventions(settings):
        table.add_row("changed", "; ".join(changed))
    table.add_row(
        "made", f"{plan.created}, looptap {plan.versions['looptap']}, torch {plan.versions['torch']}"
    )
    console.print(str(path))
    console.print(table)


def print_neurons(found: dict[str, Any]) -> None:
    """Prints prediction and suppression neurons by block, as `summarise` returns them."""
    first, *levels = ("most" if level == 1 else f"{level:.0%}" for level in found["quantiles"])
    names = ("block", "neurons", "prediction", "suppression", f"kurtosis {first}", *levels)
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for block in found["blocks"]:
        shares = (f"{block[kind]:.2%}" for kind in ("prediction", "suppression"))
        kurtosis = ("-" if value is None else f"{value:.2f}" for value in block["kurtosis"])
        table.add_row(f"{block['stage']} {block['layer']}", str(block["num_neurons"]), *shares, *kurtosis)
    console.print(table)
    console.print(
        f"shares of neurons whose effect on the logits has a kurtosis above {found['threshold']:g} (a normal "
        "distribution's is 3) and a positive (prediction) or negative skew (suppression), from the weights "
        "alone; in a gated MLP the split between the two depends on how the weights are written, their sum "
        "does not"
    )


def _start(d: Description) -> str:
    """Says what the loop starts from."""
    if not d.core:
        return "no loop"
    if d.initial_state == "prelude":
        return "it starts from " + ("the prelude's output" if d.prelude else "the token embedding")
    cut = ", cut at three times that" if d.initial_state == "truncated" else ""
    return f"it starts from a draw of std {d.initial_std:.3g}{cut}, per sequence and position"


def print_model(source: ModelSource) -> None:
    """Prints a model's loop and sizes, and what a token of it takes in a store."""
    d = source.description
    itemsize = source.origin.dtype.itemsize
    absent = absent_quantities(d)
    sizes = {"token": 1, "sequence": 1, "recurrence": d.recurrences, "head": d.num_heads, "hidden": d.width}
    sizes |= dict.fromkeys(("depth", "depth_other", "depth_state"), d.depth)
    table = Table.grid(padding=(0, 2))
    table.add_row("model", source.title)
    table.add_row("loop", f"{d.notation}: {d.num_blocks} blocks run {d.depth} times; {_start(d)}")
    rotary = d.block.rotary
    table.add_row(
        "block",
        f"{d.block.norm} norms with eps {d.block.eps:g}, "
        f"{d.num_heads} heads on {d.num_kv_heads} key heads of {d.head_width}, rotary base {rotary.theta:g}"
        + (", interleaved" if rotary.interleaved else "")
        + (", llama3 scaling" if rotary.scaling else ""),
    )
    table.add_row(
        "width",
        f"{d.width}, MLP {d.mlp_width}, vocabulary {d.vocab_size}{' (tied head)' if d.tied_head else ''}, "
        f"up to {d.max_positions} positions" + (", an exit gate" if d.exit_gate else ""),
    )
    weights = to_size(source.num_parameters * itemsize)
    dtype = source.resolve_dtype("auto")
    table.add_row("weights", f"{source.num_parameters} parameters, {weights} in {dtype}")
    kept = to_size(d.core * d.recurrences * d.width * itemsize)
    gaps = f"; the gaps keep {kept} a token of a forward pass, or run the loop twice" if d.core else ""
    table.add_row("memory", f"{weights} of weights{gaps}")
    console.print(table)
    volume = Table("quantity", "bytes a token", "what it is", box=None, padding=(0, 2, 0, 0))
    total = 0
    for name, quantity in QUANTITIES.items():
        if name in absent:
            continue
        num_bytes = math.prod(sizes[axis] for axis in quantity.axes) * (itemsize if name == "state" else 4)
        is_of_token = quantity.axes[0] == "token"
        total += num_bytes if is_of_token and name != "state" else 0
        where = ", at every depth" if name == "state" else ""
        size = to_size(num_bytes) + ("" if is_of_token else " a sequence")
        volume.add_row(name, size, quantity.definition + where)
    volume.add_row("together", to_size(total), "all of these that are a token's but state, uncompressed")
    console.print(volume)


def _interventions(settings: StoredSettings) -> list[str]:
    """Says what a capture changed in the model."""
    found = []
    if (start := settings.initial_state) is not None:
        found.append(f"initial state {start['file'] if isinstance(start, dict) else start}")
    if settings.prelude_output != "model":
        found.append(f"prelude output {settings.prelude_output}")
    if settings.zero:
        found.append(f"zero {' '.join(settings.zero)}")
    return found


def print_inspection(inspection: Inspection) -> None:
    """Prints what happens to the last token in the loop, a row a recurrence."""
    console.print(
        f"{plan_of(inspection.dataset).model.name}, {len(inspection.tokens)} tokens, "
        f"the last of them {inspection.tokens[-1]!r}"
    )
    gate = ["exit"] if "exit_probability" in inspection.dataset else []
    names = ("recurrence", "step", "to last", "entropy", *gate, "next token")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for row in inspection.rows():
        step, gap = (
            f"{value:.1e}" if value is not None else "-" for value in (row.relative_step, row.relative_gap)
        )
        lens = " ".join(f"{token!r} {share:.2f}" for token, share in row.lens)
        leaves = [] if row.exit_probability is None else [f"{row.exit_probability:.3f}"]
        number = "-" if row.recurrence is None else str(row.recurrence)
        table.add_row(number, step, gap, f"{row.entropy:.2f}", *leaves, lens)
    console.print(table)
    console.print(
        "step, to last: distance to the recurrence before and to the last one, of the last core layer, "
        "over the norm; entropy: nats, mean over the heads of the core"
        + ("; exit: chance that the gate leaves after this recurrence" if gate else "")
    )
    if inspection.contraction is not None:
        _print_contraction(inspection.contraction, inspection.tokens)


def _print_contraction(found: Contraction, tokens: list[str]) -> None:
    """Prints the whole prompt's factor, the spread of tokens around it, and whether it is a fixed point's."""
    factor_N = found.factor_N
    if not factor_N.isfinite().all():
        console.print(f"no contraction factor: after {found.recurrences} recurrences the state is not finite")
        return
    largest = int(factor_N.argmax())
    low, middle, high = (float(factor_N.quantile(share)) for share in (0.25, 0.5, 0.75))
    console.print(
        f"contraction factor after {found.recurrences} recurrences: "
        f"{float(factor_N[largest]):.4f} +- {float(found.spread_N[largest]):.1g} (token {largest}, "
        f"{tokens[largest]!r}); over the {len(tokens)} tokens median {middle:.4f}, "
        f"quartiles {low:.4f} to {high:.4f}, least {float(factor_N.min()):.4f}"
    )
    step = float(found.step_N.max())
    console.print(
        "what one recurrence multiplies a small difference by in the long run, below 1 if it shrinks; "
        f"the state still moves there by up to {step:.1e} of its norm" + _settled(step, found.epsilon)
    )


def _settled(step: float, epsilon: float) -> str:
    """Says what a last step of this length means for the state."""
    if step <= CONVERGED_STEP:
        return ""
    if step <= rounding_step(epsilon):
        return ", which rounding alone may do: give --dtype float32 to tell"
    return ", so it is no fixed point and the factor is that of a place on the way"


def to_tokens(beginning: Sequence[tuple[int, str]]) -> str:
    """Returns the first tokens of a row as a line: texts and ids."""
    return ", ".join(f"{shown(text, 20)} ({id})" for id, text in beginning)


def to_size(num_bytes: int) -> str:
    """Returns bytes as text for people."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} B"
