"""The logit lens in chunks of the vocabulary against logits written out in float64."""

import pytest
import torch

from looptap.kernels import lens as module
from looptap.kernels import reference
from looptap.kernels.lens import lens


def draw(N, D, V, apart, dtype=torch.float32):
    """A last state, one that far from it, and a head."""
    generator = torch.Generator().manual_seed(N * V + D)
    last_ND, noise_ND = (torch.randn(N, D, generator=generator) for _ in range(2))
    head_VD = torch.randn(V, D, generator=generator) / 2
    return ((last_ND + apart * noise_ND).to(dtype), last_ND.to(dtype), head_VD.to(dtype))


# one token; a chunk that ends inside, at and past the vocabulary
@pytest.mark.parametrize("V", [1, 2, 96, 97, 1000])
@pytest.mark.parametrize("apart", [3.0, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
def test_matches_reference_in_chunks(V, apart, dtype, logit_scale, monkeypatch):
    monkeypatch.setattr(module, "VOCABULARY_AT_ONCE", 96)
    state_ND, last_ND, head_VD = draw(5, 24, V, apart, dtype)
    got = lens([state_ND, last_ND], last_ND, head_VD, logit_scale)
    for index, each_ND in enumerate((state_ND, last_ND)):
        wanted = reference.lens(each_ND, last_ND, head_VD, logit_scale)
        torch.testing.assert_close(got.kl_RN[index].double(), wanted["kl"], atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(got.entropy_RN[index].double(), wanted["entropy"], atol=3e-6, rtol=1e-5)
        assert torch.equal(got.token_RN[index].long(), wanted["token"])


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
def test_a_vanishing_divergence_keeps_its_digits(apart):
    """ln W of float32 logits alone would end at 1e-6; a converging loop goes on far below."""
    state_ND, last_ND, head_VD = draw(64, 32, 5000, apart)
    got = lens([state_ND], last_ND, head_VD).kl_RN[0].double()
    wanted = reference.lens(state_ND, last_ND, head_VD)["kl"]
    assert wanted.median() < 20 * apart**2
    assert ((got - wanted).abs() / wanted).median() < 0.02


def test_the_first_of_equal_tokens_wins(monkeypatch):
    monkeypatch.setattr(module, "VOCABULARY_AT_ONCE", 3)
    head_VD = torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.5]])
    state_ND = torch.ones(1, 1)
    assert lens([state_ND], state_ND, head_VD).token_RN.tolist() == [[1]]


@pytest.mark.parametrize("undefined", [float("nan"), float("inf")])
def test_undefined_states_stay_undefined(undefined):
    state_ND, last_ND, head_VD = draw(3, 8, 50, 0.1)
    state_ND[1, 2] = undefined
    got = lens([state_ND], last_ND, head_VD)
    assert got.kl_RN.isnan().tolist() == got.entropy_RN.isnan().tolist() == [[False, True, False]]
    assert (got.token_RN == -1).tolist() == [[False, True, False]]


def test_no_more_logits_at_once_than_said(monkeypatch):
    """A batch's logits [N, V] never exist: counted at the matrix products."""
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(module.F, "linear", lambda *args: seen.append(out := linear(*args)) or out)
    state_ND, last_ND, head_VD = draw(60, 16, 30_000, 1.0)
    lens([state_ND, last_ND], last_ND, head_VD)
    assert max(out.shape[1] for out in seen) <= module.VOCABULARY_AT_ONCE < 30_000
    assert sum(out.numel() for out in seen) == 2 * 60 * 30_000, "each state read once"
