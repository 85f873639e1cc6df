"""Every measure of the authors' stored residuals and attention, against its direct float64 definition.

The stored tensors are played through the tap that captures use, so that quantities come from our operations:
a residual as itself plus nothing, an attention matrix A as the queries ln A over keys that are unit vectors,
whose softmax is A again. The definitions are written out here from the same tensors in float64.
"""

import numpy as np
import pytest
import torch

from looptap.analysis.measures import MEASURES, measure
from looptap.analysis.registry import ANALYSES
from looptap.analysis.walk import answer
from looptap.capture.models.load import load_model
from looptap.capture.models.tap import HalfNorms
from looptap.capture.store.quantities import QUANTITIES
from looptap.capture.taps.statistics import Buffers, Statistics
from looptap.tests.golden_files import GOLDEN, NAMES, batch_of, stored
from looptap.tests.synthetic import make_dataset
from looptap.tests.test_golden import block_input

RTOL = 1e-5
# a change is the difference of two float32 values, so that it is as exact as these are: nat, shares, cosines
ATOL = {"entropy_change": 1e-6, "received_change": 1e-6, "lens_kl": 1e-6, "attention_step": 1e-6,
        "attention_gap": 1e-6}  # fmt: skip
MEDIANS = {"relative_step_median", "relative_gap_median"}  # over the tokens of all sequences: below
_SILENT = -1e4  # stands for ln 0, whose softmax is 0


def replayed(name: str):
    """A Dataset of a fixture's stored tensors; then states, attention, readings, gate in float64, shape."""
    model, reference = load_model(str(GOLDEN / name)), stored(name, "reference")
    batch, _, _ = batch_of(name)
    d, N, S = model.description, len(batch.token_id_N), len(batch.lengths)
    R, T = d.recurrences if d.core else 0, N // S
    sizes = {"token": N, "depth": d.depth, "head": d.num_heads, "sequence": S, "recurrence": R,
             "depth_other": d.depth}  # fmt: skip
    values = {}
    for quantity, about in QUANTITIES.items():
        loops = about.axes[1] == "recurrence"
        if quantity == "state" or (loops and not R) or (quantity == "exit_probability" and not d.exit_gate):
            continue
        size = [sizes[axis] for axis in (about.axes[1], about.axes[0], *about.axes[2:])]
        is_token = quantity == "lens_token"
        values[quantity] = torch.full(
            size, -1 if is_token else float("nan"), dtype=torch.int32 if is_token else torch.float32
        )
    tap, states, maps, head_inputs, after = (
        Statistics(d, Buffers(values), model=model),
        [],
        [],
        [],
        torch.empty(0),
    )
    key_NHC = torch.eye(T).repeat(S, 1)[:, None].expand(N, d.num_heads, T).contiguous()
    with torch.inference_mode():
        for step in d.steps():
            place = f"r{step.recurrence}" if step.stage == "core" else "r0" if not d.core else step.stage
            a_SHTT = reference[f"attn.{place}.l{step.layer}"]
            log_SHTT = a_SHTT.log().clamp_min(_SILENT)
            query_NHC = log_SHTT.transpose(1, 2).flatten(0, 1).contiguous()
            tap.attention(step, query_NHC, key_NHC, key_NHC, batch, 1.0)
            before = block_input(reference, step, after)
            after = reference[f"residual.{place}.l{step.layer}"].flatten(0, 1)
            nothing = torch.zeros_like(after)
            tap.residual(step, "attention", before, nothing, HalfNorms(d.block.eps))
            tap.residual(step, "mlp", after, nothing, HalfNorms(d.block.eps))
            states.append((before.double(), after.double()))
            maps.append(a_SHTT.double())
            if step.stage == "core" and step.layer == d.core - 1:
                loop_state = after  # where no rule ends a recurrence, as in what stores no loop state
                if d.recurrence_end is not None:
                    loop_state = reference[f"loop_state.r{step.recurrence}"].flatten(0, 1)
                tap.loop_state(step, loop_state)
                head_inputs.append(model.read_out(loop_state))
    sequences = []
    for s in range(S):
        rows = slice(s * T, (s + 1) * T)
        of = {
            q: value[:, slice(s, s + 1) if QUANTITIES[q].axes[0] == "sequence" else rows]
            for q, value in values.items()
        }
        sequences.append({q: value.transpose(0, 1).numpy() for q, value in of.items()})
    shape = (d.prelude, d.core, R, d.coda)
    x_ST2LD = torch.stack([torch.stack(pair) for pair in states], 2).unflatten(1, (S, T)).movedim(1, 0)
    a_SLHTT = torch.stack(maps, 1).numpy()
    lens = None
    if R:
        logits_NRV = torch.stack([x.double() @ model.head_weight.double().T for x in head_inputs], 1)
        logits_NRV = logits_NRV * model.description.logit_scale
        lens = logits_NRV.log_softmax(-1).unflatten(0, (S, T)).numpy()
    gate = reference["exit_pdf"].double().numpy() if d.exit_gate else None
    return make_dataset(sequences, shape), x_ST2LD.numpy(), a_SLHTT, lens, gate, shape


def definitions(x_2TLD, a_LHTT, lens_TRV, gate_TR, shape) -> dict[str, np.ndarray]:
    """Every measure of one sequence, [depth], from its residuals [before and after, token, depth, hidden]."""
    prelude, core, recurrences, _ = shape
    before_TLD, x_TLD = x_2TLD
    T, L, _ = x_TLD.shape
    H = a_LHTT.shape[1]
    out = {name: np.full(L, np.nan) for name in MEASURES if name not in MEDIANS}
    norm = np.sqrt((x_TLD**2).sum(-1))
    for depth in range(L):
        x, a_HTT = x_TLD[:, depth], a_LHTT[depth]
        out["residual_norm"][depth] = norm[:, depth].mean()
        out["residual_peak"][depth] = np.abs(x).max(1).mean()
        out["residual_peak_max"][depth] = np.abs(x).max()
        out["update_norm"][depth] = np.sqrt(((x - before_TLD[:, depth]) ** 2).sum(1)).mean()
        out["mixing_score"][depth] = _entropy(a_HTT).mean()
        out["attention_peak"][depth] = a_HTT.max(-1).mean()
        sink_H = a_HTT[:, :, 0].mean(1)
        out["sink_score"][depth], out["sink_rate"][depth] = sink_H.mean(), (sink_H >= 0.3).mean()
        out["colsum_concentration"][depth] = np.mean(1 - _entropy(a_HTT.sum(1) / T) / np.log(T))
        share = np.linalg.svd(x, compute_uv=False) ** 2
        out["residual_entropy"][depth] = _entropy(share / share.sum())
        if not prelude <= depth < prelude + core * recurrences:
            continue
        recurrence, layer = divmod(depth - prelude, core)
        last = prelude + core * (recurrences - 1) + layer
        for kind, other in (("gap", last), ("step", depth - core)):
            if kind == "step" and not recurrence:
                continue
            distance = np.sqrt(((x - x_TLD[:, other]) ** 2).sum(1))
            out[f"{kind}_norm"][depth] = distance.mean()
            out[f"relative_{kind}"][depth] = (distance / norm[:, last if kind == "gap" else depth]).mean()
            cosine = (x * x_TLD[:, other]).sum(1) / norm[:, depth] / norm[:, other]
            out[f"{kind}_cosine"][depth] = cosine.mean()
            apart_H = np.sqrt(((a_HTT - a_LHTT[other]) ** 2).sum((1, 2)))
            out[f"attention_{kind}"][depth] = apart_H.mean()
        if recurrence:
            a0_HTT = a_LHTT[depth - core]
            out["entropy_change"][depth] = np.abs(_entropy(a_HTT) - _entropy(a0_HTT)).mean()
            out["received_change"][depth] = np.abs(a_HTT.sum(1) - a0_HTT.sum(1)).sum() / (2 * T * H)
        if layer == core - 1:
            p, end = np.exp(lens_TRV[:, recurrence]), lens_TRV[:, -1]
            out["lens_kl"][depth] = (p * (lens_TRV[:, recurrence] - end)).sum(1).mean()
            out["lens_entropy"][depth] = -(p * lens_TRV[:, recurrence]).sum(1).mean()
            out["lens_settled"][depth] = (lens_TRV[:, recurrence].argmax(1) == end.argmax(1)).mean()
            if gate_TR is not None:
                out["exit_probability"][depth] = gate_TR[:, recurrence].mean()
    return out


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_every_measure_equals_its_definition(name):
    dataset, x_S2TLD, a_SLHTT, lens_STRV, gate_STR, shape = replayed(name)
    found = measure(dataset)
    each = [
        definitions(
            x_S2TLD[s],
            a_SLHTT[s],
            None if lens_STRV is None else lens_STRV[s],
            None if gate_STR is None else gate_STR[s],
            shape,
        )
        for s in range(len(x_S2TLD))
    ]
    compared = set()
    for measured in MEASURES.keys() - MEDIANS:
        values_SL = np.stack([of[measured] for of in each])
        wanted_L = values_SL.max(0) if measured == "residual_peak_max" else values_SL.mean(0)
        if measured not in found:
            assert np.isnan(wanted_L).all(), f"{measured} has a definition and was not measured"
            continue
        got_L = found[measured].sel(statistic="value").values
        np.testing.assert_allclose(
            got_L, wanted_L, rtol=RTOL, atol=ATOL.get(measured, 1e-7), err_msg=f"{measured} of {name}"
        )
        compared.add(measured)
    loops = {key for key in MEASURES if MEASURES[key].first >= 0} - MEDIANS
    absent = set() if shape[1] and gate_STR is not None else {"exit_probability"}
    assert compared == MEASURES.keys() - MEDIANS - (absent if shape[1] else loops)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_all_pairs_equal_their_definitions(name):
    dataset, x_S2TLD, a_SLHTT, *_ = replayed(name)
    x_STLD = x_S2TLD[:, 1]
    unit_STLD = x_STLD / np.sqrt((x_STLD**2).sum(-1, keepdims=True))
    cosine_LL = np.einsum("stld,stmd->slm", unit_STLD, unit_STLD).mean(0) / x_STLD.shape[1]
    apart_SHLL = np.sqrt(((a_SLHTT[:, :, None] - a_SLHTT[:, None]) ** 2).sum((-1, -2)))
    wanted = {"residual_similarity": cosine_LL, "attention_distance": apart_SHLL.mean((0, -1))}
    for key, wanted_LL in wanted.items():
        got_LL = answer(dataset, ANALYSES[key])[key].sel(statistic="value").values
        np.testing.assert_allclose(got_LL, wanted_LL, rtol=RTOL, atol=1e-6, err_msg=f"{key} of {name}")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama", "olmo2")])
def test_medians_over_tokens_equal_their_definitions(name):
    dataset, x_S2TLD, *_, (prelude, core, recurrences, _) = replayed(name)
    core_depths = slice(prelude, prelude + core * recurrences)
    x_NRLD = x_S2TLD[:, 1, :, core_depths].reshape(-1, recurrences, core, x_S2TLD.shape[-1])
    norm_NRL = np.linalg.norm(x_NRLD, axis=-1)
    step_NRL = np.linalg.norm(np.diff(x_NRLD, axis=1), axis=-1) / norm_NRL[:, 1:]
    gap_NRL = np.linalg.norm(x_NRLD - x_NRLD[:, -1:], axis=-1) / norm_NRL[:, -1:]
    wanted = {"relative_step_median": step_NRL, "relative_gap_median": gap_NRL}
    found = measure(dataset, MEDIANS)
    for key, value_NRL in wanted.items():
        got_RL = found[key].values[:, core_depths].reshape(4, recurrences, core)[:, -value_NRL.shape[1] :]
        for statistic, share in enumerate((0.5, 0.25, 0.75)):
            wanted_RL = np.quantile(value_NRL, share, axis=0)
            np.testing.assert_allclose(got_RL[statistic], wanted_RL, rtol=RTOL, atol=1e-7, err_msg=key)
