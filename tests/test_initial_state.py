"""Initial states from a cut normal: their distribution, and that seed, id and position alone decide them."""

import math

import numpy as np
import pytest
import torch

from looptap.capture.models.draws import draw_initial_state
from looptap.capture.models.load import find_model
from looptap.tests.golden_files import GOLDEN, stored


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def cut_cdf(x: float) -> float:
    return (normal_cdf(x) - normal_cdf(-3)) / (normal_cdf(3) - normal_cdf(-3))


# of a normal cut at ±3: variance 1 − 2·3·φ(3) / (Φ(3) − Φ(−3))
STD_AFTER_CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / (normal_cdf(3) - normal_cdf(-3)))


def test_distribution():
    """Moments, bounds, and the whole distribution function, from 1.3 million draws."""
    std, width = 0.7, 160
    x = draw_initial_state(3, range(80), [100] * 80, width, std, truncated=True).double().flatten() / std
    n = x.numel()
    assert abs(STD_AFTER_CUT - 0.9866) < 1e-4
    assert abs(x.mean()) < 4 * n**-0.5
    assert abs(x.std() / STD_AFTER_CUT - 1) < 4 * (2 * n) ** -0.5
    assert abs((x**3).mean()) < 4 * 4 * n**-0.5
    assert 2.99 < x.max() <= 3 + 1e-6 and -3 - 1e-6 <= x.min() < -2.99
    # Kolmogorov's bound: 1.95/√n is exceeded once in a thousand
    places = np.linspace(-3, 3, 601)
    found = np.searchsorted(np.sort(x.numpy()), places) / n
    assert np.abs(found - [cut_cdf(p) for p in places]).max() < 1.95 / math.sqrt(n)


def test_quantiles_are_exact():
    """Each draw is the quantile of its uniform number: as many of those as channels, in order."""
    drawn = draw_initial_state(11, [5], [9], 7, 1.0, truncated=True).double()
    uniform = np.random.Generator(np.random.Philox(key=[11, 5])).random((9, 7))
    for x, u in zip(drawn.flatten().tolist(), uniform.flatten().tolist(), strict=True):
        assert cut_cdf(x) == pytest.approx(u, abs=3e-7)


def test_nothing_else_moves_a_state():
    """Company, order, and what follows; other seeds and ids give other states."""

    def draw(seed, ids, lengths):
        return draw_initial_state(seed, ids, lengths, 13, 0.5, truncated=True)

    together = draw(7, [3, 0, 12], [4, 9, 2])
    for sequence_id, part in zip([3, 0, 12], together.split([4, 9, 2]), strict=True):
        assert torch.equal(draw(7, [sequence_id], [len(part)]), part)
        assert torch.equal(draw(7, [sequence_id], [4001])[: len(part)], part)
    assert len(together.flatten().unique()) > 0.99 * together.numel()
    assert not torch.equal(draw(8, [3], [4]), together[:4])
    assert together.dtype == torch.float32


def test_the_plain_normal_is_the_generators_own():
    """Draws are those in stores of earlier captures, to the bit."""
    rows = [
        np.random.Generator(np.random.Philox(key=[5, i])).standard_normal((n, 6), dtype=np.float32)
        for i, n in ((2, 3), (9, 4))
    ]
    wanted = torch.from_numpy(np.concatenate(rows)) * 0.3
    assert torch.equal(draw_initial_state(5, [2, 9], [3, 4], 6, 0.3), wanted)


@pytest.mark.parametrize(
    ("name", "nominal"), [("huginn", 0.632456), ("retro-llama32", 0.0087039), ("retro-olmo2", 0.0087039)]
)
def test_of_the_scale_that_the_authors_code_draws(name, nominal):
    """Against the fixture's own drawn states: their std and bounds, 3072 numbers."""
    d, states = find_model(str(GOLDEN / name)).description, stored(name, "inputs")["input_states"]
    assert d.initial_std == pytest.approx(nominal, rel=1e-5)
    ours = draw_initial_state(0, range(2), [24, 24], d.width, d.initial_std, d.initial_state == "truncated")
    for x in (ours, states):
        assert abs(x.std() / (STD_AFTER_CUT * nominal) - 1) < 4 * (2 * x.numel()) ** -0.5
        assert x.abs().max() <= 3 * nominal * (1 + 1e-6)
