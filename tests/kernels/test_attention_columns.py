"""Column sums of attention against float64."""

from types import ModuleType

import pytest
import torch

from looptap.kernels.gpu import attention_columns as kernel
from looptap.kernels.gpu.tuned import read_table
from looptap.tests.kernels.packed import Packed, cut, guarded, make_packed, poisoned

# numpy's, of rows behind a sequence's end
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
COLUMN_LIMIT = 5e-6  # relative, for scores to 30
TINY = 1e-30  # columns below it vanish among float32's smallest numbers
SUM_LIMIT = 1e-5  # relative, of all columns of a sequence
# both sides of the edges of tiles of 32 queries and 16 keys, more than two of each, one token, none
EDGES = (1, 31, 32, 0, 33, 15, 16, 17, 70)
ROWS = [e for e in read_table() if e.kernel == "attention_columns" and (e.target, e.triton) == ("any", "any")]


def check(module: ModuleType, packed: Packed, slack: float = 1) -> None:
    # from float64: an error of the rows' kernel is not this one's
    answers = packed.answers(1)
    arguments = (packed.q_NHC, packed.k_NKC, answers["lse"].float(), packed.cu_seqlens_S)
    with guarded():
        received_NH = module.attention_columns(*arguments, packed.max_length, packed.scale)
    expected_NH = answers["received"]
    error = ((received_NH.double() - expected_NH) / expected_NH.clamp_min(TINY)).abs().max().item()
    assert error <= slack * COLUMN_LIMIT, f"{error:.2e} over {COLUMN_LIMIT:.0e}"
    for received_TH, length in zip(received_NH.split(packed.lengths), packed.lengths, strict=True):
        assert torch.allclose(received_TH.sum(0), received_TH.new_tensor(float(length)), rtol=SUM_LIMIT)


def run(packed: Packed) -> torch.Tensor:
    lse_NH = torch.nan_to_num(packed.answers(1)["lse"]).float()
    return kernel.attention_columns(
        packed.q_NHC, packed.k_NKC, lse_NH, packed.cu_seqlens_S, packed.max_length, packed.scale
    )


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_edges_of_tiles(dtype, descriptors, device, slack):
    with cut(32, 16, descriptors=descriptors):
        check(kernel, make_packed(EDGES, (2, 1), 64, dtype, device), slack)


# more keys than queries in a tile, as many, many more queries
@pytest.mark.parametrize("rows, keys", [(16, 64), (32, 32), (128, 16)])
def test_shapes_of_tiles(rows, keys, device, slack):
    with cut(rows, keys):
        check(kernel, make_packed((64, 1, 65, 129, 40), (2, 2), 32, F32, device), slack)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("width", [16, 40, 80, 128, 192, 256])
def test_head_widths(width, descriptors, device, slack):
    with cut(32, 32, descriptors=descriptors):
        check(kernel, make_packed((33, 64), (2, 1), width, F32, device), slack)
        check(kernel, make_packed((33, 20), (2, 1), width, BF16, device), slack)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (4, 1), (8, 1)])
def test_grouped_heads(heads, device, slack):
    with cut(64, 64):
        check(kernel, make_packed((65, 30), heads, 32, F16, device), slack)


@pytest.mark.parametrize("entry", ROWS, ids=lambda e: f"{e.width}-{e.dtype}")
def test_rows_of_the_table(entry, device, slack):
    keys = entry.settings.keys
    dtype = F32 if entry.dtype == "float32" else BF16
    assert not entry.settings.descriptors  # also what misaligned tensors take
    with cut(entry.settings.rows, keys):
        check(kernel, make_packed((keys + 1, keys, 1, keys - 1), (1, 1), entry.width, dtype, device), slack)


# 300: the exponent of a column's terms carries the rounding of scores, as large as they are
@pytest.mark.parametrize("largest, factor", [(30.0, 1), (300.0, 10)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_large_scores(largest, factor, dtype, device, slack):
    """A column that next to nothing looks at is right too: errors are relative to it."""
    with cut(32, 32):
        check(kernel, make_packed((100, 33), (2, 1), 64, dtype, device, largest=largest), factor * slack)


def test_equal_keys(device):
    """Key j of n receives 1/(j+1) + ... + 1/n."""
    packed = make_packed((70, 1, 33), (2, 1), 32, F32, device)
    packed.k_NKC.copy_(packed.k_NKC[:1].expand(packed.k_NKC.shape))
    with cut(32, 16):
        received_NH = run(packed)
    for received_TH, length in zip(received_NH.split(packed.lengths), packed.lengths, strict=True):
        shares = 1 / torch.arange(1, length + 1, dtype=torch.float64, device=device)
        expected_T = shares.flip(0).cumsum(0).flip(0)
        assert torch.allclose(
            received_TH.double(), expected_T[:, None].expand(received_TH.shape), rtol=COLUMN_LIMIT
        )


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sequences_do_not_leak(value, descriptors, device):
    packed = make_packed((40, 33, 20, 50, 7), (2, 1), 32, F16, device)
    with cut(32, 16, descriptors=descriptors):
        clean, spoilt = run(packed), run(poisoned(packed, (0, 2, 4), value))
    for rows in (slice(40, 73), slice(93, 143)):
        assert torch.equal(clean[rows], spoilt[rows])
    assert not torch.equal(clean, spoilt)


def test_repeats_and_longer_limits_change_nothing(device):
    packed = make_packed((40, 0, 33), (2, 1), 32, BF16, device)
    lse_NH = packed.answers(1)["lse"].float()
    with cut(32, 16):
        first, again, longer = (
            kernel.attention_columns(packed.q_NHC, packed.k_NKC, lse_NH, packed.cu_seqlens_S, n, packed.scale)
            for n in (40, 40, 100)
        )
    assert torch.equal(first, again) and torch.equal(first, longer)


@pytest.mark.parametrize("layout", [{"offset": 1}, {"gap": 3}, {"offset": 4}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_misaligned_tensors(layout, dtype, device, slack):
    with cut(32, 32, descriptors=True):
        check(kernel, make_packed((40, 33), (2, 1), 40, dtype, device, **layout), slack)


@pytest.mark.parametrize(
    "old, new",
    [
        ("(key[:, None] <= query[None, :]) & (query < length)[None, :]", "key[:, None] <= query[None, :]"),
        ("(key[:, None] <= query[None, :]) & (query < length)[None, :]", "(query < length)[None, :]"),
        ("tl.cdiv(begin + KEYS, ROWS)", "(begin + KEYS) // ROWS"),
        ("+ (last_tile * ROWS < length).to(tl.int32)", ""),
        ("received, mask=key < length", "received, mask=key <= length"),
        ("head // heads_per_key", "head % heads_per_key"),
    ],
)
def test_mutations_are_noticed(old, new, mutated, device):
    packed = make_packed((33, 50, 150), (4, 2), 32, F32, device)
    with cut(32, 16):
        check(kernel, packed)
        with pytest.raises(AssertionError):
            check(mutated(kernel, old, new), packed)
