"""Every row of the kernels' settings, compiled for the GPUs it is for: nothing spills, shared memory
suffices, and the machine code takes what the committed table says.

Rows for any target are compiled for all four. On another Triton than the table's, all but the comparison
with it holds.
"""

import os
import platform
import sys
from collections import Counter

import pytest

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("Triton has wheels with compilers for Linux on x86-64 alone", allow_module_level=True)

import triton
import triton.language as tl

from looptap.benchmarks.resources import read_committed, write_committed
from looptap.kernels.gpu.compiled import (
    SHARED_LIMIT,
    TARGETS,
    Resources,
    Variant,
    compile_for,
    compile_row,
    compile_rows,
    find_modules,
)
from looptap.kernels.gpu.tuned import TRITON, Entry, _find, read_table

# instructions of attention's main loop with statistics, as a ratio to the same tiles without
MOST_LOOP_GROWTH = {"3.6": 1.20, "3.9": 1.25}
REWRITE = "if this was meant, rewrite the table: make kernels-table"


@pytest.fixture(scope="module")
def compiled():
    assert os.environ.get("TRITON_INTERPRET") != "1", "under TRITON_INTERPRET=1 nothing can be compiled"
    return compile_rows(read_table())


def test_every_kernel_has_rows_and_every_row_a_kernel():
    table = read_table()
    assert {entry.kernel for entry in table} == set(find_modules())
    addresses = Counter((e.kernel, e.target, e.triton, e.width, e.dtype) for e in table)
    assert [address for address, n in addresses.items() if n > 1] == []


def test_every_width_has_a_row_for_anything():
    table = read_table()
    everywhere = {(e.kernel, e.width, e.dtype) for e in table if (e.target, e.triton) == ("any", "any")}
    assert {(e.kernel, e.width, e.dtype) for e in table} == everywhere


def test_every_row_can_be_launched(compiled):
    faults = [
        f"{row}, {name}: {fault}"
        for row, variants in compiled.items()
        for name, resources in variants.items()
        for fault in resources.faults(row.rpartition(" ")[2])
    ]
    assert faults == []


def test_machine_code_takes_what_the_table_says(compiled):
    committed = read_committed()
    if triton.__version__ not in committed:
        pytest.skip(f"the table holds triton {' and '.join(committed)}, not {triton.__version__}")
    differences = list(compare(compiled, committed[triton.__version__]))
    assert differences == [], "\n".join([*differences, REWRITE])


def compare(found, expected):
    """A line for each variant that differs."""
    for row in sorted(found.keys() | expected.keys()):
        ours, theirs = found.get(row, {}), expected.get(row, {})
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                yield f"{row}, {name}: {ours.get(name)}, the table says {theirs.get(name)}"


def test_the_table_is_read_as_it_was_written(tmp_path):
    one = {"a 64 half any -> sm_90": {"x": Resources(8, 0, 16, (3, 4), 4, 1, {"matrix": 2})}}
    two = {"b 64 half any -> sm_90": {"y": Resources(9, 0, 16)}}
    path = tmp_path / "table.json"
    write_committed(one, "3.6.0", path)
    write_committed(two, "3.9.0", path)
    assert read_committed(path) == {"3.6.0": one, "3.9.0": two}
    assert list(compare(one, one)) == []
    assert len(list(compare(one, two))) == 2


def test_statistics_lengthen_the_main_loop_by_little():
    settings = _find("attention_with_statistics", 128, "half", "sm_90", TRITON)
    lengths: dict[str, dict[str, int]] = {}
    for kernel in ("attention", "attention_with_statistics"):
        entry = Entry(
            kernel=kernel, target="sm_90", triton=TRITON, width=128, dtype="half", settings=settings
        )
        for name, resources in compile_row(entry, "sm_90").items():
            lengths.setdefault(name.removeprefix(kernel), {})[kernel] = resources.main_loop
    assert lengths
    limit = MOST_LOOP_GROWTH.get(TRITON, max(MOST_LOOP_GROWTH.values()))
    for variant, found in lengths.items():
        plain, measured = found["attention"], found["attention_with_statistics"]
        assert 0 < plain <= measured <= limit * plain, f"{variant}: {plain} without, {measured} with"


@triton.jit
def _products(x_ptr, out_ptr, num, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(0, num):
        x = tl.load(x_ptr + i * SIZE * SIZE + at)
        sums = tl.dot(x, x, sums)
    tl.store(out_ptr + at, sums)


@triton.jit
def _roots(x_ptr, out_ptr, num, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    roots = tl.zeros([SIZE], tl.float32)
    for i in range(0, num):
        roots = tl.sqrt(roots + tl.load(x_ptr + i * SIZE + at))
    tl.store(out_ptr + at, roots)


def variant(kernel, size, num_warps, num_stages=1):
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32", "num": "i32"}
    return Variant("a loop", kernel, types, {"SIZE": size}, num_warps, num_stages)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_seen(target):
    # one warp of 32 threads holds 256 roots a thread in at most 255 registers; gfx942's has 64, and 512
    found = compile_for(variant(_roots, 32768 if target == "gfx942" else 8192, 1), target)
    assert found.spills > 0 and any("spilled" in fault for fault in found.faults(target))
    assert found.half_dots == 0 and found.main_loop == 0


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_products_are_seen(target):
    found = compile_for(variant(_products, 64, 4), target)
    assert found.half_dots == 1 and found.counts["matrix"] > 0 and found.faults(target) == []
    if target.startswith("sm_"):
        assert found.main_loop in found.loops and 0 < found.main_loop < 600
    without = Resources(found.registers, 0, found.shared, half_dots=1)
    assert any("matrix" in fault for fault in without.faults(target))


def test_too_much_shared_memory_is_seen():
    # Triton itself says nothing
    found = compile_for(variant(_products, 128, 8, num_stages=8), "sm_80")
    assert found.shared > SHARED_LIMIT["sm_80"]
    assert any("shared" in fault for fault in found.faults("sm_80"))
