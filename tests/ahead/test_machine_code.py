"""What is read of machine code, of kernels that are made to have a fault: it is seen, and in no others."""

import pytest
import torch
import triton
import triton.language as tl

from looptap.benchmarks.ahead.compiled import TARGETS, compile_launch
from looptap.benchmarks.ahead.launches import record
from looptap.benchmarks.ahead.machine_code import MATRIX, SHARED_LIMIT, Resources, read_code, read_resources


@triton.jit
def _products(x_ptr, out_ptr, num, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(0, num):
        x = tl.load(x_ptr + i * SIZE * SIZE + at)
        sums = tl.dot(x, x, sums)
    tl.store(out_ptr + at, sums)


@triton.jit
def _sums(x_ptr, out_ptr, num, SIZE: tl.constexpr):
    """The same products without the matrix units."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(0, num):
        sums += tl.load(x_ptr + i + row * SIZE).to(tl.float32) * tl.load(x_ptr + i * SIZE + column)
    tl.store(out_ptr + row * SIZE + column, sums)


@triton.jit
def _roots(x_ptr, out_ptr, num, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    roots = tl.zeros([SIZE], tl.float32)
    for i in range(0, num):
        roots = tl.sqrt(roots + tl.load(x_ptr + i * SIZE + at))
    tl.store(out_ptr + at, roots)


def compiled(kernel, size, target, *, num_warps, num_stages=1):
    x = torch.empty(size, dtype=torch.bfloat16, device="meta")
    out = torch.empty(size, dtype=torch.float32, device="meta")
    options = {"SIZE": size, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    (launch,) = record(lambda: kernel[(1,)](x, out, 3, **options))
    return compile_launch(launch, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_seen(target):
    # one warp of 32 threads holds 256 roots a thread in at most 255 registers; gfx942's has 64, and 512
    size = 32_768 if target == "gfx942" else 8192
    found = read_resources(compiled(_roots, size, target, num_warps=1))
    assert found.spills > 0 and any("spilled" in fault for fault in found.faults(target))
    assert not found.instructions


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_products_are_seen(target):
    kernel = compiled(_products, 64, target, num_warps=4)
    found = read_resources(kernel)
    (unit,) = found.instructions.keys() & MATRIX
    assert unit == {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]
    assert found.num_warps == 4 and found.faults(target) == []
    if target.startswith("sm_"):
        assert 0 < read_code(kernel).main_loop < 600


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sums_are_no_matrix_products(target):
    kernel = compiled(_sums, 64, target, num_warps=4)
    found = read_resources(kernel)
    assert not found.instructions.keys() & MATRIX
    assert read_code(kernel).main_loop == 0


def test_copies_that_nobody_waits_for_are_seen():
    ahead, waiting = (
        read_resources(compiled(_products, 64, "sm_80", num_warps=4, num_stages=n)) for n in (3, 1)
    )
    assert ahead.instructions["async copy"] > 0 and "async copy" not in waiting.instructions


def test_too_much_shared_memory_is_seen():
    # Triton itself says nothing
    found = read_resources(compiled(_products, 128, "sm_80", num_warps=8, num_stages=8))
    assert found.shared > SHARED_LIMIT["sm_80"]
    assert any("shared" in fault for fault in found.faults("sm_80"))


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "target", "warps"),
    [
        (32, 0, 4, "sm_90", 64),  # all there are
        (255, 0, 8, "sm_90", 8),  # 256 · 256 threads take all 65,536 registers
        (129, 0, 8, "sm_80", 8),  # 136 of each thread
        (128, 0, 8, "sm_80", 16),
        (32, 100_000, 4, "sm_90", 8),  # two fit into 228 KiB
        (32, 100_000, 4, "sm_80", 4),  # and one into 164
        (256, 0, 4, "gfx942", 8),  # two on each of the four units
        (257, 0, 4, "gfx942", 4),
        (64, 40_000, 4, "gfx942", 4),
    ],
)
def test_warps_that_a_multiprocessor_holds(registers, shared, num_warps, target, warps):
    assert Resources(registers, 0, shared, num_warps).resident_warps(target) == warps
