"""The authors' code on tiny models: our forward pass and statistics against every tensor that it stored."""

import pytest
import torch

from looptap.benchmarks.states_in_memory import StatesInMemory
from looptap.capture.models.exit_gate import exit_probability
from looptap.capture.models.load import load_model
from looptap.capture.models.tap import Packed
from looptap.capture.taps.statistics import Buffers, Statistics
from looptap.tests.golden_files import GOLDEN, NAMES, PADDED, RAVEN, batch_of, stored
from looptap.tests.oracle import Listening, Straight

TOLERANCE = 1e-4  # the references differ among themselves by up to 3e-5


class Maps(Listening):
    """A tap that also keeps every attention map, from the queries and keys that attention is run with."""

    def __init__(self):
        super().__init__()
        self.maps = {}

    def attention(self, step, q_NHC, k_NKC, v_NKC, batch, scale):
        self.maps[step] = []
        k_NHC = k_NKC.repeat_interleave(q_NHC.shape[1] // k_NKC.shape[1], dim=1)
        for q_THC, k_THC in zip(q_NHC.split(batch.lengths), k_NHC.split(batch.lengths), strict=True):
            scores_HTT = torch.einsum("ihc,jhc->hij", q_THC, k_THC) * scale
            above = torch.ones(scores_HTT.shape[1:], dtype=torch.bool).triu(1)
            self.maps[step].append(scores_HTT.masked_fill(above, float("-inf")).softmax(-1))
        return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str, rtol: float = 0) -> None:
    try:
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=rtol)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def forward(model, batch: Packed, initial_ND=None) -> dict:
    """Our side of every stored tensor, under its name: [N, ...], or for attention a map of each sequence."""
    d, tap = model.description, Maps()
    with torch.inference_mode():
        head_input = model(batch, tap, initial_ND)
        found = {"embed": tap.entering[next(d.steps())], "head_input": head_input}
        found["logits"] = model.logits(head_input)
        found["ln_f_calls"] = d.norm_before_coda + d.closes_with_norm
        for step in d.steps():
            place = f"r{step.recurrence}" if step.stage == "core" else "r0" if not d.core else step.stage
            place += f".l{step.layer}"
            found |= {f"residual.{place}": tap.residuals[step], f"mid.{place}": tap.mids[step]}
            found[f"attn.{place}"] = tap.maps[step]
            if step.stage == "core" and step.layer == 0:
                found[f"injected.r{step.recurrence}"] = tap.entering[step]
            if step.stage == "coda" and step.layer == 0:
                found["coda_input"] = tap.entering[step]
        for r, state in tap.loop_states.items():
            found |= {f"loop_state.r{r}": state, f"step_logits.r{r}": model.logits(state)}
        if d.exit_gate:
            found |= exits(model, found)
    return found


def exits(model, found) -> dict[str, torch.Tensor]:
    """The gate and the two ways to read the model out by it."""
    rows = range(model.description.recurrences)
    gates_RN = torch.stack([model.exit_gate_logits(found[f"loop_state.r{r}"]) for r in rows])
    p_RN = exit_probability(gates_RN)
    logits_RNV = torch.stack([found[f"step_logits.r{r}"] for r in rows])
    is_past_RN = p_RN.cumsum(0) >= 0.6
    is_past_RN[-1] = True
    step_N = is_past_RN.long().argmax(0)
    return {
        "gate_logits": gates_RN.T,
        "exit_pdf": p_RN.T,
        "exit_threshold.step": step_N,
        "logits.exit_threshold": logits_RNV[step_N, torch.arange(len(step_N))],
        "logits.weighted_exit": (p_RN.unsqueeze(-1) * logits_RNV).sum(0),
    }


def assert_same(name: str, prefix: str, ours, mask_ST) -> None:
    """Compares every stored tensor with this prefix, at the tokens of the mask."""
    kinds = ("padleft.", "padright.", "pos.", "steps")
    found = {
        key.removeprefix(prefix): value
        for key, value in stored(name, "reference").items()
        if (key.startswith(prefix) if prefix else not key.startswith(kinds))
    }
    if "ln_f_calls" in found:
        assert found.pop("ln_f_calls").item() == ours["ln_f_calls"]
    assert found and found.keys() <= ours.keys()
    for key, wanted in found.items():
        if key.startswith("attn."):
            for mask_T, map_HTT, wanted_HTT in zip(mask_ST, ours[key], wanted, strict=True):
                wanted_HTT = wanted_HTT[:, mask_T][:, :, mask_T]
                assert_close(map_HTT, wanted_HTT, key)
        else:
            assert_close(ours[key], wanted[mask_ST], key)


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_tensor(name):
    """Embeddings, block inputs, mid-block states, residuals, attention maps, loop states, gate and logits."""
    batch, mask_ST, initial_ND = batch_of(name)
    assert_same(name, "", forward(load_model(str(GOLDEN / name)), batch, initial_ND), mask_ST)


@pytest.mark.parametrize("name", ["ouro", *RAVEN])
def test_other_recurrence_counts(name):
    batch, mask_ST, initial_ND = batch_of(name)
    counts = [int(key.split(".")[0][5:]) for key in stored(name, "reference") if key.startswith("steps")]
    assert len(counts) == 2
    for count in counts:
        model = load_model(str(GOLDEN / name), recurrences=count)
        assert_same(name, f"steps{count}.", forward(model, batch, initial_ND), mask_ST)


@pytest.mark.parametrize("name", RAVEN)
def test_positions_with_gaps(name):
    batch, mask_ST, initial_ND = batch_of(name)
    position_T = stored(name, "inputs")["position_ids_alt"]
    assert not torch.equal(position_T, torch.arange(len(position_T)))
    packed = Packed(batch.token_id_N, batch.lengths, position_T.repeat(len(batch.lengths)))
    assert_same(name, "pos.", forward(load_model(str(GOLDEN / name)), packed, initial_ND), mask_ST)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("side", ["padleft", "padright"])
def test_packing_equals_the_references_padding(name, side):
    """The reference pads a batch and masks it; packed, the same tokens need neither."""
    inputs = stored(name, "inputs")
    mask_ST = inputs[f"{side}.attention_mask"].bool()
    lengths = tuple(mask_ST.sum(-1).tolist())
    assert len(set(lengths)) > 1, "the fixture pads one row only"
    packed = Packed(inputs[f"{side}.input_ids"][mask_ST], lengths)
    assert_same(name, f"{side}.", forward(load_model(str(GOLDEN / name)), packed), mask_ST)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_from_the_stored_tensors(name):
    model, reference = load_model(str(GOLDEN / name)), stored(name, "reference")
    batch, _, initial_ND = batch_of(name)
    d, N = model.description, len(batch.token_id_N)
    values = {
        f"attention_{n}": torch.full((d.depth, N, d.num_heads), float("nan"))
        for n in ("entropy", "peak", "sink", "received")
    }
    values |= {
        n: torch.full((d.depth, N), float("nan")) for n in ("residual_norm", "residual_peak", "update_norm")
    }
    state = torch.full((d.depth, N, d.width), float("nan"))
    tap = Statistics(d, Buffers(values, StatesInMemory(state)), state_depths=range(d.depth))
    with torch.inference_mode():
        model(batch, tap, initial_ND)
    after = torch.empty(0)
    for step in d.steps():
        place = f"r{step.recurrence}" if step.stage == "core" else "r0" if not d.core else step.stage
        a_SHTT = reference[f"attn.{place}.l{step.layer}"].double()
        of_matrix = {
            "attention_entropy": torch.special.entr(a_SHTT).sum(-1),
            "attention_peak": a_SHTT.amax(-1),
            "attention_sink": a_SHTT[..., 0],
            "attention_received": a_SHTT.sum(-2),
        }
        before = block_input(reference, step, after)
        after = reference[f"residual.{place}.l{step.layer}"].flatten(0, 1)
        wanted = {q: value_SHT.transpose(1, 2).flatten(0, 1).float() for q, value_SHT in of_matrix.items()}
        wanted["residual_norm"] = after.norm(dim=-1)
        wanted["residual_peak"] = after.abs().amax(-1)
        wanted["update_norm"] = (after - before).norm(dim=-1)
        for quantity, value in wanted.items():
            assert_close(values[quantity][step.depth], value, f"{quantity} at {step}", rtol=1e-5)
        assert_close(state[step.depth], after, f"state at {step}")


def block_input(reference, step, before: torch.Tensor) -> torch.Tensor:
    """What the reference's block of a step works on, [N, D], given what the last block left."""
    if step.depth == 0:
        left = reference["embed"]
    elif step.stage == "core" and step.layer == 0:
        injected = reference.get(f"injected.r{step.recurrence}")
        left = reference[f"loop_state.r{step.recurrence - 1}"] if injected is None else injected
    elif step.stage == "coda" and step.layer == 0:
        left = reference["coda_input"]
    else:
        return before
    return left.flatten(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_single(name):
    """Sequences of other lengths together, and each alone."""
    model = load_model(str(GOLDEN / name))
    batch, _, initial_ND = batch_of(name)
    lengths = (7, 1, 24, 16)
    with torch.inference_mode():
        together = model(Packed(batch.token_id_N, lengths), initial_state_ND=initial_ND).split(lengths)
        starts = [0] * len(lengths) if initial_ND is None else initial_ND.split(lengths)
        for got, ids, start in zip(together, batch.token_id_N.split(lengths), starts, strict=True):
            initial = None if initial_ND is None else start
            alone = model(Packed(ids, (len(ids),)), initial_state_ND=initial)
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_errs_no_more_than_plain_torch(name):
    """Both start from the same rounded weights and states; of one sequence alone luck would be compared."""
    model = load_model(str(GOLDEN / name), dtype="bfloat16")
    batch, _, initial_ND = batch_of(name)
    initial_ND = None if initial_ND is None else initial_ND.bfloat16()
    with torch.inference_mode():
        got = model.logits(model(batch, initial_state_ND=initial_ND))
    assert got.dtype == torch.bfloat16
    parts = {torch.float64: [], torch.bfloat16: []}
    for dtype, found in parts.items():
        for rows in torch.arange(len(got)).split(batch.lengths):
            start = None if initial_ND is None else initial_ND[rows]
            found.append(Straight(model, dtype)(batch.token_id_N[rows], start))
    wanted, plain = (torch.cat(found) for found in parts.values())
    error, allowed = ((x.double() - wanted).square().mean().sqrt() for x in (got, plain))
    assert error <= 2 * allowed, f"{error / allowed:.2f} times"
    assert error < 0.1 * wanted.square().mean().sqrt()
