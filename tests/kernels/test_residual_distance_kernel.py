"""Distances of rows to their references, on a GPU or in the interpreter, against float64."""

import pytest
import torch

from looptap.kernels import reference
from looptap.kernels.gpu import residual_distance as module
from looptap.kernels.gpu.residual_distance import residual_distance

RELATIVE, COSINE = 5e-7, 5e-7


def check(found, x, y, slack=1):
    wanted = reference.residual_statistics(x, y, y)
    torch.testing.assert_close(found[0].double(), wanted["step_norm"], rtol=RELATIVE * slack, atol=0)
    torch.testing.assert_close(found[1].double(), wanted["step_cosine"], rtol=0, atol=COSINE * slack)


def rows(N, D, dtype, device, apart=1.0):
    generator = torch.Generator().manual_seed(N * 10000 + D)
    x = torch.randn(N, 2 * D + 8, generator=generator)[:, 8 : 8 + D]  # rows of a wider matrix
    y = x + apart * torch.randn(N, D, generator=generator)
    return x.to(device, dtype), y.to(device, dtype)


def norms(x):
    return x.double().norm(dim=1).float()


# a row alone; both sides of a program's rows; widths around a power of two and the narrowest block
@pytest.mark.parametrize(("N", "D"), [(1, 1), (3, 63), (4, 256), (5, 257), (9, 576), (2, 2048), (17, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(N, D, dtype, device, slack):
    x, y = rows(N, D, dtype, device)
    check(residual_distance(x, y, norms(x), norms(y)), x, y, slack)


def test_close_rows_keep_their_cosine(device, slack):
    for apart in (1e-3, 1e-2, 0.3):
        x, y = rows(8, 512, torch.float32, device, apart)
        wanted = 1 - torch.cosine_similarity(x.double(), y.double(), dim=1)
        got = 1 - residual_distance(x, y, norms(x), norms(y))[1].double()
        torch.testing.assert_close(got, wanted, rtol=1e-4 * slack, atol=6e-8)


def test_lengths_that_differ_keep_their_cosine(device, slack):
    """1e4 times as long: squares of the lengths hold nothing of the angle."""
    x, y = rows(8, 512, torch.float32, device)
    check(residual_distance(x, 1e4 * y, norms(x), norms(1e4 * y)), x, 1e4 * y, slack)
    check(residual_distance(1e4 * x, y, norms(1e4 * x), norms(y)), 1e4 * x, y, slack)


def test_a_row_and_itself(device):
    x, _ = rows(3, 100, torch.bfloat16, device)
    difference, cosine = residual_distance(x, x, norms(x), norms(x))
    assert (difference == 0).all() and (cosine == 1).all()


def test_nothing_of_a_neighbour_shows(device):
    x, y = rows(4, 300, torch.float32, device)
    x, y = x.contiguous(), y.contiguous()
    x[1], y[2] = float("nan"), float("inf")
    found = torch.stack(residual_distance(x, y, norms(x), norms(y)))
    assert found[:, [0, 3]].isfinite().all() and not found[:, [1, 2]].isfinite().any()


def test_shapes_that_differ_are_refused(device):
    x, y = rows(4, 16, torch.float32, device)
    with pytest.raises(ValueError, match="not as x"):
        residual_distance(x, y[:3], norms(x), norms(y))
    with pytest.raises(ValueError, match="contiguous"):
        residual_distance(x.T, y.T, norms(x.T), norms(y.T))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("products = tl.sum(x * reference, 1)", "products = tl.sum(x, 1)"),
        ("mask = mask & (columns < D)", "mask = mask & (columns < D - 1)"),
    ],
)
def test_mutations_show(old, new, mutated, device):
    changed = mutated(module, old, new)
    x, y = rows(4, 300, torch.float32, device)
    with pytest.raises(AssertionError):
        check(changed.residual_distance(x, y, norms(x), norms(y)), x, y)
