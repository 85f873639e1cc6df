"""The CPU operations against their float64 references, at sizes on both sides of every edge."""

import math

import pytest
import torch

from looptap.kernels import reference
from looptap.kernels.attention import (
    attention,
    attention_with_statistics,
    make_cu_seqlens,
)
from looptap.kernels.attention_blocks import QUERIES_PER_BLOCK
from looptap.kernels.residual_norm import (
    STATISTICS,
    distance,
    residual_norm,
    residual_norm_statistics,
    residual_statistics,
    rms_norm,
    row_norm,
    row_peak,
)

B = QUERIES_PER_BLOCK


def packing(lengths):
    return make_cu_seqlens(lengths), max(lengths)


def random_qkv(lengths, H, K, C, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    return [(torch.randn(N, n, C, generator=generator) * scale).to(dtype) for n in (H, K, K)]


# one token; both sides of a block's edge; several sequences, equal ones in a run and apart
LENGTHS = [(1,), (B - 1,), (B,), (B + 1,), (2 * B + 3, 2 * B + 3), (5, 5, 5, 1, 5), (130, 64, 64, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("H", "K"), [(4, 4), (6, 2), (8, 1)]
)  # every head its own keys; groups of 3; all share
def test_attention_matches_reference(lengths, H, K):
    q, k, v = random_qkv(lengths, H, K, 16)
    wanted = reference.attention(q, k, v, lengths, sink_tokens=2)
    o, statistics = attention_with_statistics(q, k, v, *packing(lengths), 0.25, sink_tokens=2)
    torch.testing.assert_close(o.double(), wanted["o"], atol=2e-6, rtol=0)
    torch.testing.assert_close(
        attention(q, k, v, *packing(lengths), 0.25).double(), wanted["o"], atol=2e-6, rtol=0
    )
    limits = {"entropy": 1e-5, "peak": 2e-6, "sink": 2e-6, "received": 2e-5}
    for name, limit in limits.items():
        got = getattr(statistics, f"{name}_NH").double()
        torch.testing.assert_close(got, wanted[name], atol=limit, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_of_sharp_rows():
    """Scores in the hundreds: one key takes all, and the entropy must neither cancel to garbage nor turn
    negative.
    """
    q, k, v = random_qkv((100,), 2, 2, 16, scale=12.0)
    wanted = reference.attention(q, k, v, (100,))
    _, statistics = attention_with_statistics(q, k, v, *packing((100,)), 0.25)
    torch.testing.assert_close(statistics.entropy_NH.double(), wanted["entropy"], atol=2e-4, rtol=0)
    assert (statistics.entropy_NH >= 0).all()


def test_attention_of_equal_keys():
    """Equal keys: uniform rows, so the entropy is ln n and column j receives a harmonic sum."""
    T = 70
    q, k, v = random_qkv((T,), 2, 2, 8)
    k = k[:1].expand(T, 2, 8).contiguous()
    _, statistics = attention_with_statistics(q, k, v, *packing((T,)), 1.0, sink_tokens=3)
    n = torch.arange(1, T + 1, dtype=torch.float64)
    torch.testing.assert_close(statistics.entropy_NH[:, 0].double(), n.log(), atol=2e-6, rtol=0)
    torch.testing.assert_close(statistics.sink_NH[:, 1].double(), 3 / n.clamp_min(3), atol=1e-6, rtol=0)
    harmonic = (1 / n).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(statistics.received_NH[:, 0].double(), harmonic, atol=1e-5, rtol=0)


def test_attention_rows_and_columns_add_up():
    lengths = (77, 12)
    q, k, v = random_qkv(lengths, 4, 2, 16)
    _, statistics = attention_with_statistics(q, k, v, *packing(lengths), 0.25)
    first, second = statistics.received_NH.split(lengths)
    torch.testing.assert_close(first.sum(0), torch.full((4,), 77.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(second.sum(0), torch.full((4,), 12.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(first[0], statistics.sink_NH[:77].sum(0), atol=1e-4, rtol=0)
    row0 = statistics.entropy_NH[[0, 77]], statistics.peak_NH[[0, 77]]
    assert (row0[0] == 0).all() and (row0[1] == 1).all()


def test_log_sum_exp():
    lengths = (70, 3)
    q, k, v = random_qkv(lengths, 4, 2, 16, scale=3.0)
    _, statistics = attention_with_statistics(q, k, v, *packing(lengths), 0.25)
    wanted = reference.attention_lse(q, k, lengths, 0.25)
    torch.testing.assert_close(statistics.lse_NH.double(), wanted, rtol=0, atol=2e-5)


def test_attention_in_bfloat16_errs_no_more_than_its_inputs():
    """Statistics of bf16 queries and keys are float32 of the exact softmax, not of a rounded matrix."""
    lengths = (150,)
    q, k, v = random_qkv(lengths, 4, 2, 32, dtype=torch.bfloat16)
    wanted = reference.attention(q, k, v, lengths)
    o, statistics = attention_with_statistics(q, k, v, *packing(lengths), 32**-0.5)
    plain = attention(q, k, v, *packing(lengths), 32**-0.5)
    error = (o.double() - wanted["o"]).abs().max()
    assert error <= 2 * (plain.double() - wanted["o"]).abs().max()
    torch.testing.assert_close(statistics.entropy_NH.double(), wanted["entropy"], atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.received_NH.double(), wanted["received"], atol=2e-5, rtol=0)


# 1 and 63: less than a vector register's tile; 500: a ragged tail; 2048: round
@pytest.mark.parametrize("D", [1, 63, 500, 2048])
@pytest.mark.parametrize("N", [1, 7])
def test_residual_statistics_match_reference(N, D):
    generator = torch.Generator().manual_seed(D)
    x, before = (torch.randn(N, D, generator=generator) for _ in range(2))
    previous = x + 1e-3 * torch.randn(N, D, generator=generator)
    wanted = reference.residual_statistics(x, before, previous)
    torch.testing.assert_close(row_norm(x).double(), wanted["norm"], rtol=5e-7, atol=0)
    torch.testing.assert_close(row_peak(x).double(), wanted["peak"], rtol=0, atol=0)
    measured = distance(x, previous, row_norm(x), row_norm(previous))
    torch.testing.assert_close(measured.norm_N.double(), wanted["step_norm"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(measured.cosine_N.double(), wanted["step_cosine"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "given", [(), ("previous",), ("block_input", "last"), ("block_input", "previous", "last")]
)
def test_statistics_of_residuals_that_are_there(given, dtype):
    """Float64's, NaN where nothing was given to compare with, and to the bit those of the fused operation."""
    generator = torch.Generator().manual_seed(2)
    x, branch, block_input, previous, last = torch.randn(5, 7, 500, generator=generator).to(dtype)
    near = {"block_input": block_input, "previous": x + branch + 0.01 * previous, "last": x + branch + last}
    references = {f"{name}_ND": near[name] for name in given}
    result, fused_SN = residual_norm_statistics(x, branch, eps=1e-5, **references)
    measured_SN = residual_statistics(result.residual_ND, **references)
    assert measured_SN.dtype == torch.float32 and torch.equal(measured_SN.isnan(), fused_SN.isnan())
    assert torch.equal(measured_SN.nan_to_num(), fused_SN.nan_to_num())

    residual = result.residual_ND
    wanted = reference.residual_statistics(residual, near["block_input"], near["previous"])
    to_last = reference.residual_statistics(residual, near["block_input"], near["last"])
    wanted |= {"gap_norm": to_last["step_norm"], "gap_cosine": to_last["step_cosine"]}
    needs = {"update": "block_input", "step": "previous", "gap": "last"}
    for name, got in zip(STATISTICS, measured_SN.double(), strict=True):
        reference_name = needs.get(name.partition("_")[0])
        if reference_name is not None and reference_name not in given:
            assert got.isnan().all(), name
            continue
        expected = wanted[name.removeprefix("residual_")]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("apart", [1e-3, 1e-2, 0.3, 3.0])
def test_cosine_near_one(apart):
    """Close states: 1 − cos keeps digits that the plain float32 formula has lost."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator)
    y = x + apart * torch.randn(64, 512, generator=generator)
    wanted = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)
    got = 1 - distance(x, y, row_norm(x), row_norm(y)).cosine_N.double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=6e-8)  # 2⁻²⁴: the cosine itself is float32


def test_cosine_of_rows_whose_squares_overflow_together():
    """Norms near 1.4e19: their product is beyond float32, they are not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 64, generator=generator) * 1.7e18
    for apart in (0.01, 0.2, 0.45):
        y = x + apart * torch.randn(8, 64, generator=generator) * 1.7e18
        wanted = torch.cosine_similarity(x.double(), y.double(), dim=-1)
        got = distance(x, y, row_norm(x), row_norm(y)).cosine_N.double()
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-7)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_cosine_of_lengths_that_differ(factor):
    """Squares of the two lengths hold nothing of the angle then."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, 512, generator=generator) for _ in range(2))
    y = y * factor + x * factor  # rows at some 45 degrees
    wanted = torch.cosine_similarity(x.double(), y.double(), dim=-1, eps=0.0)
    got = distance(x, y, row_norm(x), row_norm(y)).cosine_N.double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-7)


def test_distance_to_itself_and_to_its_opposite():
    x = torch.randn(5, 33)
    norm_N = row_norm(x)
    same, opposite = distance(x, x, norm_N, norm_N), distance(x, -x, norm_N, norm_N)
    assert (same.norm_N == 0).all() and (same.cosine_N == 1).all()
    torch.testing.assert_close(opposite.cosine_N, torch.full((5,), -1.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "places", [(), ("branch",), ("stream",), ("next",), ("branch", "next"), ("stream", "next")]
)
def test_residual_norm_places(places):
    generator = torch.Generator().manual_seed(3)
    x, branch = (torch.randn(9, 48, generator=generator) for _ in range(2))
    weights = {place: torch.rand(48, generator=generator) + 0.5 for place in places}
    wanted = branch.double()
    if "branch" in weights:
        wanted = reference.rms_norm(wanted, weights["branch"], 1e-5)
    wanted = x.double() + wanted
    if "stream" in weights:
        wanted = reference.rms_norm(wanted, weights["stream"], 1e-5)
    got = residual_norm(x, branch, eps=1e-5, **{f"{place}_weight_D": w for place, w in weights.items()})
    torch.testing.assert_close(got.residual_ND.double(), wanted, atol=2e-6, rtol=0)
    after = reference.rms_norm(wanted, weights["next"], 1e-5) if "next" in weights else wanted
    torch.testing.assert_close(got.y_ND.double(), after, atol=4e-6, rtol=0)


def test_rms_norm_epsilon_shows():
    """Rows so small that the epsilon decides."""
    x, weight = torch.full((2, 16), 1e-4), torch.ones(16)
    for eps in (1e-5, 1e-6):
        wanted = 1e-4 / math.sqrt(1e-8 + eps)
        torch.testing.assert_close(rms_norm(x, weight, eps), torch.full((2, 16), wanted), rtol=1e-6, atol=0)
