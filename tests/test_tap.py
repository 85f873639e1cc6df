"""The tap that measures: which values it computes where, that no value depends on what else is asked for, and
that it keeps nothing of the model's.
"""

from dataclasses import replace

import pytest
import torch

from looptap.benchmarks.states_in_memory import StatesInMemory
from looptap.capture.models.load import find_model, load_model
from looptap.capture.models.tap import Packed, Plain
from looptap.capture.selection import select_depths
from looptap.capture.store.quantities import GROUPS, QUANTITIES
from looptap.capture.taps.statistics import Buffers, LastStates, Statistics
from looptap.kernels import reference

LENGTHS = (7, 70, 1, 7)  # 70: more than one block of queries
N = sum(LENGTHS)
BATCH = Packed(torch.randint(256, (N,), generator=torch.Generator().manual_seed(0)), LENGTHS)
INITIAL_ND = torch.randn(N, 32, generator=torch.Generator().manual_seed(1))


# exit gates belong to Ouro and scales to others, but every quantity is wanted of one model here
def small(recurrences: int = 4, dtype: str = "float32"):
    source = find_model(f"random:(2,3x{recurrences},1)I,norm=huginn,width=32,heads=4")
    description = replace(source.description, exit_gate=True, logit_scale=0.7)
    return source.origin.load(description, "cpu", getattr(torch, dtype))


def empty_buffers(model, names, **state) -> Buffers:
    d = model.description
    sizes = {"depth": d.depth, "depth_other": d.depth, "recurrence": d.recurrences, "head": d.num_heads}
    sizes |= {"token": N, "sequence": len(LENGTHS)}
    values = {}
    for name in names:
        rows, axis, *more = QUANTITIES[name].axes
        shape = [sizes[axis] for axis in (axis, rows, *more)]
        is_whole = QUANTITIES[name].dtype == "int32"
        values[name] = (
            torch.full(shape, -1, dtype=torch.int32) if is_whole else torch.full(shape, float("nan"))
        )
    return Buffers(values, **state)


def last_states(model, names=GROUPS["all"]) -> LastStates:
    measures_attention = any(name.startswith("attention_") for name in names)
    keeps_patterns = "attention_gap" in names
    tap = LastStates(model.description, measures_attention=measures_attention, keeps_patterns=keeps_patterns)
    with torch.inference_mode():
        model(BATCH, tap, INITIAL_ND)
    return tap


def measure(model, names=GROUPS["all"], **options) -> dict[str, torch.Tensor]:
    buffers = empty_buffers(model, names)
    with torch.inference_mode():
        model(BATCH, Statistics(model.description, buffers, model=model, **options), INITIAL_ND)
    return buffers.values


class Listening(Plain):
    """Copies of what passes through, by depth, and the passing tensors themselves."""

    def __init__(self):
        self.residuals, self.before, self.queries_keys, self.seen = {}, {}, {}, []
        self.loop_states = {}

    def attention(self, step, q_NHC, k_NKC, v_NKC, batch, scale):
        self.queries_keys[step.depth] = (q_NHC.clone(), k_NKC.clone(), v_NKC.clone())
        self.seen += [q_NHC, k_NKC, v_NKC]
        return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)

    def residual(self, step, half, x_ND, branch_ND, norms):
        if half == "attention":
            self.before[step.depth] = x_ND.clone()
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "mlp":
            self.residuals[step.depth] = result.residual_ND.clone()
        self.seen += [x_ND, branch_ND, *result]
        return result

    def loop_state(self, step, state_ND):
        self.loop_states[step.recurrence] = state_ND.clone()


def listen(model) -> Listening:
    tap = Listening()
    with torch.inference_mode():
        model(BATCH, tap, INITIAL_ND)
    return tap


def sequence_quantities(d, heard: Listening, values) -> dict[str, torch.Tensor]:
    """Quantities of whole sequences, from matrices written out."""
    wanted = {}
    for name in GROUPS["distances"]:
        wanted[name] = torch.full_like(values[name].double(), float("nan"))
    last = {step.layer: step.depth for step in d.steps() if step.recurrence == d.recurrences - 1}
    maps = [reference.attention_matrix(*heard.queries_keys[depth][:2], LENGTHS) for depth in range(d.depth)]
    states = [heard.residuals[depth].double().split(LENGTHS) for depth in range(d.depth)]
    for step in d.steps():
        for s in range(len(LENGTHS)):
            a_HTT, depth = maps[step.depth][s], step.depth
            if step.recurrence > 0:
                wanted["attention_step"][depth, s] = (a_HTT - maps[depth - d.core][s]).norm(dim=(1, 2))
            if step.recurrence >= 0:
                wanted["attention_gap"][depth, s] = (a_HTT - maps[last[step.layer]][s]).norm(dim=(1, 2))
            spectrum = torch.linalg.svdvals(states[depth][s]).square()
            wanted["residual_entropy"][depth, s] = torch.special.entr(spectrum / spectrum.sum()).sum()
            for other in range(d.depth):
                apart_HTT = a_HTT - maps[other][s]
                wanted["attention_distance"][depth, s, other] = apart_HTT.norm(dim=(1, 2)).mean()
                cosines_T = torch.cosine_similarity(states[depth][s], states[other][s], dim=-1, eps=0.0)
                wanted["residual_similarity"][depth, s, other] = cosines_T.mean()
    return wanted


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, undefined values in the same places."""
    return torch.equal(got.nan_to_num(nan=-7.0), wanted.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_statistic_is_what_its_definition_says(dtype):
    """Statistics are compared with copied residuals, queries and keys, in float64."""
    model = small(dtype=dtype)
    d, heard, values = model.description, listen(model), measure(model, sink_tokens=2)
    wanted = {name: torch.full_like(value.double(), float("nan")) for name, value in values.items()}
    layers = {step.layer: step.depth for step in d.steps() if step.recurrence == d.recurrences - 1}
    for step in d.steps():
        depth, x_ND = step.depth, heard.residuals[step.depth]
        of_residual = reference.residual_statistics(x_ND, heard.before[depth])
        wanted["residual_norm"][depth] = of_residual["norm"]
        wanted["residual_peak"][depth] = of_residual["peak"]
        wanted["update_norm"][depth] = of_residual["update_norm"]
        if step.recurrence > 0:
            of_step = reference.residual_statistics(x_ND, x_ND, heard.residuals[depth - d.core])
            wanted["step_norm"][depth] = of_step["step_norm"]
            wanted["step_cosine"][depth] = of_step["step_cosine"]
        if step.recurrence >= 0:
            of_gap = reference.residual_statistics(x_ND, x_ND, heard.residuals[layers[step.layer]])
            wanted["gap_norm"][depth] = of_gap["step_norm"]
            wanted["gap_cosine"][depth] = of_gap["step_cosine"]
        of_attention = reference.attention(*heard.queries_keys[depth], LENGTHS, sink_tokens=2)
        for name in ("entropy", "peak", "sink", "received"):
            wanted[f"attention_{name}"][depth] = of_attention[name]
    wanted |= sequence_quantities(d, heard, values)
    end_ND = model.read_out(heard.loop_states[d.recurrences - 1])
    left = torch.ones(N).double()
    for recurrence, state_ND in heard.loop_states.items():
        of_lens = reference.lens(model.read_out(state_ND), end_ND, model.head_weight, 0.7)
        for name in ("kl", "entropy", "token"):
            wanted[f"lens_{name}"][recurrence] = of_lens[name]
        gate_N = (
            state_ND.double() @ model.exit_gate_weight.double().T + model.exit_gate_bias.double()
        ).sigmoid()
        leaving = left * gate_N.squeeze(-1) if recurrence < d.recurrences - 1 else left
        wanted["exit_probability"][recurrence], left = leaving, left - leaving
    # bfloat16 attention outputs round otherwise with statistics than without, so the two runs drift apart
    tolerance = 2e-5 if dtype == "float32" else 0.05
    for name, value in values.items():
        assert value.dtype == (torch.int32 if name == "lens_token" else torch.float32)
        if name == "lens_token" and dtype == "bfloat16":
            same_share = (value == wanted[name]).double().mean()
            assert same_share > 0.9, "the two runs drift apart, but not to other tokens"
            continue
        if name == "attention_distance":  # from inner products: its square is what is exact
            value, wanted[name] = value.double().square(), wanted[name].square()
        torch.testing.assert_close(
            value.double(), wanted[name], atol=tolerance, rtol=tolerance, equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def test_undefined_values_stand_exactly_where_the_contract_says():
    model = small()
    steps = list(model.description.steps())
    for name, value in measure(model).items():
        undefined = value.isnan().flatten(1) if value.is_floating_point() else value == -1
        if "recurrence" in QUANTITIES[name].axes:
            assert not undefined.any(), name
            continue
        for step in steps:
            is_due = (
                step.recurrence > 0
                if name.startswith(("step_", "attention_step"))
                else step.recurrence >= 0
                if name.startswith(("gap_", "attention_gap"))
                else True
            )
            assert undefined[step.depth].eq(not is_due).all(), (name, step)


@pytest.mark.parametrize("recurrences", [1, 2, 5])  # 1: the first recurrence is the last
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeping_states_and_running_twice_agree_to_the_bit(recurrences, dtype):
    """They agree even if attention is measured, which then rounds otherwise than the plain one."""
    model = small(recurrences, dtype)
    some = (("lens_kl", "lens_token"), ("gap_norm", "lens_kl"), ("attention_gap",), ("attention_step",))
    for names in (GROUPS["all"], GROUPS["gaps"], *some):
        kept = measure(model, names)
        twice = measure(model, names, last=last_states(model, names))
        for name in names:
            assert same(kept[name], twice[name]), name


def test_the_last_recurrence_is_its_own_fixed_point():
    model = small()
    last = [s.depth for s in model.description.steps() if s.recurrence == model.description.recurrences - 1]
    for options in ({}, {"last": last_states(model)}):
        values = measure(model, **options)
        assert (values["gap_norm"][last] == 0).all()
        assert (values["gap_cosine"][last] == 1).all()
        assert (values["attention_gap"][last] == 0).all()
        assert (values["lens_kl"][-1] == 0).all() and (values["lens_kl"][0] > 0).all()
        # and the recurrence before it is one step away
        before = [depth - model.description.core for depth in last]
        torch.testing.assert_close(values["gap_norm"][before], values["step_norm"][last])
        torch.testing.assert_close(values["attention_gap"][before], values["attention_step"][last])


@pytest.mark.parametrize("name", GROUPS["all"])
def test_a_quantity_alone_has_the_values_it_has_among_all(name):
    model = small()
    alone, among = measure(model, (name,)), measure(model)[name]
    assert list(alone) == [name]
    torch.testing.assert_close(alone[name], among, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_sink_tokens():
    model = small()
    one, three, long = (
        measure(model, ("attention_sink", "attention_received"), sink_tokens=n) for n in (1, 3, 70)
    )
    first, _, alone, _ = one["attention_sink"].split(LENGTHS, dim=1)
    # a sequence's first key is all that its first query sees
    assert (first[:, 0] == 1).all() and (alone == 1).all()
    received = one["attention_received"].split(LENGTHS, dim=1)
    for part, keys in zip(one["attention_sink"].split(LENGTHS, dim=1), received, strict=True):
        torch.testing.assert_close(part.sum(1), keys[:, 0], atol=1e-4, rtol=0)
    for part, keys in zip(three["attention_sink"].split(LENGTHS, dim=1), received, strict=True):
        torch.testing.assert_close(part.sum(1), keys[:, :3].sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(long["attention_sink"], torch.ones_like(long["attention_sink"]))


# all tokens; a lone one of each sequence; a scattered few; none
ROWS = {"all": list(range(N)), "last": [6, 76, 77, 84], "few": [0, 3, 50, 84], "none": []}


@pytest.mark.parametrize("states", [("all",), ("core[all]@last",), ("core[-1]@0,2", "coda"), ("prelude[0]",)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_very_residuals(states, rows, dtype):
    model = small(dtype=dtype)
    d, heard = model.description, listen(model)
    depths = select_depths(states, d)
    kept = torch.full((len(depths), len(ROWS[rows]), d.width), float("nan"), dtype=model.dtype)
    rows_kept = torch.tensor(ROWS[rows], dtype=torch.int64)
    buffers = empty_buffers(model, ("residual_norm",), states=StatesInMemory(kept), state_rows=rows_kept)
    with torch.inference_mode():
        model(BATCH, Statistics(d, buffers, state_depths=depths), INITIAL_ND)
    for index, depth in enumerate(depths):
        assert torch.equal(kept[index], heard.residuals[depth][rows_kept])


def test_nothing_kept_shares_memory_with_the_model():
    """A buffer that is a view of an activation would keep it alive, or change with it."""
    model = small()
    d = model.description

    class Recording(Statistics):
        seen: list

        def attention(self, step, q_NHC, k_NKC, v_NKC, batch, scale):
            o_NHC = super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)
            self.seen += [q_NHC, k_NKC, v_NKC, o_NHC]
            return o_NHC

        def residual(self, step, half, x_ND, branch_ND, norms):
            result = super().residual(step, half, x_ND, branch_ND, norms)
            self.seen += [x_ND, branch_ND, *result]
            return result

    state = torch.zeros(d.depth, N, d.width)
    buffers = empty_buffers(model, GROUPS["all"], states=StatesInMemory(state))
    places = {name: value.data_ptr() for name, value in buffers.values.items()}
    tap = Recording(d, buffers, state_depths=range(d.depth), model=model)
    tap.seen = []
    with torch.inference_mode():
        model(BATCH, tap, INITIAL_ND)
    assert {name: value.data_ptr() for name, value in buffers.values.items()} == places
    theirs = {t.untyped_storage().data_ptr() for t in [*tap.seen, *model.parameters()]}
    kept = [*buffers.values.values(), state]
    assert not theirs & {t.untyped_storage().data_ptr() for t in kept}
    copies = [t.clone() for t in kept]
    with torch.inference_mode():
        for tensor in tap.seen:
            tensor.fill_(-3)
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


def test_last_states_are_the_last_recurrences_residuals_of_every_layer():
    model = small()
    d, heard, tap = model.description, listen(model), last_states(model, ())
    assert sorted(tap.states) == [d.prelude + layer for layer in range(d.core)]
    assert torch.equal(tap.end, heard.loop_states[d.recurrences - 1])
    for step in d.steps():
        if step.recurrence == d.recurrences - 1:
            assert torch.equal(tap.states[step.block], heard.residuals[step.depth])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not weights & {t.untyped_storage().data_ptr() for t in tap.states.values()}


def test_a_feedforward_model_has_neither_steps_nor_gaps():
    model = load_model("random:(3,0,0),width=32,heads=4")
    names = [name for name in GROUPS["all"] if "depth" in QUANTITIES[name].axes]
    buffers = empty_buffers(model, names)
    with torch.inference_mode():
        model(BATCH, Statistics(model.description, buffers))
    for name, value in buffers.values.items():
        undefined = ("step_", "gap_", "attention_step", "attention_gap")
        assert value.isnan().all() if name.startswith(undefined) else value.isfinite().all(), name


def test_buffers_are_filled_through_slices():
    """A unit's buffers are given to the tap batch by batch; a batch writes its own columns and no others."""
    model = small()
    whole = measure(model)
    buffers = empty_buffers(model, GROUPS["all"])
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for start, end in ((starts[0], starts[2]), (starts[2], starts[4])):
        lengths = LENGTHS[:2] if start == 0 else LENGTHS[2:]
        rows = {"token": slice(start, end), "sequence": slice(0, 2) if start == 0 else slice(2, 4)}
        here = {n: v[:, rows[QUANTITIES[n].axes[0]]] for n, v in buffers.values.items()}
        part = replace(buffers, values=here)
        with torch.inference_mode():
            model(
                Packed(BATCH.token_id_N[start:end], lengths),
                Statistics(model.description, part, model=model),
                INITIAL_ND[start:end],
            )
        if start == 0:
            for name, value in buffers.values.items():
                rest = value[:, 2 if QUANTITIES[name].axes[0] == "sequence" else end :]
                assert (rest.isnan() if rest.is_floating_point() else rest == -1).all(), name
    for name, value in whole.items():
        torch.testing.assert_close(buffers.values[name], value, atol=1e-5, rtol=1e-5, equal_nan=True)
