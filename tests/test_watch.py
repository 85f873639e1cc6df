"""A watched module's store: the numbers of our own model and of the authors' code, in a capture's layout."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import looptap
from looptap.analysis.analyze import write_analysis
from looptap.analysis.pages.report import write_report
from looptap.benchmarks.bench_settings import WatchBench
from looptap.benchmarks.bench_watch import bench_watch, compare
from looptap.capture.models.draws import draw_initial_state
from looptap.capture.models.load import load_model
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.quantities import QUANTITIES
from looptap.capture.store.writing.commit import Store
from looptap.capture.watch.structure import find_structure, show_order
from looptap.cli.tables import print_store
from looptap.errors import WatchError
from looptap.tests.golden_files import GOLDEN, stored
from looptap.tests.watched_modules import (
    golden_ouro,
    make_looped,
    sequence_values,
    tiny_llama,
    with_weights_of,
)

MEASURED = ("residual", "steps", "gaps", "attention")
MATRIX = {
    "entropy": lambda a: torch.special.entr(a).sum(-1),
    "peak": lambda a: a.amax(-1),
    "sink": lambda a: a[..., 0],
    "received": lambda a: a.sum(-2),
}


def assert_same_store(watched: xr.Dataset, captured: xr.Dataset, tolerance=1e-5) -> None:
    """Every array and coordinate of a capture, with the same gaps."""
    assert watched.sizes == captured.sizes
    assert set(watched.variables) == set(captured.variables)
    for name in captured.variables:
        got, wanted = watched[name], captured[name]
        assert got.dims == wanted.dims and got.dtype == wanted.dtype and got.attrs == wanted.attrs, name
        np.testing.assert_allclose(got.values, wanted.values, atol=tolerance, rtol=tolerance, err_msg=name)


def assert_golden(dataset: xr.Dataset, name: str, places: list[str]) -> None:
    """Residuals and attention of the two stored sequences, at every depth."""
    reference = stored(name, "reference")
    assert dataset.sizes["depth"] == len(places)
    for row in range(2):
        for depth, place in enumerate(places):
            state_TD = sequence_values(dataset, "state", row)[:, depth]
            residual_TD = reference[f"residual.{place}"][row]
            torch.testing.assert_close(state_TD, residual_TD, atol=1e-4, rtol=0)
            a_HTT = reference[f"attn.{place}"][row].double()
            for what, of_matrix in MATRIX.items():
                got_TH = sequence_values(dataset, f"attention_{what}", row)[:, depth]
                torch.testing.assert_close(got_TH, of_matrix(a_HTT).T.float(), atol=1e-4, rtol=0)


def test_a_transformers_llama_is_the_golden_one_and_our_own():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", attn_implementation="sdpa").eval()
    ids_ST = stored("llama", "inputs")["input_ids"].long()
    with torch.no_grad():
        plain = model(ids_ST).logits
        with looptap.watch(model, "model.layers.*", states=["all"], sink_tokens=1) as watched:
            assert torch.equal(model(ids_ST).logits, plain)
    assert_golden(watched.dataset(), "llama", [f"r0.l{layer}" for layer in range(5)])
    own = looptap.capture(str(GOLDEN / "llama"), ids_ST.tolist(), states=("all",))
    assert_same_store(watched.dataset(), own)


def test_the_golden_ouro_in_a_module_written_by_hand():
    module, ids_ST = golden_ouro(), stored("ouro", "inputs")["input_ids"].long()
    with torch.no_grad():
        plain = module(ids_ST)
        with looptap.watch(module, "core.*", states="all") as watched:
            assert torch.equal(module(ids_ST), plain)
    assert watched.notation == "(0,3x4,0)"
    places = [f"r{recurrence}.l{layer}" for recurrence in range(4) for layer in range(3)]
    assert_golden(watched.dataset(), "ouro", places)
    own = looptap.capture(str(GOLDEN / "ouro"), ids_ST.tolist(), quantities=MEASURED, states=("all",))
    assert_same_store(watched.dataset(), own, tolerance=5e-5)  # twelve blocks' rounding: up to 1.6e-5


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_loop_with_injection_is_our_own(context):
    """Prelude, core, coda and an injection, as a nested Python loop."""
    spec = "random:(1,2x4,2)I,width=32,heads=4,gain=1"
    model = load_model(spec)
    d, rows, lengths = model.description, [5, 0, 3], (17, 17, 17)
    ids_ST = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    state_ND = draw_initial_state(0, range(3), lengths, d.width, d.initial_std)
    module = with_weights_of(model)
    with context():
        plain = module(ids_ST, state_ND.view(3, 17, -1))
        with looptap.watch(module, states=["core[-1]@0,last", "coda"], tokens="every:5") as watched:
            assert torch.equal(module(ids_ST, initial_state=state_ND.view(3, 17, -1)), plain)
    own = looptap.capture(spec, ids_ST.tolist(), states=("core[-1]@0,last", "coda"), tokens="every:5")
    assert watched.notation == "(1,2x4,2)" and len(rows) == watched.num_sequences
    assert_same_store(watched.dataset(), own)
    assert own.sizes["depth_state"] == 4


@pytest.mark.parametrize("tokens", ["all", "last", "sample:0.4"])
def test_kept_tokens_are_those_of_a_capture(tokens):
    """Rows of different calls and lengths: units, slots and samples go by sequence id."""
    spec = "random:(0,2x2,0),width=16,heads=2"
    module = with_weights_of(load_model(spec))
    rows = [[*range(n)] for n in (9, 4, 1, 30)]
    with torch.no_grad(), looptap.watch(module, states=["core@last"], tokens=tokens, seed=5) as watched:
        for row in rows:
            module(torch.tensor([row]))
    own = looptap.capture(spec, rows, states=("core@last",), tokens=tokens, seed=5)
    assert_same_store(watched.dataset(), own)


def test_rows_of_several_calls_are_numbered_in_order():
    module = make_looped()
    with torch.no_grad(), looptap.watch(module, quantities="residual_norm") as watched:
        module(torch.arange(12).view(3, 4))
        assert watched.num_sequences == 3
        module(torch.arange(20, 26).view(1, 6))
    dataset = watched.dataset()
    assert watched.num_sequences == 4 and list(dataset.data_vars) == ["residual_norm"]
    kept = dataset["sequence_length"].values > 0
    assert sorted(dataset["sequence_id"].values[kept]) == [0, 1, 2, 3]
    assert sequence_values(dataset, "token_id", 1).tolist() == [4, 5, 6, 7]
    assert sequence_values(dataset, "token_id", 3).tolist() == [*range(20, 26)]
    assert sequence_values(dataset, "token_position", 3).tolist() == [*range(6)]


@pytest.mark.slow
def test_ids_are_those_of_the_input():
    """Ids are found by name, place or keyword; never a mask, positions or labels; -1 for embeddings."""
    model, ids = tiny_llama(), torch.arange(1, 9).view(1, 8)
    embedded = model.get_input_embeddings()(ids)
    calls = [
        (lambda: model(ids), ids),
        (lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)), ids),
        (lambda: model(attention_mask=torch.ones_like(ids), inputs_embeds=embedded, labels=ids), None),
        (lambda: model(position_ids=torch.arange(8)[None], inputs_embeds=embedded), None),
    ]
    for call, wanted in calls:
        with torch.no_grad(), looptap.watch(model, "model.layers.*") as watched:
            call()
        got = sequence_values(watched.dataset(), "token_id", 0).tolist()
        assert got == ([-1] * 8 if wanted is None else wanted[0].tolist())


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["position_ids", "tokens"], True),
        (["token_type_ids", "tokens"], True),
        (["tokens", "labels"], True),
        (["inputs_embeds", "order"], False),
    ],
)
def test_ids_of_a_module_that_names_them_otherwise(names, wanted):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_looped()

        def forward(self, position_ids=None, token_type_ids=None, tokens=None, labels=None, **more):
            return self.inner(torch.zeros(1, 5, dtype=torch.long))

    ids = torch.arange(3, 8)[None]
    others = torch.arange(5)[None]
    given = {name: ids if name == "tokens" else others for name in names}
    with torch.no_grad(), looptap.watch(Module(), "inner.*.*") as watched:
        watched._module(**given)
    found = sequence_values(watched.dataset(), "token_id", 0).tolist()
    assert found == (ids[0].tolist() if wanted else [-1] * 5)


def test_residuals_that_a_module_changes_in_place():
    """A block may add to its input, a module to what a block left: neither is what was measured."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            x += self.inner(x)
            return x

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(InPlace() for _ in range(2))

        def forward(self, x):
            x = x.clone()
            for _ in range(3):
                for layer in self.layers:
                    x = layer(x)
                x.mul_(0.5)
            return x

    torch.manual_seed(0)
    module, x, states = Module(), torch.randn(2, 5, 8), []
    state, updates = x, []
    for _ in range(3):
        for layer in module.layers:
            updates.append(layer.inner(state))
            state = state + updates[-1]
            states.append(state)
        state = state * 0.5
    with (
        torch.no_grad(),
        looptap.watch(module, "layers.*", quantities=["residual", "steps", "gaps"]) as watched,
    ):
        module(x)
    dataset = watched.dataset()
    for row in range(2):
        wanted = {
            "residual_norm": [s.norm(dim=-1)[row] for s in states],
            "residual_peak": [s.abs().amax(-1)[row] for s in states],
            "update_norm": [u.norm(dim=-1)[row] for u in updates],
            "gap_norm": [(s - states[4 + i % 2]).norm(dim=-1)[row] for i, s in enumerate(states)],
            "step_norm": [(s - states[i - 2]).norm(dim=-1)[row] for i, s in enumerate(states)],
            "step_cosine": [
                torch.cosine_similarity(s, states[i - 2], dim=-1)[row] for i, s in enumerate(states)
            ],
        }
        for name, columns in wanted.items():
            got_TX = sequence_values(dataset, name, row)
            columns_TX = torch.stack(columns, 1)
            if name.startswith("step"):
                assert got_TX[:, :2].isnan().all()
                got_TX, columns_TX = got_TX[:, 2:], columns_TX[:, 2:]
            torch.testing.assert_close(got_TX, columns_TX, atol=1e-5, rtol=1e-5)


def test_steps_alone_are_those_with_gaps():
    """Steps alone keep one state a block, gaps one a recurrence."""
    ids, found = torch.arange(18).view(2, 9), []
    for quantities, most in ((["steps"], 1), (["steps", "gaps"], 3)):
        module, kept = make_looped(), []
        with torch.no_grad(), looptap.watch(module, quantities=quantities) as watched:
            recorder = watched._recorder

            def count(*_, recorder=recorder, kept=kept):
                kept.append(max(map(len, recorder._pass.history._states.values())))

            module.head.register_forward_pre_hook(count)
            module(ids)
            module(ids + 20)
        assert kept == [most, most]
        found.append(watched.dataset()["step_norm"].values)
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0][:9, 3:7]).all()


@pytest.mark.slow
def test_everything_that_reads_stores_reads_this_one(tmp_path, capsys):
    module, path = make_looped(), tmp_path / "run.zarr"
    with torch.no_grad(), looptap.watch(module, states=["core@last"], store=path, name="my loop") as watched:
        for first in (0, 7):
            module(torch.arange(first, first + 40).view(2, 20))
    dataset, opened = watched.dataset(), looptap.open(path)
    assert_same_store(opened, dataset, tolerance=0)
    plan = opened.attrs["plan"]
    assert plan["model"]["notation"] == "(1,2x3,1)" and plan["model"]["name"] == "my loop"
    assert plan["model"]["num_parameters"] == sum(p.numel() for p in module.parameters())
    assert plan["model"]["blocks"] == ["prelude.0", *["core.0", "core.1"] * 3, "coda.0"]
    assert plan["hash"] == dataset.attrs["plan"]["hash"]
    report = verify_store(path)
    assert report.ok and not report.units_missing
    status = store_status(path)
    assert status.complete and status.num_tokens == 80 and status.num_sequences == 4
    assert status.num_non_finite == 0
    print_store(path)
    assert "my loop  (1,2x3,1)" in capsys.readouterr().out
    names = {written.name for written in write_analysis(path, tmp_path / "out")}
    assert any(name.startswith("stages_by_depth") for name in names)
    page = write_report([path], tmp_path / "report.html").read_text()
    assert "my loop" in page and "the module was watched" in page


def test_the_plan_knows_the_weights():
    found = []
    for change in (0.0, 0.0, 1e-3):
        module = make_looped()
        with torch.no_grad(), looptap.watch(module) as watched:
            module.head.weight[3, 1] += change
            module(torch.arange(6)[None])
        found.append(watched.dataset().attrs["plan"]["model"]["weights_sha256"])
    assert found[0] == found[1] != found[2]


def test_non_finite_values_are_counted(tmp_path):
    module = make_looped()
    added = torch.zeros(1, 6, 16)
    added[0, 4, 7] = float("inf")  # to the coda's residual of one token; nothing follows that spreads it
    module.coda[0].down.register_forward_hook(lambda *_: added)
    with torch.no_grad(), looptap.watch(module, states=["coda"], store=tmp_path / "run.zarr"):
        module(torch.arange(6)[None])
    entry = Store.open(tmp_path / "run.zarr").entry(0)
    assert entry["non_finite"] == {"residual_norm": 1, "residual_peak": 1, "update_norm": 1, "state": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_non_finite_states_of_half_precision_are_counted(dtype, tmp_path):
    module = make_looped(prelude=0, core=1, recurrences=2, coda=0, has_injection=False).to(dtype)
    huge = torch.zeros(1, 3, 16, dtype=dtype)
    huge[0, 2] = torch.tensor([float("nan"), float("inf"), -float("inf"), *range(13)])
    module.core[0].register_forward_hook(lambda *_: huge)
    with torch.no_grad(), looptap.watch(module, states=["core@last"], store=tmp_path / "run.zarr"):
        module(torch.arange(3)[None])
    entry = Store.open(tmp_path / "run.zarr").entry(0)
    assert entry["non_finite"]["state"] == 3
    assert entry["non_finite"]["step_norm"] == 1 and entry["non_finite"]["gap_norm"] == 2


def test_nothing_kept_holds_more_than_it_is():
    """Rows are arrays of their own, not views of a batch."""
    module = make_looped()
    with torch.no_grad(), looptap.watch(module, states=["core@last"], tokens="last") as watched:
        module(torch.arange(40).view(2, 20))
    for sequence in watched._recorder.sequences:
        for name in ("residual_norm", "attention_received", "gap_norm"):
            base = sequence[name].base
            assert base is None or base.nbytes <= sequence[name].nbytes
        assert sum(part.nbytes for part in sequence.states) == 2 * 16 * 4


# --- the loop, from the order of calls

NAMES = "abcdefgh"


@pytest.mark.parametrize(
    ("calls", "notation"),
    [
        ("a", "(1,0,0)"),
        ("abc", "(3,0,0)"),
        ("aa", "(0,1x2,0)"),
        ("abab", "(0,2x2,0)"),
        ("abcbcbcd", "(1,2x3,1)"),
        ("abbbc", "(1,1x3,1)"),
        ("cabab", "(1,2x2,0)"),
        ("ababcde", "(0,2x2,3)"),
    ],
)
def test_structure_of_calls(calls, notation):
    structure = find_structure([NAMES.index(name) for name in calls], NAMES)
    assert structure.notation == notation and structure.depth == len(calls)
    steps = list(structure.steps())
    assert [step.depth for step in steps] == [*range(len(calls))]
    where = {}
    for step, name in zip(steps, calls, strict=True):
        assert where.setdefault((step.stage, step.layer), name) == name
    core = [step for step in steps if step.stage == "core"]
    assert [step.recurrence for step in core] == [
        r for r in range(structure.recurrences) for _ in range(structure.core)
    ]


@pytest.mark.parametrize(
    "calls",
    [
        "aabb",  # two loops
        "aba",  # a cycle cut short
        "abacab",  # another rhythm
        "aabaab",  # a loop in a loop
        "abab" + "a",
        "abba",
    ],
)
def test_other_orders_are_refused(calls):
    with pytest.raises(WatchError, match=r"not one cycle.*: a.*calls\); name the blocks of one loop"):
        find_structure([NAMES.index(name) for name in calls], NAMES)


def test_a_long_order_is_shortened():
    with pytest.raises(WatchError, match=r": a, b, a x40 \(42 calls\)"):
        find_structure([0, 1, *[0] * 40], NAMES)
    names = ["p", *(f"m.layers.{index}" for index in range(16)), "0", "1"]
    layers = [*range(1, 17)]
    assert show_order([0, *layers, *layers, 5], names) == "p, m.layers.0-15 x2, m.layers.4 (34 calls)"
    assert show_order([17, 18, 17, 1, 3, 2], names) == "0-1, 0, m.layers.0, m.layers.2, m.layers.1 (6 calls)"
    assert show_order([1, 3] * 7, names) == f"{'m.layers.0, m.layers.2, ' * 6}… (14 calls)"


@pytest.mark.parametrize(
    "blocks",
    [
        ["prelude.*", "core.*", "coda.0"],
        "*.*",
        ["coda.*", "prelude.0", "core.1", "core.0"],
        lambda module: module.blocks,
        lambda module: [module.core, module.prelude, module.coda[0]],
        None,
    ],
)
def test_blocks_are_found(blocks):
    module = make_looped()
    given = blocks(module) if callable(blocks) else blocks
    with torch.no_grad(), looptap.watch(module, given, quantities="update_norm") as watched:
        module(torch.arange(5)[None])
    assert watched.notation == "(1,2x3,1)"
    assert watched.dataset().attrs["plan"]["model"]["blocks"][:3] == ["prelude.0", "core.0", "core.1"]


def test_layers_that_stand_several_times_in_one_list():
    """A window looped by repeating its modules, as users do with transformers."""
    model = tiny_llama(num_hidden_layers=4)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], *[layers[1], layers[2]] * 3, layers[3]])
    model.config.num_hidden_layers = 8
    ids = torch.arange(1, 11).view(1, 10)
    with torch.no_grad(), looptap.watch(model, "model.layers.*") as watched:
        model(ids, use_cache=False)
    assert watched.notation == "(1,2x3,1)"
    assert np.isfinite(watched.dataset()["gap_norm"].values[:10, 1:7]).all()


def test_a_part_of_the_blocks_is_a_smaller_model():
    module = make_looped()
    with torch.no_grad(), looptap.watch(module, "core.1") as watched:
        module(torch.arange(5)[None])
    assert watched.notation == "(0,1x3,0)"


def test_the_module_itself_may_be_the_block():
    module = make_looped().core[0]
    with torch.no_grad(), looptap.watch(module, module) as watched:
        module(torch.randn(2, 7, 16))
    assert watched.notation == "(1,0,0)" and watched.num_sequences == 2


def test_the_benchmark_compares_what_it_times(capsys):
    bench_watch(WatchBench(model=str(GOLDEN / "llama"), loop="1-3x2", sequences=2, length=20, rounds=1))
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert "(1,3x2,1)" in table[0] and record["num_tokens"] == 40
    assert set(record["largest_difference"]) == {q.name for q in QUANTITIES.values() if q.group in MEASURED}
    assert max(record["largest_difference"].values()) < 1e-5
    assert set(record["time_ratio"]) == {"transformers", "own"}


def test_the_benchmark_notices_a_difference():
    def change(dataset, name, value):
        changed = dataset.copy(deep=True)
        changed[name].values[1, 2] = value
        return changed

    module = make_looped()
    with torch.no_grad(), looptap.watch(module, quantities=["residual"]) as watched:
        module(torch.arange(6)[None])
    one = watched.dataset()
    assert max(compare(one, one).values()) == 0
    assert compare(change(one, "residual_peak", 9.0), one)["residual_peak"] > 0.1
    with pytest.raises(ValueError, match="residual_norm has other values missing"):
        compare(change(one, "residual_norm", float("nan")), one)
