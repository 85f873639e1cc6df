"""Whole captures: what stands in the finished store is what the model did, however the work was cut up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file

import looptap
from looptap.capture.engines.events import UnitDone
from looptap.capture.models.draws import draw_initial_state
from looptap.capture.models.load import find_model, load_model
from looptap.capture.models.tap import Packed, Plain
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.quantities import GROUPS, QUANTITIES
from looptap.capture.store.writing.commit import Store
from looptap.capture.worker import Worker

GOLDEN = Path(__file__).parent / "golden"
TINY = "random:(1,2x4,1)I,norm=huginn,width=32,heads=4"
LENGTHS = (5, 0, 30, 12, 12, 1, 19, 7)
CAPTURED = tuple(name for name in GROUPS["all"] if name != "exit_probability")  # TINY has no gate
ROWS = [[(31 * i + 7 * j) % 256 for j in range(n)] for i, n in enumerate(LENGTHS)]


def sequences(dataset: xr.Dataset, name: str) -> dict[int, np.ndarray]:
    """A quantity's rows by sequence id, in order of position; the one row of a whole sequence's."""
    ids, owners = dataset["sequence_id"].values, dataset["token_sequence"].values
    if dataset[name].dims[0] == "sequence":
        owners = np.arange(len(ids))
    return {int(ids[q]): dataset[name].values[owners == q] for q in np.flatnonzero(ids >= 0)}


def reference_by_depth(name: str, kind: str) -> torch.Tensor:
    """A fixture's tensors of one kind, [depth, S, ...], in the order the blocks ran."""
    reference = load_file(GOLDEN / name / "reference.safetensors")
    found = []
    for step in find_model(str(GOLDEN / name)).description.steps():
        in_stage = f"{kind}.{step.stage}.l{step.layer}"
        in_loop = f"{kind}.r{max(step.recurrence, 0)}.l{step.layer}"
        found.append(reference[in_stage if in_stage in reference else in_loop])
    return torch.stack(found)


@pytest.mark.parametrize(
    "name", ["llama", "olmo2", "ouro", "huginn", "retro-tinyllama", "retro-llama32", "retro-olmo2"]
)
def test_the_store_holds_what_the_authors_code_computed(name):
    """The fixture's inputs as they lie there, through plan, worker and store."""
    inputs = GOLDEN / name / "inputs.safetensors"
    has_states = "input_states" in load_file(inputs)
    dataset = looptap.capture(
        str(GOLDEN / name), inputs, quantities=("all",), states=("all",), unit_tokens=32,
        initial_state=str(inputs) if has_states else None,
    )  # fmt: skip
    assert dataset.sizes["unit"] == 2
    d = find_model(str(GOLDEN / name)).description
    x_DSTX = reference_by_depth(name, "residual")
    a_DSHTT = reference_by_depth(name, "attn").double()
    wanted_DST = {
        "state": x_DSTX,
        "residual_norm": x_DSTX.norm(dim=-1),
        "residual_peak": x_DSTX.abs().amax(-1),
        "attention_entropy": torch.special.entr(a_DSHTT).sum(-1).mT,
        "attention_peak": a_DSHTT.amax(-1).mT,
        "attention_sink": a_DSHTT[..., 0].mT,
        "attention_received": a_DSHTT.sum(-2).mT,
    }
    if d.core:
        core = slice(d.prelude, d.prelude + d.core * d.recurrences)
        x_RLSTX = x_DSTX[core].unflatten(0, (d.recurrences, d.core))
        undefined = torch.full(x_DSTX.shape[:3], float("nan"))
        for kind, other in (("step", x_RLSTX.roll(1, 0)), ("gap", x_RLSTX[-1:].expand_as(x_RLSTX))):
            norm, cosine = undefined.clone(), undefined.clone()
            norm[core] = (x_RLSTX - other).norm(dim=-1).flatten(0, 1)
            cosine[core] = torch.cosine_similarity(x_RLSTX, other, dim=-1).flatten(0, 1)
            if kind == "step":
                first = slice(d.prelude, d.prelude + d.core)
                norm[first] = cosine[first] = float("nan")
            wanted_DST |= {f"{kind}_norm": norm, f"{kind}_cosine": cosine}
    assert_sequence_quantities(dataset, d, a_DSHTT, x_DSTX.double())
    for quantity, values in wanted_DST.items():
        for sequence_id, stored in sequences(dataset, quantity).items():
            wanted = values[:, sequence_id].transpose(0, 1).float().numpy()
            np.testing.assert_allclose(stored, wanted, atol=1e-4, rtol=1e-5, err_msg=quantity)


def assert_sequence_quantities(dataset, d, a_DSHTT, x_DSTX) -> None:
    """Distances between the authors' attention matrices, and between their residuals."""
    apart_DDSH = torch.stack([(a_DSHTT - a_SHTT).norm(dim=(-2, -1)) for a_SHTT in a_DSHTT])
    unit_DSTX = x_DSTX / x_DSTX.norm(dim=-1, keepdim=True)
    share_DSM = torch.linalg.svdvals(x_DSTX).square()
    share_DSM = share_DSM / share_DSM.sum(-1, keepdim=True)
    wanted_SD = {
        "attention_distance": apart_DDSH.mean(-1).permute(2, 0, 1),
        "residual_similarity": torch.einsum("astx,bstx->sab", unit_DSTX, unit_DSTX) / x_DSTX.shape[2],
        "residual_entropy": torch.special.entr(share_DSM).sum(-1).T,
    }
    if d.core:
        step, gap = torch.full((2, *a_DSHTT.shape[:3]), float("nan")).double()
        for depth in range(d.prelude, d.prelude + d.core * d.recurrences):
            last = d.prelude + d.core * (d.recurrences - 1) + (depth - d.prelude) % d.core
            gap[depth] = apart_DDSH[depth, last]
            if depth >= d.prelude + d.core:
                step[depth] = apart_DDSH[depth, depth - d.core]
        wanted_SD |= {"attention_step": step.transpose(0, 1), "attention_gap": gap.transpose(0, 1)}
    for name, values in wanted_SD.items():
        for sequence_id, (stored,) in sequences(dataset, name).items():
            np.testing.assert_allclose(stored, values[sequence_id], atol=1e-4, err_msg=name)


def test_the_store_holds_what_the_authors_gate_and_head_computed():
    """Ouro's code reads every recurrence out; so do its exit gate and our lens."""
    reference = load_file(GOLDEN / "ouro" / "reference.safetensors")
    dataset = looptap.capture(
        str(GOLDEN / "ouro"), GOLDEN / "ouro" / "inputs.safetensors", quantities=("all",)
    )
    log_p_RSTV = torch.stack([reference[f"step_logits.r{r}"] for r in range(4)]).double().log_softmax(-1)
    p_RSTV = log_p_RSTV.exp()
    wanted = {
        "exit_probability": reference["exit_pdf"],
        "lens_kl": (p_RSTV * (log_p_RSTV - log_p_RSTV[-1])).sum(-1).permute(1, 2, 0),
        "lens_entropy": -(p_RSTV * log_p_RSTV).sum(-1).permute(1, 2, 0),
    }
    for name, values_STR in wanted.items():
        for sequence_id, stored in sequences(dataset, name).items():
            np.testing.assert_allclose(stored, values_STR[sequence_id], atol=1e-4, err_msg=name)
    token_STR = p_RSTV.argmax(-1).permute(1, 2, 0)
    for sequence_id, stored in sequences(dataset, "lens_token").items():
        assert np.array_equal(stored, token_STR[sequence_id])


@pytest.mark.parametrize("name", ["huginn", "retro-llama32"])
def test_the_lens_reads_loop_states_through_the_files_own_norm_and_head(name):
    """Written out from the authors' states and the files' tensors, eps and all."""
    inputs = GOLDEN / name / "inputs.safetensors"
    reference = load_file(GOLDEN / name / "reference.safetensors")
    files = sorted((GOLDEN / name).glob("model*.safetensors"))
    weights = {key: t.double() for file in files for key, t in load_file(file).items()}
    eps = json.loads((GOLDEN / name / "config.json").read_text())["norm_eps"]
    core = find_model(str(GOLDEN / name)).description.core
    x_RSTD = torch.stack([reference[f"residual.r{r}.l{core - 1}"] for r in range(4)]).double()
    normed = (
        weights["transformer.ln_f.weight"] * x_RSTD / (x_RSTD.square().mean(-1, keepdim=True) + eps).sqrt()
    )
    log_p_RSTV = (normed @ weights["lm_head.weight"].T).log_softmax(-1)
    p_RSTV = log_p_RSTV.exp()
    dataset = looptap.capture(
        str(GOLDEN / name), inputs, quantities=("lens",), initial_state=str(inputs), unit_tokens=32
    )
    wanted = {
        "lens_kl": (p_RSTV * (log_p_RSTV - log_p_RSTV[-1])).sum(-1).permute(1, 2, 0),
        "lens_entropy": -(p_RSTV * log_p_RSTV).sum(-1).permute(1, 2, 0),
    }
    for quantity, values_STR in wanted.items():
        for sequence_id, stored in sequences(dataset, quantity).items():
            np.testing.assert_allclose(stored, values_STR[sequence_id], atol=1e-4, err_msg=quantity)


def test_a_beginning_sees_what_the_whole_sees():
    """Sequences of several lengths, in units that mix them."""
    ids_ST = load_file(GOLDEN / "llama" / "inputs.safetensors")["input_ids"].tolist()
    rows = [ids_ST[0][:5], ids_ST[1], ids_ST[0][:24], ids_ST[1][:3]]
    model = str(GOLDEN / "llama")
    dataset = looptap.capture(model, rows, states=("all",), quantities=("residual",), unit_tokens=32)
    assert dataset.sizes["unit"] == 2
    residual_DSTX, states = reference_by_depth("llama", "residual"), sequences(dataset, "state")
    for sequence_id, s, length in ((0, 0, 5), (1, 1, 24), (2, 0, 24), (3, 1, 3)):
        wanted = residual_DSTX[:, s, :length].transpose(0, 1).numpy()
        np.testing.assert_allclose(states[sequence_id], wanted, atol=1e-4)


def test_steps_and_gaps_of_a_feedforward_model_are_undefined():
    dataset = looptap.capture(str(GOLDEN / "llama"), [[1, 2, 3]], quantities=("steps", "gaps"))
    for name in (*GROUPS["steps"], *GROUPS["gaps"]):
        assert dataset[name].isnull().all()


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    """Everything in one unit and one batch."""
    dataset = looptap.capture(TINY, ROWS, quantities=("all",), states=("all",), unit_tokens=96, seed=3)
    assert dataset.sizes["unit"] == 1
    return dataset


@pytest.mark.parametrize(
    "settings",
    [
        {"unit_tokens": 32},
        {"unit_tokens": 96, "batch_tokens": 1},
        {"unit_tokens": 43, "batch_tokens": 20},
        {"unit_tokens": 4096, "batch_tokens": 31, "gap_memory_gib": 0.0},
    ],
)
def test_values_do_not_depend_on_units_and_batches(whole, settings):
    dataset = looptap.capture(TINY, ROWS, quantities=("all",), states=("all",), seed=3, **settings)
    assert sorted(sequences(dataset, "state")) == [i for i, n in enumerate(LENGTHS) if n]
    for name in (*CAPTURED, "state"):
        wanted = sequences(whole, name)
        for sequence_id, values in sequences(dataset, name).items():
            is_whole = QUANTITIES[name].axes[0] == "sequence"
            assert len(values) == (1 if is_whole else LENGTHS[sequence_id])
            np.testing.assert_allclose(values, wanted[sequence_id], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("quantities", [("all",), ("residual", "gaps")])
def test_running_the_loop_twice_changes_no_bit(quantities):
    """The model is in bfloat16, where two ways of computing attention would show in the second digit."""
    kept, twice = (
        looptap.capture(
            TINY, ROWS, quantities=quantities, dtype="bfloat16", gap_memory_gib=bound, batch_tokens=64
        )  # the same batches: without a number, maps would take fewer tokens within less memory
        for bound in (1.0, 0.0)
    )
    methods = [dataset.attrs["plan"]["gap_method"] for dataset in (kept, twice)]
    assert methods == ["keep states", "run twice"]
    for name in kept.data_vars:
        np.testing.assert_array_equal(twice[name].values, kept[name].values, err_msg=name)


def test_empty_slots_read_as_missing(whole):
    dataset = looptap.capture(TINY, ROWS, quantities=("all",), states=("all",), unit_tokens=40, seed=3)
    empty = {"token": dataset["token_sequence"].values < 0, "sequence": dataset["sequence_id"].values < 0}
    assert empty["token"].any() and empty["sequence"].any()
    for name in (*CAPTURED, "state"):
        values, is_empty = dataset[name].values, empty[QUANTITIES[name].axes[0]]
        if name == "lens_token":
            assert (values[is_empty] == -1).all() and (values[~is_empty] >= 0).all()
            continue
        assert np.isnan(values[is_empty]).all()
        if not name.startswith(("step_", "gap_", "attention_step", "attention_gap")):
            assert np.isfinite(values[~is_empty]).all()


class FirstInput(Plain):
    """What enters the first core block: an injection of the state that was drawn."""

    entering_ND: torch.Tensor

    def residual(self, step, half, x_ND, branch_ND, norms):
        if (step.stage, step.layer, step.recurrence, half) == ("core", 0, 0, "attention"):
            self.entering_ND = x_ND
        return super().residual(step, half, x_ND, branch_ND, norms)


def test_initial_states_belong_to_sequence_and_position():
    """The same for any company, order and length, and otherwise all different."""
    together = draw_initial_state(7, [3, 0, 12], [4, 9, 2], 16, 0.5)
    for sequence_id, part in zip([3, 0, 12], together.split([4, 9, 2]), strict=True):
        assert torch.equal(draw_initial_state(7, [sequence_id], [len(part)], 16, 0.5), part)
        longer = draw_initial_state(7, [sequence_id], [40], 16, 0.5)
        assert torch.equal(longer[: len(part)], part)
    assert len(together.flatten().unique()) > 0.99 * together.numel()
    assert not torch.equal(draw_initial_state(8, [3], [4], 16, 0.5), together[:4])
    many = draw_initial_state(0, range(40), [50] * 40, 64, 0.5)
    n = many.numel()
    assert abs(many.mean()) < 5 * 0.5 * n**-0.5 and abs(many.std() / 0.5 - 1) < 5 * n**-0.5


@pytest.mark.parametrize("unit_tokens", [32, 45, 96])
def test_workers_draw_the_same_initial_states_for_any_units(tmp_path, unit_tokens):
    """Through a worker's own inputs, unit by unit, last unit first."""
    (tmp_path / "data.txt").write_bytes(b"\n".join(bytes(97 + t % 20 for t in row) for row in ROWS))
    plan = make_plan(
        CaptureSettings.of(
            model=TINY, data=tmp_path / "data.txt", store=tmp_path / "s", unit_tokens=unit_tokens, seed=5
        )
    )
    run_capture(plan)
    worker = Worker(plan.load_model(), Store.open(tmp_path / "s"))
    model, drawn = load_model(TINY), {}
    for unit in reversed(range(plan.slots.num_units)):
        parts = worker._sequences(unit)
        packed, initial_ND, _ = worker._inputs(parts)
        tap = FirstInput()
        with torch.inference_mode():
            model(packed, tap, initial_ND)
        drawn |= {
            part.sequence_id: values
            for part, values in zip(parts, tap.entering_ND.split(packed.lengths), strict=True)
        }
    for sequence_id, entering_ND in drawn.items():
        ids = torch.tensor([97 + t % 20 for t in ROWS[sequence_id]])
        alone, tap = draw_initial_state(5, [sequence_id], [len(ids)], 32, 1.0), FirstInput()
        with torch.inference_mode():
            model(Packed(ids, (len(ids),)), tap, alone)
        torch.testing.assert_close(entering_ND, tap.entering_ND, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", ["all", "last", "every:4", "sample:0.4"])
def test_selected_states_are_rows_of_all_states(whole, tokens):
    dataset = looptap.capture(
        TINY, ROWS, states=("core[-1]@0,last", "coda"), tokens=tokens, unit_tokens=32, seed=3
    )
    assert dataset["state_depth"].values.tolist() == [2, 8, 9]
    everything = sequences(whole, "state")
    if tokens == "all":
        slots = np.flatnonzero(dataset["token_sequence"].values >= 0)
        states = dataset["state"].values[slots]
    else:
        is_used = dataset["state_token"].values >= 0
        slots, states = dataset["state_token"].values[is_used], dataset["state"].values[is_used]
        assert np.isnan(dataset["state"].values[~is_used]).all()
    assert len(set(slots.tolist())) == len(slots) > 0
    kept = {}
    for slot, state in zip(slots, states, strict=True):
        sequence_id = int(dataset["sequence_id"].values[dataset["token_sequence"].values[slot]])
        position = int(dataset["token_position"].values[slot])
        kept.setdefault(sequence_id, []).append(position)
        np.testing.assert_allclose(state, everything[sequence_id][position][[2, 8, 9]], atol=1e-5, rtol=1e-5)
    wanted = {
        "all": lambda n: list(range(n)),
        "last": lambda n: [n - 1],
        "every:4": lambda n: list(range(0, n, 4)),
    }
    if tokens in wanted:
        assert kept == {i: wanted[tokens](n) for i, n in enumerate(LENGTHS) if n}


def test_bfloat16_states_come_back_to_the_bit(tmp_path):
    dataset = looptap.capture(
        TINY, ROWS, tmp_path / "s", states=("all",), unit_tokens=96, batch_tokens=96, dtype="bfloat16", seed=3
    )
    assert dataset["state"].attrs["stored_as"] == "bfloat16"

    class Residuals(Plain):
        def __init__(self):
            self.rows = []

        def residual(self, step, half, x_ND, branch_ND, norms):
            result = super().residual(step, half, x_ND, branch_ND, norms)
            if half == "mlp":
                self.rows.append(result.residual_ND.clone())
            return result

    ids = sorted((i for i, n in enumerate(LENGTHS) if n), key=lambda i: (-LENGTHS[i], i))
    lengths = tuple(LENGTHS[i] for i in ids)
    tap, model = Residuals(), load_model(TINY, dtype="bfloat16")
    plain = looptap.capture(
        TINY, ROWS, states=("all",), quantities=("residual_norm",), unit_tokens=96, batch_tokens=96,
        dtype="bfloat16", seed=3,
    )  # fmt: skip
    with torch.inference_mode():
        packed = Packed(torch.tensor([t for i in ids for t in ROWS[i]]), lengths)
        model(packed, tap, draw_initial_state(3, ids, lengths, 32, 1.0))
    stored = torch.from_numpy(plain["state"].values[: sum(lengths)])
    assert torch.equal(stored.bfloat16(), torch.stack(tap.rows, dim=1))
    # as someone without looptap reads it: bits, named as such
    raw = xr.open_zarr(tmp_path / "s", chunks=None)["state"]
    assert raw.dtype == np.uint16 and raw.attrs["bits_of"] == "bfloat16"
    assert raw.attrs["long_name"].startswith("BITS of bfloat16, no numbers: ")
    assert not dataset["state"].attrs["long_name"].startswith("BITS")
    as_float = torch.from_numpy(raw.values.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(as_float, dataset["state"].values)
    # statistics are float32 of those rounded states
    norms = torch.from_numpy(dataset["state"].values[: sum(lengths)]).double().norm(dim=-1)
    got = torch.from_numpy(dataset["residual_norm"].values[: sum(lengths)]).double()
    torch.testing.assert_close(got, norms, atol=0, rtol=1e-6)


def overflowing_checkpoint(path: Path) -> Path:
    """The golden Llama with one matrix so large that everything after its block is undefined."""
    shutil.copytree(GOLDEN / "llama", path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, path / "model.safetensors")
    return path


def test_non_finite_values_are_counted_and_stop_nothing(tmp_path):
    model = overflowing_checkpoint(tmp_path / "model")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "ids.npy", np.arange(24).reshape(3, 8))
    settings = CaptureSettings.of(
        model=str(model), data=tmp_path / "data" / "ids.npy", store=tmp_path / "s",
        quantities=("residual_norm", "attention_peak"), states=("all",), unit_tokens=8,
    )  # fmt: skip
    events = []
    outcome = run_capture(make_plan(settings), events.append)
    receipts = [event.receipt for event in events if isinstance(event, UnitDone)]
    assert outcome.complete and len(receipts) == 3
    dataset = looptap.open(tmp_path / "s")
    broken = {name: int((~np.isfinite(dataset[name].values)).sum()) for name in dataset.data_vars}
    assert broken["residual_norm"] == 3 * 24, "every token at depths 2, 3 and 4"
    assert np.isfinite(dataset["residual_norm"].values[:, :2]).all()
    assert outcome.num_non_finite == sum(broken.values())
    assert store_status(tmp_path / "s").num_non_finite == sum(broken.values())
    assert outcome.num_non_finite == sum(receipt.num_non_finite for receipt in receipts)
    per_unit = [entry["non_finite"] for entry in Store.open(tmp_path / "s").entries()]
    assert {name: sum(unit.get(name, 0) for unit in per_unit) for name in broken} == broken
    assert verify_store(tmp_path / "s").ok


def test_sound_captures_count_nothing(tmp_path):
    looptap.capture(TINY, ROWS, tmp_path / "s", states=("all",), tokens="every:3", unit_tokens=32)
    assert store_status(tmp_path / "s").num_non_finite == 0


def test_a_unit_that_fails_three_times_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """A model that cannot run one length: real store, real model, an attention that gives up."""
    (tmp_path / "data.txt").write_bytes(b"\n".join(bytes(97 + t % 20 for t in row) for row in ROWS))
    tries = []
    attention = Plain.attention

    def refuses_19(self, step, q_NHC, k_NKC, v_NKC, batch, scale):
        if 19 in batch.lengths:
            tries.append(batch.lengths)
            raise RuntimeError("no kernel for 19 tokens")
        return attention(self, step, q_NHC, k_NKC, v_NKC, batch, scale)

    command = [
        "looptap", "capture", TINY, "--data", str(tmp_path / "data.txt"), "--store", str(tmp_path / "s"),
        "--unit-tokens", "32", "--quantities", "residual", "steps",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    from looptap.cli.entry import main

    with monkeypatch.context() as patch:
        patch.setattr(Plain, "attention", refuses_19)
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 1
    assert len(tries) == 3, "three tries of the one unit that holds it"
    said = capsys.readouterr().err
    assert "failed three times" in said and "no kernel for 19 tokens" in said
    status = store_status(tmp_path / "s")
    assert (status.units_done, status.units_total, status.complete) == (2, 3, False)
    assert [(note.unit, note.attempt) for note in status.failures] == [(1, 1), (1, 2), (1, 3)]
    assert all("RuntimeError: no kernel for 19 tokens" in note.error for note in status.failures)
    before = looptap.open(tmp_path / "s")
    assert before["unit_done"].values.tolist() == [1, 0, 1]

    with pytest.raises(SystemExit) as stopped:
        main()  # the cause is gone: the same command captures what is missing, and only that
    assert stopped.value.code == 0
    status = store_status(tmp_path / "s")
    assert status.complete and status.attempts == 2 + 4
    expected = looptap.capture(TINY, tmp_path / "data.txt", quantities=("residual", "steps"), unit_tokens=32)
    resumed = looptap.open(tmp_path / "s")
    for name in expected.data_vars:
        np.testing.assert_array_equal(resumed[name].values, expected[name].values)


def test_capture_in_memory_raises_what_a_unit_raised(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("by a model")

    monkeypatch.setattr(Plain, "residual", fails)
    with pytest.raises(RuntimeError, match=r"3 units failed; unit 0:\n(.|\n)*ZeroDivisionError: by a model"):
        looptap.capture(TINY, ROWS, unit_tokens=32)


def test_the_finished_store_opens_in_plain_xarray(tmp_path):
    looptap.capture(
        TINY, ROWS, tmp_path / "s", quantities=("all",), states=("core[all]@last",), tokens="every:8",
        unit_tokens=32,
    )  # fmt: skip
    dataset = xr.open_zarr(tmp_path / "s")
    U, C, K = 3, 32, dataset.attrs["plan"]["num_state_rows"]
    Q = dataset.attrs["plan"]["unit_sequences"]
    assert dict(dataset.sizes) == {
        "token": U * C, "sequence": U * Q, "depth": 10, "depth_other": 10, "recurrence": 4, "head": 4,
        "unit": U, "token_state": U * K, "depth_state": 2, "hidden": 32,
    }  # fmt: skip
    for name in CAPTURED:
        assert dataset[name].dims == QUANTITIES[name].axes
        assert dataset[name].dtype == (np.int32 if name == "lens_token" else np.float32)
        assert {"long_name", "units"} <= dataset[name].attrs.keys()
    assert dataset["state"].dims == ("token_state", "depth_state", "hidden")
    assert set(dataset.data_vars) == {*CAPTURED, "state"}
    coordinates = {
        "depth": ("depth", np.int32), "stage": ("depth", np.int8), "layer": ("depth", np.int16),
        "depth_other": ("depth_other", np.int32), "recurrence": ("depth", np.int16),
        "token_id": ("token", np.int32),
        "token_position": ("token", np.int32), "token_sequence": ("token", np.int32),
        "sequence_start": ("sequence", np.int64), "sequence_length": ("sequence", np.int32),
        "sequence_id": ("sequence", np.int64), "unit_done": ("unit", np.uint8),
        "state_depth": ("depth_state", np.int32), "state_token": ("token_state", np.int64),
    }  # fmt: skip
    found = {name: (*values.dims, values.dtype) for name, values in dataset.coords.items()}
    assert found == {name: (dim, np.dtype(dtype)) for name, (dim, dtype) in coordinates.items()}
    assert dataset["stage"].attrs["flag_meanings"] == "prelude core coda"
    assert "depth" in dataset.indexes
    assert dataset["unit_done"].values.tolist() == [1, 1, 1]
    assert dataset.attrs["looptap_format"] == 2
    last = dataset["residual_norm"].sel(depth=dataset["recurrence"] == 3).mean(skipna=True)
    assert np.isfinite(float(last))


def test_python_and_the_command_make_the_same_plan(tmp_path):
    """A list of texts goes through a file of its own; its content decides, not where it lay."""
    first = looptap.capture(TINY, ["one", "two, longer", ""], tmp_path / "a", quantities=("residual",))
    again = looptap.capture(TINY, ["one", "two, longer", ""], tmp_path / "a", quantities=("residual",))
    xr.testing.assert_identical(first.load(), again.load())
    with pytest.raises(ValueError, match=r"another plan; it differs in\n  data\.sha256"):
        looptap.capture(TINY, ["one", "two, shorter", ""], tmp_path / "a", quantities=("residual",))
    lines = [json.dumps({"text": text}) + "\n" for text in ("one", "two, longer", "")]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    settings = CaptureSettings.of(
        model=TINY, data=tmp_path / "texts.jsonl", store=tmp_path / "a", quantities=("residual",)
    )
    assert run_capture(make_plan(settings)).num_resumed == 1
    assert run_capture(make_plan(settings.but(store=tmp_path / "b"))).num_resumed == 0
