"""The contraction factor against linear maps of known spectral radius and dense float64 Jacobians."""

import math
from itertools import pairwise

import pytest
import torch
from torch.autograd.functional import jacobian

from looptap.analysis.thresholds import CONVERGED_STEP
from looptap.capture.models.description import Block, Rotary
from looptap.capture.models.load import load_model
from looptap.capture.models.model import LoopedModel
from looptap.capture.models.starts import initial_state as drawn_state
from looptap.capture.models.tap import Packed
from looptap.capture.probes.contraction import contraction, power_iteration
from looptap.capture.prompt import inspect_prompt
from looptap.capture.settings import InspectSettings
from looptap.cli.tables import print_inspection
from looptap.errors import PlanError
from looptap.tests.oracle import Straight, describe, fill, initial_state, random_ids

D = 12


def linear_map(radii: list[float], angles: list[float] | None = None, seed: int = 0) -> torch.Tensor:
    """A matrix that is not normal, with a real eigenvalue for each radius, or a pair at an angle; float64."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for radius, angle in zip(radii, angles or [0.0] * len(radii), strict=True):
        c, s = radius * math.cos(angle), radius * math.sin(angle)
        blocks.append(torch.tensor([[c, -s], [s, c]]) if angle else torch.tensor([[radius]]))
    basis = torch.randn(D, D, generator=generator, dtype=torch.float64) + 2 * torch.eye(D)
    return basis @ torch.block_diag(*blocks).double() @ torch.linalg.inv(basis)


def test_rows_have_the_radius_of_their_own_linear_map():
    radii = [0.3, 0.9, 1.4]
    maps = torch.stack(
        [linear_map([radius] + [radius / 2] * (D - 1), seed=i) for i, radius in enumerate(radii)]
    )
    x_ND = torch.randn(3, D, dtype=torch.float64)
    factor_N, spread_N = power_iteration(lambda x: torch.einsum("ndc,nc->nd", maps, x), x_ND, 100, seed=0)
    torch.testing.assert_close(factor_N, torch.tensor(radii).double(), rtol=1e-6, atol=0)
    assert (spread_N < 1e-6).all()


# growth under a pair turns with its phase: slowly, at an angle of no round part of a turn, and back and forth
@pytest.mark.parametrize("angle", [0.1, 1.0, 2.4, math.pi - 1e-3])
@pytest.mark.parametrize("radius", [0.5, 1.2])
def test_a_complex_pair_is_averaged_over_its_turns(angle, radius):
    a_DD = linear_map([radius] + [radius / 2] * (D - 2), [angle] + [0.0] * (D - 2))
    assert abs(torch.linalg.eigvals(a_DD).abs().max().item() - radius) < 1e-6
    v = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    growths = []
    for _ in range(40):
        w = a_DD @ v
        growths.append((w.norm() / v.norm()).item())
        v = w / w.norm()
    if angle in (1.0, 2.4):  # one step alone would not do
        assert max(growths[20:]) / min(growths[20:]) > 1.05
    factor_N, spread_N = power_iteration(lambda x: x @ a_DD.T, torch.ones(1, D).double(), 100, seed=0)
    assert abs(factor_N.item() / radius - 1) < 0.02
    assert abs(factor_N.item() - radius) < max(2 * spread_N.item(), 0.01 * radius)


def test_what_vanishes_has_a_factor_of_zero():
    factor_N, spread_N = power_iteration(lambda x: 0 * x, torch.ones(2, D), 8, seed=0)
    assert factor_N.tolist() == [0, 0] and spread_N.tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least 4, got 3"):
        power_iteration(lambda x: x, torch.ones(1, D), 3, seed=0)


def straight_recurrence(model: LoopedModel, ids_T: torch.Tensor):
    """One recurrence of a sequence as the papers word it, in float64, and the prelude's output."""
    oracle, d = Straight(model), model.description
    prelude_TD = oracle.weights["embedding"][ids_T] * d.embedding_scale
    for layer in range(d.prelude):
        prelude_TD = oracle.block(prelude_TD, layer)

    def recur(state_TD):
        if d.injection:
            state_TD = torch.cat([state_TD, prelude_TD], dim=-1) @ oracle.weights["adapter"].T
        for layer in range(d.core):
            state_TD = oracle.block(state_TD, d.prelude + layer)
        return oracle.rms(state_TD, oracle.weights["final_norm"]) if d.block.norm == "ouro" else state_TD

    return recur, prelude_TD


# with seeds whose loop settles, but for the drawn state, where two recurrences show which state it began from
CASES = [
    (6, 200, {"injection": "linear"}),
    (6, 2, {"injection": "linear", "initial_state": "normal"}),
    (6, 200, {"block": Block(norm="huginn", bias="qk", rotary=Rotary(interleaved=True)), "num_kv_heads": 4}),
    (5, 200, {"block": Block(norm="ouro"), "recurrence_end": "norm"}),
    (
        6,
        200,
        {"block": Block(norm="olmo2", qk_norm="all_heads", bias="qkv"), "injection": "linear", "prelude": 2},
    ),
]


@pytest.mark.parametrize(
    ("seed", "recurrences", "changes"), CASES, ids=["pre", "drawn state", "huginn", "ouro", "olmo2"]
)
@pytest.mark.slow
def test_factors_are_the_dense_jacobians(seed, recurrences, changes):
    lengths = (4, 1, 2)
    model = fill(LoopedModel(describe(**changes)), seed=seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.35)
    for block in model.blocks:
        block.qkv.mul_(4)  # queries that tell keys apart
    batch = random_ids(model.description.vocab_size, lengths)
    initial_ND = initial_state(model.description, sum(lengths))
    found = contraction(model, batch, initial_ND, recurrences=recurrences, iterations=120)
    assert found.recurrences == recurrences and (found.step_N < 1e-5).all() == (recurrences == 200)
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for start, stop in pairwise(edges):
        recur, state_TD = straight_recurrence(model, batch.token_id_N[start:stop])
        state_TD = state_TD if initial_ND is None else initial_ND[start:stop].double()
        for _ in range(recurrences):
            state_TD = recur(state_TD)
        dense_TDTD = jacobian(recur, state_TD, vectorize=True)
        assert isinstance(dense_TDTD, torch.Tensor)
        T, width = state_TD.shape
        own = [torch.linalg.eigvals(dense_TDTD[t, :, t]).abs().max() for t in range(T)]
        factor_T = found.factor_N[start:stop]
        torch.testing.assert_close(factor_T, torch.stack(own), rtol=0.02, atol=0)
        whole = torch.linalg.eigvals(dense_TDTD.reshape(T * width, T * width)).abs().max()
        assert abs(factor_T.max() / whole - 1) < 0.02


@pytest.mark.slow
def test_inspect_prints_the_factor_of_every_token(capsys):
    settings = InspectSettings.of(model="random:(1,2x3,1)I,width=32", prompt="ab cab", dtype="float32")
    inspection = inspect_prompt(settings)
    found = inspection.contraction
    assert found is not None and len(found.factor_N) == 6 and found.recurrences == 128
    model = load_model(settings.model.model, dtype="float32")
    ids_N = torch.tensor(list(b"ab cab"))
    state_ND = drawn_state(None, model.description, settings.seed, [0], (6,), None)
    direct = contraction(model, Packed(ids_N, (6,)), state_ND)
    assert torch.equal(found.factor_N, direct.factor_N) and torch.equal(found.step_N, direct.step_N)
    print_inspection(inspection)
    said = " ".join(capsys.readouterr().out.split())
    largest = int(direct.factor_N.argmax())
    assert f"after 128 recurrences: {direct.factor_N.max():.4f} +-" in said and f"(token {largest}, " in said
    assert f"median {direct.factor_N.quantile(0.5):.4f}" in said
    assert ("no fixed point" in said) == (direct.step_N.max().item() > CONVERGED_STEP)


@pytest.mark.slow
def test_a_loop_in_bfloat16_is_told_from_one_that_moves(capsys):
    """Rounding keeps a settled loop moving by more than the threshold; the factor is near float32's."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = InspectSettings.of(model="random:(0,4x8,0)I,width=64,seed=1", prompt="ab cab", dtype=dtype)
        inspection = inspect_prompt(settings)
        print_inspection(inspection)
        found[dtype] = inspection.contraction
        assert ("rounding alone" in capsys.readouterr().out) == (dtype == "bfloat16")
    # seen: 0.3 % apart, less than one epsilon
    torch.testing.assert_close(found["bfloat16"].factor_N, found["float32"].factor_N, rtol=0.01, atol=0)


def test_a_state_that_is_no_number_has_no_factor(capsys):
    """Weights so large that the residual overflows float32 on the way to 128 recurrences."""
    settings = InspectSettings.of(model="random:(0,1x2,0),gain=1e20,width=32", prompt="ab", dtype="float32")
    print_inspection(inspect_prompt(settings))
    assert "no contraction factor: after 128 recurrences the state is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "recurrences"), [("random:(2,0,0),width=32", 128), ("random:(0,1x2,0)I,width=32", 0)]
)
def test_inspect_leaves_the_factor_out(model, recurrences):
    settings = InspectSettings.of(model=model, prompt="ab", contraction_recurrences=recurrences)
    assert inspect_prompt(settings).contraction is None


def test_a_loop_is_needed_and_a_count_from_0():
    with pytest.raises(ValueError, match=r"\(1,0,0\) has no loop"):
        contraction(fill(LoopedModel(describe(core=0, recurrences=0, coda=0))), random_ids(50, (2,)))
    with pytest.raises(PlanError, match=r"contraction_recurrences must be at least 1, or 0 .*got -1"):
        inspect_prompt(InspectSettings.of(model="random:(0,1x2,0)", prompt="a", contraction_recurrences=-1))
