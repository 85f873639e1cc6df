"""Schedules: the steps and words that follow from them, what plans record of them, and that taps measure by
block, also where there are two loops or one stack inside the other's loop.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from looptap.capture.models.load import find_model
from looptap.capture.models.loop_schedule import Phase, Repeat, Schedule, prelude_core_coda
from looptap.capture.models.model import LoopedModel
from looptap.capture.models.tap import Packed, Plain
from looptap.capture.plan import absent_quantities, make_plan
from looptap.capture.selection import select_depths
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.quantities import GROUPS
from looptap.capture.taps.statistics import Buffers, LastStates, Statistics
from looptap.capture.token_memory import before_bytes, kept_bytes
from looptap.capture.units import depth_coordinates
from looptap.kernels import reference
from looptap.tests.golden_files import GOLDEN
from looptap.tests.oracle import Straight, describe, fill

# spec, --loop, --recurrences: hashes of the model's identity (without the hash of drawn weights, which is
# the processor's), of a plan with default settings, and of one with everything and gaps by running twice;
# taken at f6d0569, before descriptions held schedules
RECORDED = {
    ("random:(4,0,0),width=32,heads=2", None, None): ("c72d042a291cc1f9",),
    ("random:(0,2x3,0),width=32,heads=2,norm=ouro", None, None): ("80f32e0440f30084",),
    ("random:(1,2x3,1)I,norm=huginn,width=32,heads=4", None, None): ("b4013608b743a4f6",),
    ("random:(2,3x1,0)I,width=32,heads=4", None, None): ("312d54f0f00840c5",),
    ("random:(1,2x5,2),norm=olmo2,width=48,heads=4,seed=3", None, None): ("09d8a65393ae95f0",),
    ("llama", None, None): ("ee596fdd9033682c", "9733e1cdcba9568d", "f7121c82f76034df"),
    ("olmo2", None, None): ("3a4b00b84708c719", "5ff70bf2f8e36bf8", "e7ac4f016c3930be"),
    ("ouro", None, None): ("d12685c98695eeed", "3bc8fe847a6a9016", "282925a094e16e9b"),
    ("huginn", None, None): ("f1b54d167c4c740f", "26c54daee17eea9d", "d79b7acb70de752a"),
    ("retro-tinyllama", None, None): ("42eabb82119bcc3c", "bb630d7894916e67", "76b3f54c223d84c1"),
    ("retro-llama32", None, None): ("2cb560eba6c90802", "f5d0c74ca6614c77", "00a0117d8c76edde"),
    ("retro-olmo2", None, None): ("fa0e745c03327fa8", "579381e89b291258", "c1c136fa256c08d5"),
    ("llama", "1-3x4", None): ("91f43f4cfff88504", "bfbfc692392e7f92", "6ea87568640d5c1e"),
    ("olmo2", "0-1x2", None): ("a2bda58f8184766f", "c90c0e0009691187", "ab849169f0f9896c"),
    ("ouro", None, 6): ("fe0b53abfa145861", "8b2636b37b93aaa2", "362fafb2887cf38d"),
    ("huginn", None, 9): ("d191b923368f48c3", "d2f6373a016f05b1", "4296f14e44bf389b"),
}


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: "-".join(map(str, case)))
def test_plans_record_what_they_always_did(case, tmp_path):
    """Another hash would refuse to go on with every store that there is."""
    name, loop, recurrences = case
    spec = name if name.startswith("random:") else str(GOLDEN / name)
    identity = find_model(spec, loop, recurrences).identity()
    if name.startswith("random:"):
        identity["weights_sha256"] = "-"
    found = [hashlib.sha256(json.dumps(identity).encode()).hexdigest()]
    if not name.startswith("random:"):
        np.save(tmp_path / "ids.npy", np.arange(48).reshape(4, 12))
        whole = {"quantities": ("all",), "states": ("all",), "gap_memory_gib": 1e-7}
        for more in ({}, whole):
            settings = CaptureSettings.of(
                model=spec, data=tmp_path / "ids.npy", store=tmp_path / "s", loop=loop,
                recurrences=recurrences, device="cpu", **more,
            )  # fmt: skip
            found.append(make_plan(settings).stored().hash)
    assert tuple(text[:16] for text in found) == RECORDED[case]


# blocks are not numbered as they run, so that no layer or stage stands in for a block
TWO_LOOPS = (
    Phase("opening", (5,)),
    Repeat((Phase("first", (1, 2)),), 3),
    Phase("between", (3,)),
    Repeat((Phase("second", (4,)),), 4),
    Phase("closing", (0,)),
)
TWO_STACKS = (Repeat((Repeat((Phase("low", (2, 3)),), 3), Phase("high", (0, 1))), 2),)


def two_loops(block, x):
    x = block(5, x)
    for _ in range(3):
        x = block(2, block(1, x))
    x = block(3, x)
    for _ in range(4):
        x = block(4, x)
    return block(0, x)


def two_stacks(block, x):
    for _ in range(2):
        for _ in range(3):
            x = block(3, block(2, x))
        x = block(1, block(0, x))
    return x


CASES = {"two loops": (TWO_LOOPS, two_loops, {1, 2, 4}), "two stacks": (TWO_STACKS, two_stacks, {0, 1, 2, 3})}
LENGTHS = (9, 14)
N = sum(LENGTHS)
NAMES = (
    "residual_norm", "update_norm", "step_norm", "step_cosine", "gap_norm", "gap_cosine",
    "attention_step", "attention_gap",
)  # fmt: skip


def test_two_loops_one_after_the_other():
    schedule = Schedule(phases=TWO_LOOPS)
    assert schedule.notation == "(1,2x3,1,1x4,1)" and (schedule.num_blocks, schedule.depth) == (6, 13)
    assert [tuple(step) for step in schedule.steps()] == [
        (0, 5, "opening", 0, -1),
        *((1 + 2 * r + layer, 1 + layer, "first", layer, r) for r in range(3) for layer in range(2)),
        (7, 3, "between", 0, -1),
        *((8 + r, 4, "second", 0, r) for r in range(4)),
        (12, 0, "closing", 0, -1),
    ]
    assert [tuple(loop) for loop in schedule.loops] == [("first", (1, 2), 3), ("second", (4,), 4)]
    assert schedule.last_depths == {5, 6, 11}
    assert schedule.counts is None and schedule.only_loop is None and schedule.recurrences == 0
    with pytest.raises(AssertionError, match="not of the form"):
        _ = schedule.core


def test_one_stack_inside_the_others_loop():
    """The loops are HRM-Text's: the low stack's recurrences count on through the high one's."""
    schedule = Schedule(phases=TWO_STACKS)
    assert schedule.notation == "((2x3,2)x2)" and (schedule.num_blocks, schedule.depth) == (4, 16)
    runs = [("low", 0), ("low", 1), ("low", 2), ("high", 0), ("low", 3), ("low", 4), ("low", 5), ("high", 1)]
    assert [(visit[0].stage, visit[0].recurrence) for visit in schedule.visits] == runs
    assert schedule.order == (2, 3, 2, 3, 2, 3, 0, 1) * 2
    assert [tuple(loop) for loop in schedule.loops] == [("low", (2, 3), 6), ("high", (0, 1), 2)]
    assert schedule.last_depths == {12, 13, 14, 15}


def test_the_common_case():
    schedule = Schedule(phases=prelude_core_coda(1, 2, 3, 1))
    assert schedule.notation == "(1,2x3,1)" and tuple(schedule.counts) == (1, 2, 3, 1)
    assert (schedule.prelude, schedule.core, schedule.recurrences, schedule.coda) == (1, 2, 3, 1)
    assert schedule.last_depths == {5, 6}
    plain = Schedule(phases=prelude_core_coda(2, 0, 0, 1))
    assert plain.notation == "(2,0,1)" and tuple(plain.counts) == (2, 0, 0, 1) and not plain.loops
    once = Schedule(phases=prelude_core_coda(0, 2, 1, 0))
    assert [step.recurrence for step in once.steps()] == [0, 0], "a loop that runs once is a loop"


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ((Phase("a", (0,)), Phase("a", (1,))), "stage 'a' stands in more than one phase"),
        ((Phase("a", (0,)), Repeat((Phase("b", (1, 0)),), 2)), "block 0 stands in more than one phase"),
        ((Repeat((Phase("a", (0,)),), 0),), r"\(1x0\) cannot run 0 times"),
    ],
)
def test_impossible_schedules_are_refused(phases, says):
    with pytest.raises(ValueError, match=says):
        Schedule(phases=phases)


@pytest.mark.parametrize(
    "rules",
    [
        {"injection": "linear"},
        {"exit_gate": True},
        {"recurrence_end": "norm"},
        {"norm_before_coda": True},
        {"initial_state": "normal"},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_of_one_loop_are_refused_for_two(rules):
    with pytest.raises(ValueError, match="has 2 loops, and what enters or leaves a recurrence"):
        replace(describe(phases=TWO_LOOPS), **rules)


def test_descriptions_of_other_schedules():
    d = describe(phases=TWO_LOOPS)
    assert d.document()["phases"][1] == {"parts": ({"stage": "first", "blocks": (1, 2)},), "times": 3}
    with pytest.raises(ValueError, match="no one core"):
        d.with_recurrences(3)
    with pytest.raises(ValueError, match="looped already"):
        d.with_loop(0, 1, 2)
    with pytest.raises(ValueError, match="does not run blocks 0 to 1"):
        describe(phases=(Phase("a", (1, 2)),))


def test_depths_are_selected_by_the_names_of_the_stages():
    d = describe(phases=TWO_LOOPS)
    assert select_depths(("first[1]@0,last", "second@1", "closing"), d) == (2, 6, 9, 12)
    with pytest.raises(ValueError, match="only the first and second have recurrences, the opening runs once"):
        select_depths(("opening@0",), d)
    with pytest.raises(ValueError, match=r"\(1,2x3,1,1x4,1\) has no core"):
        select_depths(("core",), d)
    with pytest.raises(ValueError, match="write all or STAGE"):
        select_depths(("third",), d)


def test_stores_name_stages_beside_the_common_ones():
    steps = list(Schedule(phases=TWO_STACKS).steps())
    _, stage, attributes = depth_coordinates(steps, None)["stage"]
    assert attributes["flag_meanings"] == "prelude core coda low high"
    assert stage.tolist() == [3, 3, 3, 3, 3, 3, 4, 4] * 2


class QueriesKeys(Plain):
    def __init__(self):
        self.by_depth = {}

    def attention(self, step, q_NHC, k_NKC, v_NKC, batch, scale):
        self.by_depth[step.depth] = (q_NHC, k_NKC)
        return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)


def by_hand(model, batch: Packed, run):
    """Returns which block ran at each depth, what it was given and left, float64, and what the head reads."""
    straights = [Straight(model) for _ in batch.lengths]
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def block(index, x_ND):
        parts = x_ND.split(batch.lengths)
        left_ND = torch.cat([s.block(part, index) for s, part in zip(straights, parts, strict=True)])
        calls.append((index, x_ND, left_ND))
        return left_ND

    weights = straights[0].weights
    end_ND = run(block, weights["embedding"][batch.token_id_N])
    return calls, straights[0].rms(end_ND, weights["final_norm"])


def distances(x_ND, reference_ND):
    return (x_ND - reference_ND).norm(dim=-1), torch.cosine_similarity(x_ND, reference_ND, dim=-1)


def test_what_reads_the_state_of_a_loop_is_not_to_be_had_of_two():
    absent = absent_quantities(describe(phases=TWO_LOOPS))
    assert set(absent) == {*GROUPS["lens"], *GROUPS["exit"]}
    assert "(1,2x3,1,1x4,1) has several loops" in absent["lens_kl"]


def test_memory_is_that_of_the_steps_in_loops():
    """Width 24 in float32 is 96 bytes; a pattern is 6 heads of 10 in float32 and 4 row sums, 256 bytes."""
    d, names = describe(phases=TWO_LOOPS), ("gap_norm", "attention_gap", "step_norm", "attention_step")
    assert kept_bytes(d, names, "float32") == (2 * 3 + 4) * (96 + 256)
    assert kept_bytes(d, names, "float32", last_only=True) == 3 * (96 + 256)
    assert before_bytes(d, names, "float32") == 3 * (96 + 256)


@pytest.mark.parametrize("runs_twice", [False, True], ids=["keep states", "run twice"])
@pytest.mark.parametrize("case", CASES)
def test_everything_is_measured_by_block(case, runs_twice):
    """Norms, steps and gaps against a loop written out, attention against its matrices."""
    phases, run, looped = CASES[case]
    d = describe(phases=phases)
    model = fill(LoopedModel(d))
    ids = torch.randint(d.vocab_size, (N,), generator=torch.Generator().manual_seed(1))
    batch, S, H = Packed(ids, LENGTHS), len(LENGTHS), d.num_heads
    values = {
        name: torch.full((d.depth, S, H) if name.startswith("attention") else (d.depth, N), float("nan"))
        for name in NAMES
    }
    heard, last = QueriesKeys(), None
    with torch.inference_mode():
        if runs_twice:
            last = LastStates(d, measures_attention=True, keeps_patterns=True)
            model(batch, last)
        head_input_ND = model(batch, Statistics(d, Buffers(values), last=last))
        model(batch, heard)
    calls, wanted_ND = by_hand(model, batch, run)
    torch.testing.assert_close(head_input_ND.double(), wanted_ND, atol=2e-5, rtol=2e-5)

    depths = defaultdict(list)  # by block
    for depth, (block, _, _) in enumerate(calls):
        depths[block].append(depth)
    maps = [reference.attention_matrix(*heard.by_depth[depth], LENGTHS) for depth in range(len(calls))]
    wanted = {name: torch.full_like(value.double(), float("nan")) for name, value in values.items()}
    for depth, (block, given_ND, left_ND) in enumerate(calls):
        wanted["residual_norm"][depth] = left_ND.norm(dim=-1)
        wanted["update_norm"][depth] = (left_ND - given_ND).norm(dim=-1)
        if block not in looped:
            continue
        end, visit = depths[block][-1], depths[block].index(depth)
        wanted["gap_norm"][depth], wanted["gap_cosine"][depth] = distances(left_ND, calls[end][2])
        for s in range(S):
            wanted["attention_gap"][depth, s] = (maps[depth][s] - maps[end][s]).norm(dim=(1, 2))
        if visit:
            before = depths[block][visit - 1]
            wanted["step_norm"][depth], wanted["step_cosine"][depth] = distances(left_ND, calls[before][2])
            for s in range(S):
                wanted["attention_step"][depth, s] = (maps[depth][s] - maps[before][s]).norm(dim=(1, 2))
    for name, value in values.items():
        torch.testing.assert_close(
            value.double(),
            wanted[name],
            atol=5e-5,
            rtol=5e-5,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
