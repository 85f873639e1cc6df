"""Finds the fastest settings of every kernel on the GPU at hand and writes them into the kernels' table.

Candidates are compiled for this GPU first; those that spill, or ask for more shared memory than there is, are
out. The rest are timed in turns with the settings in use now, on inputs that do not fit the cache. A row for
this GPU and Triton is written where one is faster by more than the margin, and what was before and after is
printed. `make tune` runs it; run the tests after it.

`--candidates-only --target sm_90` compiles and prints, without a GPU.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch

from ..kernels.attention import attention, attention_with_statistics, make_cu_seqlens
from ..kernels.attention_pairs import attention_chain, attention_gram
from ..kernels.gpu import tuned as table
from ..kernels.gpu.tuned import TRITON, Entry, Settings
from ..kernels.residual_norm import residual_norm_statistics
from .ahead.compiled import TARGETS, compile_row
from .ahead.launches import taking
from .kernels_gpu import attention_columns
from .timing_gpu import Run, Timer, num_sets

MARGIN = 0.02  # that a new row must be faster by; less is noise
_TOKENS, _LENGTH, _MODEL_WIDTH = 16_384, 2048, 2048
_GRAM_LENGTH = 1024
_DTYPES = {"half": torch.bfloat16, "float32": torch.float32}


def list_candidates(entry: Entry, target: str) -> list[Settings]:
    """Ways to cut up a kernel that are worth a try, the row's own first."""
    if entry.kernel == "residual_norm":
        grid = [Settings(rows=rows, num_warps=warps) for rows, warps in product((1, 2, 4, 8), (2, 4, 8, 16))]
    else:
        has_descriptors = entry.kernel in ("attention", "attention_with_statistics", "attention_columns")
        described = (False, True) if has_descriptors and target in ("sm_90", "sm_100") else (False,)
        sizes = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4), described)
        grid = [
            Settings(rows=rows, keys=keys, num_warps=warps, num_stages=stages, descriptors=descriptors)
            for rows, keys, warps, stages, descriptors in sizes
            if entry.kernel != "attention_gram" or rows == keys  # its tiles are square
        ]
    return [entry.settings, *(settings for settings in grid if settings != entry.settings)]


def check(entry: Entry, target: str) -> str:
    """Says why a candidate is out; nothing if it may be launched."""
    try:
        compiled = compile_row(entry, target)
    except Exception as error:  # whatever a compiler says, this candidate is not for it
        return f"does not compile: {type(error).__name__}"
    return next((fault for launch in compiled for fault in launch.faults), "")


def entries_in_use(target: str) -> list[Entry]:
    """What a launch on this target takes now, of every kernel, width and dtype."""
    found = {(e.kernel, e.width, e.dtype) for e in table.read_table()}
    return [
        Entry(
            kernel=kernel,
            target=target,
            triton=TRITON,
            width=width,
            dtype=dtype,
            settings=table._find(kernel, width, dtype, target, TRITON),
        )
        for kernel, width, dtype in sorted(found)
    ]


def make_workload(entry: Entry, device: torch.device) -> tuple[Run, int]:
    """A call of the entry's kernel at a size that fills a GPU, and how many sets of inputs there are."""
    dtype = _DTYPES[entry.dtype]
    if entry.kernel == "residual_norm":
        return _residual_workload(entry.width, dtype, device)
    if entry.kernel == "attention_gram_product":
        return _gram_workload(entry.width, 128, dtype, device)
    if entry.kernel == "attention_gram":
        return _gram_workload(64, entry.width, dtype, device)
    return _attention_workload(entry.kernel, entry.width, dtype, device)


def _residual_workload(D: int, dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    sets = num_sets(device, 3 * _TOKENS * D * dtype.itemsize)
    x, branch, previous = torch.randn(3, sets, _TOKENS, D, device=device, dtype=dtype).unbind()
    weight = torch.rand(D, device=device, dtype=dtype)
    return lambda i: residual_norm_statistics(
        x[i], branch[i], eps=1e-6, next_weight_D=weight, previous_ND=previous[i]
    ), sets


def _attention_workload(kernel: str, C: int, dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    H, scale = max(1, _MODEL_WIDTH // C), C**-0.5
    cu_seqlens = make_cu_seqlens([_LENGTH] * (_TOKENS // _LENGTH), device)
    qkv = torch.randn(4, _TOKENS, 3 * H, C, device=device, dtype=dtype)
    q, k, v = (list(qkv[:, :, part * H : (part + 1) * H]) for part in range(3))
    given = (cu_seqlens, _LENGTH, scale)
    if kernel == "attention":
        return lambda i: attention(q[i], k[i], v[i], *given), 4
    if kernel == "attention_with_statistics":
        return lambda i: attention_with_statistics(q[i], k[i], v[i], *given, columns=False), 4
    lse = [attention_with_statistics(*x, *given)[1].lse_NH for x in zip(q, k, v, strict=True)]
    if kernel == "attention_columns":
        return lambda i: attention_columns(q[i], k[i], lse[i], *given), 4
    R = int(kernel.removeprefix("attention_chain_"))
    pairs = [(r, r - 1) for r in range(1, R)]
    return lambda i: attention_chain(q[:R], k[:R], lse[:R], *given, pairs), 2


def _gram_workload(n: int, C: int, dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    T, H, scale = _GRAM_LENGTH, max(1, _MODEL_WIDTH // C), C**-0.5
    cu_seqlens = make_cu_seqlens([T], device)
    q, k, v = torch.randn(3, n, T, H, C, device=device, dtype=dtype).unbind()
    lse = torch.stack(
        [attention_with_statistics(*x, cu_seqlens, T, scale)[1].lse_NH for x in zip(q, k, v, strict=True)]
    )
    return lambda i: attention_gram(q, k, lse, cu_seqlens, T, scale), 2


def tune(entry: Entry, candidates: list[Settings], timer: Timer) -> tuple[Settings, float, float]:
    """The fastest settings, and seconds with those in use and with the fastest."""
    run, sets = make_workload(entry, timer.device)

    def with_settings(settings: Settings) -> Run:
        def run_so(i: int) -> None:
            with taking(replace(entry, settings=settings)):
                run(i)

        return run_so

    by_name = {repr(settings): settings for settings in candidates}
    times = timer({name: with_settings(settings) for name, settings in by_name.items()}, sets)
    for name, why in timer.failures.items():
        print(f"    {name} failed: {why}")
    timer.failures.clear()
    before = times[repr(candidates[0])]
    best = min(times, key=lambda name: times[name])
    return by_name[best], before, times[best]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the fastest settings of the kernels on this GPU.")
    parser.add_argument("--kernel", help="only this one")
    parser.add_argument("--width", type=int, help="only this padded width")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="only this class of types")
    parser.add_argument("--target", choices=sorted(TARGETS), help="for --candidates-only")
    parser.add_argument("--candidates-only", action="store_true", help="compile and print, without a GPU")
    parser.add_argument("--processes", type=int, default=2, help="that compile at a time (2)")
    arguments = parser.parse_args()
    if arguments.candidates_only != bool(arguments.target):
        parser.error("--candidates-only and --target go together; without them the GPU at hand is tuned for")
    if not arguments.candidates_only and not torch.cuda.is_available():
        print("no GPU was found that this PyTorch can use: nothing was tuned", file=sys.stderr)
        sys.exit(2)
    target = arguments.target or table._target(torch.device("cuda"))
    if target not in TARGETS:
        parser.error(f"this GPU is {target}, and candidates can be checked for {', '.join(TARGETS)} alone")
    wanted = [
        entry
        for entry in entries_in_use(target)
        if (arguments.kernel or entry.kernel) == entry.kernel
        and (arguments.width or entry.width) == entry.width
        and (arguments.dtype or entry.dtype) == entry.dtype
    ]
    if not wanted:
        parser.error("the table has no such kernel, width and dtype")
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for entry in wanted:
            print(f"{entry.kernel} {entry.width} {entry.dtype} on {target}, triton {TRITON}")
            candidates = list_candidates(entry, target)
            tried = [replace(entry, settings=settings) for settings in candidates]
            faults = list(pool.map(partial(check, target=target), tried))
            passed = [settings for settings, fault in zip(candidates, faults, strict=True) if not fault]
            if arguments.candidates_only:
                for settings, fault in zip(candidates, faults, strict=True):
                    print(f"    {settings}: {fault or 'passes'}")
                continue
            if faults[0]:
                sys.exit(f"the settings in use cannot be launched: {faults[0]}")
            _tune_and_write(entry, passed)


def _tune_and_write(entry: Entry, candidates: list[Settings]) -> None:
    best, before_s, after_s = tune(entry, candidates, Timer(torch.device("cuda"), rounds=10))
    print(f"    {len(candidates)} candidates; before {before_s * 1e6:.1f} us with {candidates[0]}")
    print(f"    after {after_s * 1e6:.1f} us with {best}")
    if after_s > (1 - MARGIN) * before_s:
        print("    kept as it was")
        return
    tuned = replace(entry, settings=best)
    table.write_table([*(e for e in table.read_table() if _address(e) != _address(tuned)), tuned])
    table._find.cache_clear()


def _address(entry: Entry) -> tuple[object, ...]:
    return entry.kernel, entry.target, entry.triton, entry.width, entry.dtype


if __name__ == "__main__":
    main()
