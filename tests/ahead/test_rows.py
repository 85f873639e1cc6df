"""Every row of the kernels' settings, compiled for the GPUs it is for: it can be launched, and its machine
code keeps what makes the kernels fast. What is asked are bounds with a reason each, not what a compiler
happened to make; rows for any target are compiled for all four.
"""

from collections import Counter
from dataclasses import replace

import pytest

from looptap.benchmarks.ahead.compiled import Compiled, compile_row, compile_rows
from looptap.benchmarks.ahead.launches import launches
from looptap.kernels.gpu.tuned import TRITON, Entry, read_table

# Warps that a multiprocessor holds at once. Two for each of its four schedulers: the exponentials of one run
# beside the products of the other. Tiles of a Gram are short programs, which wait for memory in turns, and
# need four. gfx942's warps have 64 threads, and one fills a unit's registers.
LEAST_WARPS = {"attention_gram": 16}
LEAST_WARPS_ELSE = {"sm_80": 8, "sm_90": 8, "sm_100": 8, "gfx942": 4}
# Bytes of rows that a multiprocessor has asked for at once: 132 of them take 3 TB/s from memory that answers
# after 0.7 us, so that 16 KiB each are on their way (Little's law); three times that, as no program asks all
# the time.
LEAST_BYTES_IN_FLIGHT = 48 * 1024
ROWS_READ = {"plain": 2, "distance": 2, "everything": 5}  # tensors of such a launch that have rows
# What products of halves must run on where a row is tuned for the target: all else is half as fast or slower.
FASTEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# Instructions of the main loop for each score of a tile, and recurrence, by head width: schedulers issue four
# a cycle beside the products, and a loop with more is slower. A tenth over what Triton 3.6 and 3.9 make.
MOST_PER_SCORE = {
    "attention": {
        "sm_80": {64: 11.8, 128: 21.2},
        "sm_90": {64: 8.1, 128: 12.5, 256: 37.0},
        "sm_100": {64: 12.1, 128: 13.6, 256: 27.8},
    },
    "attention_with_statistics": {
        "sm_80": {64: 13.7, 128: 23.6},
        "sm_90": {64: 9.9, 128: 14.5, 256: 41.0},
        "sm_100": {64: 12.8, 128: 14.4, 256: 28.6},
    },
    "attention_columns": {
        "sm_80": {64: 8.5, 128: 10.7},
        "sm_90": {64: 8.5, 128: 9.0, 256: 10.6},
        "sm_100": {64: 16.1, 128: 16.4, 256: 23.4},
    },
    "attention_chain_2": {
        "sm_80": {128: 11.9},
        "sm_90": {64: 9.0, 128: 9.8},
        "sm_100": {64: 11.4, 128: 12.2},
    },
    "attention_chain_3": {"sm_90": {64: 14.4, 128: 16.2}, "sm_100": {64: 15.8, 128: 17.5}},
    "attention_gram_product": {"sm_90": {128: 4.7}, "sm_100": {128: 5.2}},
}
# instructions of attention's main loop with statistics, as a ratio to the same tiles without: the goal
MOST_LOOP_GROWTH = {"3.6": 1.20, "3.9": 1.25}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """Every launch of every row; it takes minutes, and once for all tests of this file."""
    return compile_rows(read_table())


def launch_faults(compiled: list[Compiled]) -> list[str]:
    """What forbids to launch any of these."""
    return [f"{c}: {fault}" for c in compiled for fault in c.faults]


def occupancy_faults(compiled: list[Compiled]) -> list[str]:
    """Returns those that leave a multiprocessor too little to do while it waits."""
    found = []
    for c in compiled:
        warps = c.resources.resident_warps(c.target)
        if c.entry.kernel == "residual_norm":
            programs = warps // c.resources.num_warps
            size = 4 if c.entry.dtype == "float32" else 2
            read = ROWS_READ[c.launch.rpartition(" ")[2]]
            in_flight = programs * c.entry.settings.rows * c.entry.width * size * read
            if in_flight < LEAST_BYTES_IN_FLIGHT:
                found.append(f"{c}: {in_flight} bytes in flight, not {LEAST_BYTES_IN_FLIGHT}")
            continue
        least = LEAST_WARPS.get(c.entry.kernel, LEAST_WARPS_ELSE[c.target])
        if warps < least:
            found.append(f"{c}: {warps} warps at once, not {least}; {c.resources}")
    return found


def instruction_faults(compiled: list[Compiled]) -> list[str]:
    """Returns those that, tuned for their target, lack the instructions that they were tuned for."""
    found = []
    for c in compiled:
        if c.entry.target == "any" or c.entry.dtype == "float32" or c.entry.kernel == "residual_norm":
            continue
        wanted = [FASTEST[c.target]]
        if c.entry.settings.descriptors:
            wanted.append("tile copy")
        elif c.entry.settings.num_stages > 1:
            wanted.append("async copy")
        found += [f"{c}: no {name}" for name in wanted if not c.resources.instructions.get(name)]
    return found


def loop_faults(compiled: list[Compiled]) -> list[str]:
    """Returns those whose main loops are longer than they may be."""
    found = []
    for c in compiled:
        if c.code is None or not c.code.main_loop:
            continue
        e = c.entry
        recurrences = int(e.kernel[-1]) if e.kernel.startswith("attention_chain") else 1
        scores = e.settings.rows * e.settings.keys * recurrences
        per_score = c.code.main_loop * 32 * c.resources.num_warps / scores
        most = MOST_PER_SCORE[e.kernel][c.target][e.width]
        if per_score > most:
            found.append(f"{c}: {per_score:.1f} instructions a score, not {most}")
    return found


def test_every_row_can_be_launched(compiled):
    assert launch_faults(compiled) == []


def test_every_row_keeps_a_multiprocessor_busy(compiled):
    assert occupancy_faults(compiled) == []


def test_tuned_rows_use_the_fastest_instructions(compiled):
    assert instruction_faults(compiled) == []


def test_main_loops_are_short(compiled):
    assert loop_faults(compiled) == []
    # every kernel with a loop over products was looked at
    looked_at = {c.entry.kernel for c in compiled if c.code is not None and c.code.main_loop}
    assert looked_at == MOST_PER_SCORE.keys()


def test_every_row_is_what_its_launches_take():
    for entry in read_table():
        found = launches(entry)
        assert found
        for launch in found.values():
            options, settings = launch.options, entry.settings
            assert (options["num_warps"], options["num_stages"]) == (settings.num_warps, settings.num_stages)
            assert settings.rows in (options.get("ROWS"), options.get("EDGE"), options.get("BLOCK"))


def test_rows_have_addresses_of_their_own():
    addresses = Counter((e.kernel, e.target, e.triton, e.width, e.dtype) for e in read_table())
    assert [address for address, n in addresses.items() if n > 1] == []


def test_every_width_has_a_row_for_anything():
    table = read_table()
    everywhere = {(e.kernel, e.width, e.dtype) for e in table if (e.target, e.triton) == ("any", "any")}
    assert {(e.kernel, e.width, e.dtype) for e in table} == everywhere


def find_row(kernel: str, width: int, target: str) -> Entry:
    rows = (
        e for e in read_table() if (e.kernel, e.width, e.dtype, e.target) == (kernel, width, "half", target)
    )
    return next(rows)


def test_statistics_lengthen_the_main_loop_by_little():
    measured = find_row("attention_with_statistics", 128, "sm_90")
    plain = replace(measured, kernel="attention")
    with_statistics, without = (
        [c.code.main_loop for c in compile_row(e, "sm_90")] for e in (measured, plain)
    )
    limit = MOST_LOOP_GROWTH.get(TRITON, max(MOST_LOOP_GROWTH.values()))
    for longer, shorter in zip(with_statistics, without, strict=True):
        assert 0 < shorter <= longer <= limit * shorter


# a row's settings made worse, and what it is then found to be
@pytest.mark.parametrize(
    ("row", "worse", "faults"),
    [
        # four rows of 2048 in the registers of 64 threads
        (("residual_norm", 2048, "any"), {"rows": 4, "num_warps": 2}, {launch_faults: "are spilled"}),
        # eight tiles of keys and of values in flight
        (("attention", 128, "sm_90"), {"num_stages": 8}, {launch_faults: "shared memory, over 232448"}),
        # the matrix instruction of four warps takes 64 rows
        (
            ("attention", 128, "sm_90"),
            {"rows": 32, "num_warps": 4},
            {instruction_faults: "no wgmma", loop_faults: "23.1 instructions a score, not 12.5"},
        ),
        # 255 registers of 128 threads, and room for one program
        (("attention", 128, "sm_90"), {"num_warps": 4}, {occupancy_faults: "4 warps at once, not 8"}),
    ],
)
def test_a_worse_row_is_found(row, worse, faults):
    entry = find_row(*row)
    entry = replace(entry, settings=replace(entry.settings, **worse))
    compiled = compile_row(entry, "sm_90")
    for find, says in faults.items():
        assert any(says in fault for fault in find(compiled))


def test_products_outside_the_matrix_units_are_found():
    (row,) = (e for e in read_table() if (e.kernel, e.width, e.dtype) == ("attention", 64, "float32"))
    in_float32 = compile_row(row, "sm_80")[0]
    as_half = replace(in_float32, entry=replace(row, dtype="half"))
    assert launch_faults([in_float32]) == [] and "outside the matrix units" in launch_faults([as_half])[0]
