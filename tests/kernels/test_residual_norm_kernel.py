"""The fused residual norm against float64, with each rounding where PyTorch's code has it."""

import math
from collections.abc import Iterator
from itertools import chain, combinations, product

import pytest
import torch

from looptap.kernels import reference
from looptap.kernels import residual_norm as cpu
from looptap.kernels.gpu import residual_norm as kernel
from looptap.kernels.gpu.tuned import find_settings
from looptap.tests.kernels.properties import given, settings
from looptap.tests.kernels.properties import strategies as st

# numpy's, of what the interpreter computes behind a mask or of rows of zeros
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:Mismatch dtype")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NORM_LIMIT = 5e-7  # relative; norms and distances
COSINE_LIMIT = 5e-7
COSINE_DISTANCE_LIMIT = 1e-4  # relative, of 1 − cos
FLOAT32_LIMIT = 1e-6  # of residual and y, of a row's largest value
EPS = 1e-5
WEIGHTS = ("branch", "stream", "next")
REFERENCES = ("block_input", "previous", "last")
ROWS = [name.removeprefix("residual_") for name in cpu.STATISTICS]
# NaNs that no arithmetic makes: (integer of the same size, its value)
POISON = {F32: (torch.int32, 0x7FC0DEAD), BF16: (torch.int16, 0x7FDE), F16: (torch.int16, 0x7EAD)}
GUARD = 8192  # a tile and more


def subsets(names):
    return list(chain.from_iterable(combinations(names, n) for n in range(len(names) + 1)))


class Guarded:
    """Makes outputs inside poisoned memory; with a gap there is poison between the rows as well."""

    def __init__(self):
        self.made = []

    def __call__(self, size, dtype, device, gap=0):
        integer, value = POISON[dtype]
        *_, D = size
        outer = math.prod(size[:-1])
        memory = torch.full((2 * GUARD + outer * (D + gap),), value, dtype=integer, device=device)
        inside = torch.zeros(memory.shape, dtype=torch.bool, device=device)
        inside[GUARD:-GUARD].view(outer, D + gap)[:, :D] = True
        self.made.append((memory, inside, value))
        return memory[GUARD:-GUARD].view(dtype).view(outer, D + gap)[:, :D].view(size)

    def check(self):
        assert self.made
        for memory, inside, value in self.made:
            assert (memory[~inside] == value).all(), "written outside"
            assert (memory[inside] != value).all(), "left unwritten"


@pytest.fixture
def guarded(monkeypatch) -> Iterator[Guarded]:
    guarded = Guarded()
    monkeypatch.setattr(kernel, "_empty", guarded)
    yield guarded
    guarded.check()


def make_rows(N, D, dtype, device, seed, scale=1.0, offset=16, gap=32):
    """Random rows out of a wider, taller matrix of NaN."""
    matrix = torch.full((N + 2, D + gap), float("nan"), dtype=dtype)
    values = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    matrix[1:-1, offset : offset + D] = values.to(dtype)
    return matrix.to(device)[1:-1, offset : offset + D]


def make_weights(D, dtype, device, names=WEIGHTS):
    """Between NaN as well."""
    generator = torch.Generator().manual_seed(D)
    made = []
    for name in WEIGHTS:
        vector = torch.full((D + 32,), float("nan"), dtype=dtype, device=device)
        vector[16:-16] = (torch.rand(D, generator=generator) + 0.5).to(device, dtype)
        made.append(vector[16:-16] if name in names else None)
    return made


def make_case(N, D, dtype, device, *, weights=WEIGHTS, references=REFERENCES, **layout):
    """Arguments of `residual_norm_statistics`; the references lie near where the residual will."""
    made = {
        name: make_rows(N, D, dtype, device, seed, **layout)
        for seed, name in enumerate(("x", "branch", *REFERENCES))
    }
    given = [made[name] if name in references else None for name in REFERENCES]
    return [made["x"], made["branch"], *make_weights(D, dtype, device, weights), EPS, *given]


def rounded(x, dtype):
    """float64 as stored in a dtype. Triton's interpreter cuts bfloat16 off where hardware rounds."""
    if dtype == BF16 and x.device.type == "cpu":
        return ((x.float().view(torch.int32) >> 16) << 16).view(F32).double()
    return x.to(dtype).double()


def expected(x, branch, branch_weight, stream_weight, next_weight):
    """Residual and y, float64 but for the roundings of PyTorch's code."""

    def norm(value, weight, dtype):
        normed = reference.rms_norm(value, torch.ones_like(weight), EPS)
        product = rounded(normed, dtype) * weight.double()
        dtype = torch.promote_types(dtype, weight.dtype)
        return rounded(product, dtype), dtype

    value, dtype = branch.double(), branch.dtype
    if branch_weight is not None:
        value, dtype = norm(value, branch_weight, dtype)
    dtype = torch.promote_types(x.dtype, dtype)
    value = rounded(x.double() + value, dtype)
    if stream_weight is not None:
        value, dtype = norm(value, stream_weight, dtype)
    y = None if next_weight is None else norm(value, next_weight, dtype)
    return (value, dtype), y


def assert_rounds_alike(got, wanted, slack):
    """float32 to its limit; halves bit by bit, but for sums that lie on the edge of two values."""
    wanted, dtype = wanted
    assert got.dtype == dtype and got.shape == wanted.shape
    largest = wanted.abs().amax(1, keepdim=True)
    error = (got.double() - wanted).abs()
    if dtype == F32:
        assert (error <= FLOAT32_LIMIT * slack * largest).all()
    else:
        assert (error > 0).sum() <= 1 + 0.01 * slack * error.numel()
        assert (error <= torch.finfo(dtype).eps * largest).all()


def wanted_statistics(residual, block_input, previous, last):
    """Float64, of the residual as it was stored."""
    there = residual.double()
    anything = there if block_input is None else block_input
    values = reference.residual_statistics(there, anything, previous)
    if last is not None:
        to_last = reference.residual_statistics(there, anything, last)
        values |= {"gap_norm": to_last["step_norm"], "gap_cosine": to_last["step_cosine"]}
    if block_input is None:
        del values["update_norm"]
    return values


def assert_statistics(statistics, residual, references, slack):
    wanted = wanted_statistics(residual, *references)
    assert statistics.dtype == F32 and statistics.shape == (len(ROWS), len(residual))
    for name, got in zip(ROWS, statistics.double(), strict=True):
        if name not in wanted:
            assert got.isnan().all(), name
            continue
        rtol, atol = (0, COSINE_LIMIT * slack) if "cosine" in name else (NORM_LIMIT * slack, 0)
        torch.testing.assert_close(
            got,
            wanted[name],
            rtol=0 if name == "peak" else rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(module, case, slack):
    residual, y, statistics = module.residual_norm_statistics(*case)
    wanted_residual, wanted_y = expected(*case[:5])
    assert_rounds_alike(residual, wanted_residual, slack)
    # y is held to the residual as it was stored
    if case[4] is None:
        assert y.shape == (0,)
    else:
        zeros = torch.zeros_like(residual)
        assert_rounds_alike(y, expected(residual, zeros, None, None, case[4])[1], slack)
        assert y.dtype == wanted_y[1]
    assert_statistics(statistics, residual, case[6:], slack)
    return residual, y, statistics


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("weights", subsets(WEIGHTS))
def test_norms_stand_where_they_are_given(weights, dtype, device, slack, guarded):
    case = make_case(5, 208, dtype, device, weights=weights, references=("previous",))
    residual, y, _ = check(kernel, case, slack)
    plain_residual, plain_y = kernel.residual_norm(*case[:6])
    assert torch.equal(residual, plain_residual) and torch.equal(y, plain_y)


def edges(D, dtype, device):
    """One row, and both sides of a tile's edge."""
    rows = find_settings("residual_norm", max(D, kernel.LEAST_WIDTH), dtype, device).rows
    return sorted({1, max(rows - 1, 1), rows, rows + 1})


# 1: no second element; 63: odd; 511 to 513 and 1023 to 1025: around a padded width; 576, 2560: of real
# models; 8192: the largest
@pytest.mark.parametrize("D", [1, 63, 511, 512, 513, 576, 1023, 1024, 1025, 2048, 2560, 4096, 8191, 8192])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_edge_of_a_tile(D, dtype, device, slack, guarded):
    for N in edges(D, dtype, device):
        check(kernel, make_case(N, D, dtype, device), slack)


# aligned; odd distance between rows; odd address; both
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (16, 33), (5, 32), (7, 9)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_at_any_address(offset, gap, dtype, device, slack, guarded):
    check(kernel, make_case(6, 528, dtype, device, offset=offset, gap=gap), slack)


@pytest.mark.parametrize("references", subsets(REFERENCES))
def test_statistics_not_asked_for_are_nan(references, device, slack, guarded):
    check(kernel, make_case(7, 96, F32, device, references=references), slack)


# the residual and y take the wider of two types, as PyTorch's products do
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, F32), (F16, F32), (F32, BF16), (BF16, F16)])
@pytest.mark.parametrize("weights", [("branch",), ("stream",), ("next",), WEIGHTS])
def test_weights_of_another_dtype(dtype, weight, weights, device, slack, guarded):
    case = make_case(5, 80, dtype, device)
    case[2:5] = make_weights(80, weight, device, weights)
    residual, y, _ = check(kernel, case, slack)
    names = dict(zip(("branch_weight_D", "stream_weight_D", "next_weight_D"), case[2:5], strict=True))
    by_cpu = cpu.residual_norm(case[0], case[1], eps=EPS, **names)
    assert residual.dtype == by_cpu.residual_ND.dtype
    assert case[4] is None or y.dtype == by_cpu.y_ND.dtype


@pytest.mark.parametrize("dtype", [F32, F16])  # bfloat16 is cut off in the interpreter
def test_a_cpu_run_agrees(dtype, device, slack):
    case = make_case(9, 576, dtype, device)
    by_cpu = cpu.residual_norm(
        case[0], case[1], eps=EPS, branch_weight_D=case[2], stream_weight_D=case[3], next_weight_D=case[4]
    )
    for got, wanted in zip(kernel.residual_norm(*case[:6]), by_cpu, strict=True):
        assert_rounds_alike(got, (wanted.double(), dtype), slack)


def step_to(device, apart, dtype=F32):
    """Residuals whose previous ones are so far away, without norms: residual = branch."""
    branch = make_rows(16, 500, dtype, device, 1)
    noise = make_rows(16, 500, dtype, device, 2, apart)
    return [torch.zeros_like(branch), branch, None, None, None, EPS, None, branch + noise, None]


def check_near_one(module, device, apart, slack):
    case = step_to(device, apart)
    residual, _, statistics = module.residual_norm_statistics(*case)
    wanted = 1 - reference.residual_statistics(residual, residual, case[7])["step_cosine"]
    # 2⁻²⁴: the cosine itself is float32
    torch.testing.assert_close(
        1 - statistics[4].double(), wanted, rtol=COSINE_DISTANCE_LIMIT * slack, atol=6e-8
    )


@pytest.mark.parametrize("apart", [1e-3, 1e-2, 0.3, 3.0])
def test_cosine_near_one(apart, device, slack):
    check_near_one(kernel, device, apart, slack)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rows_of_zeros(dtype, device, slack, guarded):
    case = make_case(5, 144, dtype, device, weights=("branch", "next"))
    for tensor in (case[0], case[1], case[7]):
        tensor[2] = 0
    case[8][3] = 0
    residual, y, statistics = check(kernel, case, slack)
    assert (residual[2] == 0).all() and (y[2] == 0).all()
    assert statistics[[4, 6], [2, 3]].isnan().all() and statistics[:, [0, 1, 4]].isfinite().all()


@pytest.mark.parametrize(("dtype", "scale"), [(BF16, 1e4), (F16, 1e4), (F32, 1e4), (F32, 1e-4)])
def test_rows_of_extreme_norm(dtype, scale, device, slack, guarded):
    check(kernel, make_case(5, 640, dtype, device, scale=scale), slack)


def test_what_is_not_finite_stays_in_its_row(device, guarded):
    case = make_case(6, 100, F16, device, weights=("next",), references=("previous",))
    case[0][1, 7] = case[1][1, 7] = 6e4  # the sum overflows, as in PyTorch
    case[1][3, 99] = float("nan")
    residual, y, statistics = kernel.residual_norm_statistics(*case)
    by_cpu = cpu.residual_norm(case[0], case[1], eps=EPS, next_weight_D=case[4])
    torch.testing.assert_close(residual, by_cpu.residual_ND, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.isnan(), by_cpu.y_ND.isnan()) and y[1, 7].isnan() and (y[1, :7] == 0).all()
    assert statistics[0, 1] == statistics[1, 1] == math.inf
    assert statistics[[0, 1, 3, 4], 3].isnan().all()
    assert statistics[:, [0, 2, 4, 5]][[0, 1, 3, 4]].isfinite().all()


def test_runs_are_equal(device):
    case = make_case(33, 1100, BF16, device)
    first, again = (kernel.residual_norm_statistics(*case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_rows(device):
    residual, y, statistics = kernel.residual_norm_statistics(*make_case(0, 64, F32, device))
    assert residual.shape == y.shape == (0, 64) and statistics.shape == (7, 0)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, lambda x: x[:-1], r"branch is \(4, 64\) .* not rows of 64 as x, 5 of them"),
        (7, lambda x: x.clone().T.contiguous().T, r"previous is \(5, 64\) with strides \(1, 5\)"),
        (4, lambda w: w[:-1], r"next_weight is \(63,\), not contiguous \(64,\)"),
    ],
)
def test_what_would_miss_its_memory_is_refused(place, wrong, message, device):
    case = make_case(5, 64, F32, device)
    case[place] = wrong(case[place])
    with pytest.raises(ValueError, match=message):
        kernel.residual_norm_statistics(*case)


def test_a_width_beyond_the_table_is_refused(device):
    with pytest.raises(ValueError, match=r"runs at widths \[.*8192\] in float32, not at 16384"):
        kernel.residual_norm(*make_case(1, 8193, F32, device)[:6])


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    D=st.integers(1, 700),
    seed=st.integers(0, 99),
    factor=st.floats(0.01, 100).flatmap(lambda c: st.sampled_from([c, -c])),
)
def test_properties(device, D, seed, factor):
    """Scaling a state scales its norm and leaves what is normed; a state is at distance 0 of itself; and
    lengths differ by no more than the distance.
    """
    x, zeros = make_rows(3, D, F32, device, seed), torch.zeros(3, D, device=device)
    other = make_rows(3, D, F32, device, seed + 100)
    weight = torch.ones(D, device=device)
    _, y, plain = kernel.residual_norm_statistics(x, zeros, None, None, weight, 0.0, None, x, other)
    _, scaled_y, scaled = kernel.residual_norm_statistics(
        x * factor, zeros, None, None, weight, 0.0, None, None, None
    )
    torch.testing.assert_close(scaled[:2], plain[:2] * abs(factor), rtol=2e-6, atol=0)
    torch.testing.assert_close(scaled_y, y * math.copysign(1, factor), rtol=2e-6, atol=0)
    assert (plain[3] == 0).all() and (plain[4] == 1).all()
    a, b, apart = plain[0], other.norm(dim=1), plain[5]
    assert ((a - b).abs() <= apart * (1 + 1e-6)).all() and (apart <= (a + b) * (1 + 1e-6)).all()


def check_everything(module, device, slack, monkeypatch):
    guarded = Guarded()
    monkeypatch.setattr(module, "_empty", guarded)
    for dtype, (N, D) in product((F32, F16), ((5, 208), (3, 1025))):
        case = make_case(N, D, dtype, device)
        case[0][1], case[1][1] = 0, 0
        case[8] *= 1000
        check(module, case, slack)
    guarded.check()
    for apart in (1e-3, 0.3):
        check_near_one(module, device, apart, slack)


MUTATIONS = {
    "rows behind the last": ("mask = rows < N\n", "mask = rows < N + 1\n"),
    "columns behind the last": ("mask & (columns < D)", "mask & (columns < D + 1)"),
    "weights behind the last": ("mask = columns < D if MASKED else None", "mask = columns < D + 1"),
    "statistics behind the last": ("there = row < N", "there = row < N + 1"),
    "rounding before the weight": (".to(DTYPE).to(tl.float32) * weight", " * weight"),
    "rounding of the normed branch": ("branch = branch.to(BRANCH_DTYPE).to(tl.float32)", "pass"),
    "rounding of the sum": (".to(SUM_DTYPE).to(tl.float32)", ""),
    "statistics of the rounded residual": ("residual = rounded.to(tl.float32)", "residual = total"),
    "epsilon": ("tl.rsqrt(squares / D + eps)", "tl.rsqrt(squares / D)"),
    "width": ("tl.rsqrt(squares / D +", "tl.rsqrt(squares / (D + 1) +"),
    "length gap": (
        "below, above = (difference - length_gap) / (2 * norm), (difference + length_gap) / reference_norm",
        "below, above = difference / (2 * norm), difference / reference_norm",
    ),
    "sign of the peak": ("tl.max(tl.abs(residual), 1)", "tl.max(residual, 1)"),
    "cosine near one": ("difference < 0.5 * norm", "difference < 0 * norm"),
    "cosine of unequal lengths": ("difference < 0.5 * norm", "difference >= 0 * norm"),
}


def test_the_kernel_as_it_is_passes(device, slack, monkeypatch):
    check_everything(kernel, device, slack, monkeypatch)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(name, mutated, device, slack, monkeypatch):
    module = mutated(kernel, *MUTATIONS[name])
    with pytest.raises(AssertionError):
        check_everything(module, device, slack, monkeypatch)
