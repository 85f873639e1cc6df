"""Flash attention with its statistics against float64."""

from types import ModuleType

import pytest
import torch

from looptap.kernels.gpu import attention as kernel
from looptap.kernels.gpu import tiles
from looptap.kernels.gpu.tuned import read_table
from looptap.tests.kernels.packed import Packed, cut, guarded, make_packed, poisoned
from looptap.tests.kernels.properties import given, settings
from looptap.tests.kernels.properties import strategies as st

# numpy's, of rows behind a sequence's end
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOG_LIMIT = 5e-7  # of lse and entropy, for each unit of the largest score and at least 20
SHARE_LIMIT = 2e-5  # of peak and sink
OUTPUT_LIMIT = 5e-7  # for each unit of the largest score and at least 4, beside twice PyTorch's own error
NAMES = ("lse", "entropy", "peak", "sink")
# both sides of the edges of tiles of 32 queries and 16 keys, more than two of each, one token, none
EDGES = (1, 31, 32, 0, 33, 15, 16, 17, 70)
ROWS = [
    e
    for e in read_table()
    if e.kernel in ("attention", "attention_with_statistics") and (e.target, e.triton) == ("any", "any")
]


def check(module: ModuleType, packed: Packed, sink_tokens: int = 1, slack: float = 1) -> None:
    """Everything but the column sums, with and without statistics."""
    arguments = (
        packed.q_NHC,
        packed.k_NKC,
        packed.v_NKC,
        packed.cu_seqlens_S,
        packed.max_length,
        packed.scale,
    )
    with guarded():
        o_NHC, *statistics, received = module.attention_with_statistics(*arguments, sink_tokens, False)
        plain_NHC = module.attention(*arguments)
    assert received.shape == (0,) and o_NHC.dtype == packed.q_NHC.dtype
    answers, largest = packed.answers(sink_tokens), packed.largest_score()
    limits = {
        "lse": LOG_LIMIT * max(20, largest),
        "entropy": LOG_LIMIT * max(20, largest),
        "peak": SHARE_LIMIT,
        "sink": SHARE_LIMIT,
    }
    for name, found in zip(NAMES, statistics, strict=True):
        error = largest_error(found, answers[name])
        assert error <= slack * limits[name], f"{name}: {error:.2e} over {limits[name]:.2e}"
    limit = 2 * largest_error(packed.plain(), answers["o"]) + slack * OUTPUT_LIMIT * max(4, largest)
    for o in (o_NHC, plain_NHC):
        error = largest_error(o, answers["o"])
        assert error <= limit, f"o: {error:.2e} over {limit:.2e}"


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.double() - expected).abs().max()
    assert not error.isnan(), "NaN"
    return error.item()


def run(packed: Packed, sink_tokens: int = 1) -> list[torch.Tensor]:
    """o, lse, entropy, peak, sink, received."""
    return list(
        kernel.attention_with_statistics(
            packed.q_NHC, packed.k_NKC, packed.v_NKC, packed.cu_seqlens_S, packed.max_length, packed.scale,
            sink_tokens, True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_edges_of_tiles(dtype, descriptors, device, slack):
    with cut(32, 16, descriptors=descriptors):
        check(kernel, make_packed(EDGES, (2, 1), 64, dtype, device), slack=slack)


# fewer queries than keys in a tile, as many
@pytest.mark.parametrize("rows, keys", [(16, 64), (32, 32)])
def test_shapes_of_tiles(rows, keys, device, slack):
    with cut(rows, keys):
        check(kernel, make_packed((64, 1, 65, 63, 40), (2, 2), 32, F32, device), slack=slack)


# narrower than every tile; masked columns; above 64, float32 takes its products in parts
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("width", [16, 40, 80, 128, 192, 256])
def test_head_widths(width, descriptors, device, slack):
    with cut(32, 32, descriptors=descriptors):
        check(kernel, make_packed((33, 64), (2, 1), width, F32, device), slack=slack)
        check(kernel, make_packed((33, 20), (2, 1), width, BF16, device), slack=slack)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (4, 1), (8, 1)])
def test_grouped_heads(heads, device, slack):
    with cut(64, 64):
        check(kernel, make_packed((65, 30), heads, 32, F16, device), slack=slack)


@pytest.mark.parametrize("entry", ROWS, ids=lambda e: f"{e.kernel}-{e.width}-{e.dtype}")
def test_rows_of_the_table(entry, device, slack):
    rows = entry.settings.rows
    dtype = F32 if entry.dtype == "float32" else BF16
    assert not entry.settings.descriptors  # also what misaligned tensors take
    with cut(rows, entry.settings.keys):
        check(
            kernel,
            make_packed((rows + 1, rows, 1, rows - 1), (1, 1), entry.width, dtype, device),
            slack=slack,
        )


@pytest.mark.parametrize("sink_tokens", [0, 1, 4, 16, 17, 40, 1000])
def test_sinks(sink_tokens, device, slack):
    with cut(64, 32):
        check(kernel, make_packed((65, 3, 30), (2, 1), 32, F32, device), sink_tokens, slack)


# scores from which differences of exponentials keep no digits; at 500 rows are nearly one-hot
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("largest", [30.0, 300.0, 500.0])
def test_large_scores(largest, dtype, device, slack):
    with cut(32, 32):
        check(kernel, make_packed((100, 33), (2, 1), 64, dtype, device, largest=largest), 4, slack)


def test_one_key_far_ahead(device, slack):
    """Entropies far below 1 keep their own digits: ln l − E[t] would leave none."""
    packed = make_packed((70,), (1, 1), 32, F32, device)
    packed.q_NHC.fill_(1.0)
    packed.k_NKC.fill_(0.0)
    packed.k_NKC[5] = 20 * 32**0.5 / 32
    with cut(32, 16):
        entropy_NH = run(packed)[2]
    expected_NH = packed.answers(1)["entropy"]
    assert 1e-8 < expected_NH[6].item() < 1e-5
    assert largest_error(entropy_NH[6:], expected_NH[6:]) < slack * 1e-6


def test_equal_keys(device):
    """Every row is uniform: entropy ln n, peak 1/n, and o the mean of the values so far."""
    packed = make_packed((70, 1, 33), (2, 1), 32, F32, device)
    packed.k_NKC.copy_(packed.k_NKC[:1].expand(packed.k_NKC.shape))
    with cut(32, 16):
        o_NHC, _, entropy_NH, peak_NH, sink_NH, _ = run(packed)
    n = torch.cat([torch.arange(1, length + 1, device=device) for length in packed.lengths])[:, None].double()
    assert largest_error(entropy_NH, n.log()) < 1e-5
    assert largest_error(peak_NH, 1 / n) < SHARE_LIMIT and largest_error(sink_NH, 1 / n) < SHARE_LIMIT
    means = torch.cat([v.double().cumsum(0) for v in packed.v_NKC.split(packed.lengths)]) / n[..., None]
    assert largest_error(o_NHC, means.expand(o_NHC.shape)) < 1e-5


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sequences_do_not_leak(value, descriptors, device):
    packed = make_packed((40, 33, 20, 50, 7), (2, 1), 32, F16, device)
    own = torch.arange(40, 73), torch.arange(93, 143)
    with cut(32, 16, descriptors=descriptors):
        clean, spoilt = run(packed), run(poisoned(packed, (0, 2, 4), value))
    for rows in own:
        for a, b in zip(clean, spoilt, strict=True):
            assert torch.equal(a[rows], b[rows])
    assert not torch.equal(clean[0], spoilt[0])


def test_nan_shows(device):
    """Every row that sees such a key says so in everything, and none before it that lies in another tile."""
    packed = make_packed((70,), (2, 1), 32, F16, device)
    packed.k_NKC[40, 0, 3] = float("nan")
    with cut(32, 16):
        o, *statistics, _ = run(packed)
    for found in (o.isnan().any(-1), *(x.isnan() for x in statistics)):
        assert found[40:].all() and not found[:32].any()


def test_packed_is_separate(device):
    packed = make_packed((40, 33, 20), (2, 1), 32, F32, device)
    with cut(32, 16):
        together = run(packed)
        first = 0
        for length in packed.lengths:
            rows = slice(first, first + length)
            alone = Packed(
                packed.q_NHC[rows], packed.k_NKC[rows], packed.v_NKC[rows], (length,), packed.scale
            )
            assert all(torch.equal(a[rows], b) for a, b in zip(together, run(alone), strict=True))
            first += length


def test_repeats_and_longer_limits_change_nothing(device):
    packed = make_packed((40, 0, 33), (2, 1), 32, BF16, device)
    arguments = (packed.q_NHC, packed.k_NKC, packed.v_NKC, packed.cu_seqlens_S)
    with cut(32, 16):
        first = run(packed)
        for max_length in (40, 100):
            again = kernel.attention_with_statistics(*arguments, max_length, packed.scale, 1, True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# a base, or strides, off 16-byte boundaries: nothing may be assumed, and no descriptor can describe it
@pytest.mark.parametrize("layout", [{"offset": 1}, {"gap": 3}, {"offset": 4}])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_misaligned_tensors(layout, dtype, device, slack):
    packed = make_packed((40, 33), (2, 1), 40, dtype, device, **layout)
    with cut(32, 32, descriptors=True):
        aligned = dtype == F32 and layout == {"offset": 4}
        assert tiles.choose_settings("attention", packed.q_NHC, packed.k_NKC).descriptors == aligned
        check(kernel, packed, slack=slack)


def test_rows_beyond_int32(device, tmp_path):
    """Token 2 lies more than 2³¹ elements behind token 0."""
    stride, length, width = 2**30 + 8, 3, 16
    size = (length - 1) * stride + 3 * width
    if device.type == "cpu":  # of a sparse file only what is touched exists
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=F16)
    else:
        memory = torch.empty(size, dtype=F16, device=device)
    small = make_packed((length,), (1, 1), width, F16, device)
    views = [memory.as_strided((length, 1, width), (stride, width, 1), i * width) for i in range(3)]
    for view, x in zip(views, (small.q_NHC, small.k_NKC, small.v_NKC), strict=True):
        view.copy_(x)
    with cut(16, 16):
        far = Packed(*views, small.lengths, small.scale)
        assert all(torch.equal(a, b) for a, b in zip(run(small), run(far), strict=True))


def test_nothing_to_do(device):
    nothing = make_packed((0, 0), (2, 1), 32, BF16, device)
    with cut(32, 32):
        o_NHC, *statistics = run(nothing)
    assert o_NHC.shape == (0, 2, 32) and [tuple(x.shape) for x in statistics] == [(0, 2)] * 5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {name: getattr(p, name)[..., :20] for name in ("q_NHC", "k_NKC", "v_NKC")}, "width 20"),
        (lambda p: {"k_NKC": p.k_NKC[:, :1].expand(-1, 3, -1)}, "query heads a multiple"),
        (lambda p: {"v_NKC": p.v_NKC[:-1]}, "keys or values"),
        (lambda p: {"v_NKC": p.v_NKC.half()}, "one dtype"),
        (lambda p: {"k_NKC": p.k_NKC.transpose(0, 2).contiguous().transpose(0, 2)}, "contiguous"),
        (lambda p: {"scale": 0.0}, "above 0"),
    ],
)
def test_refusals(change, message, device):
    packed = make_packed((40,), (4, 2), 32, F32, device)
    with pytest.raises(ValueError, match=message):
        run(Packed(**{**packed.__dict__, **change(packed)}))


@pytest.mark.parametrize(
    "old, new",
    [
        ("weighted = a * (weighted + delta * total)", "weighted = weighted + delta * total"),
        ("a * (weighted + delta * total)", "a * weighted"),
        ("total = a * total", "total = total"),
        ("acc * a[:, None]", "acc"),
        ("key[None, :] <= query[:, None], s, MASKED", "key[None, :] < length, s, MASKED"),
        ("valid = query < length", "valid = query <= length"),
        ("tl.minimum(begin + ROWS, length)", "begin + KEYS"),
        ("v_tiles + first * v_step, DIAGONAL", "v_tiles + first * v_step, False"),
        ("(key[None, :] <= query[:, None]) & (key < sink_tokens)[None, :]", "(key < sink_tokens)[None, :]"),
        ("(key[None, :] <= query[:, None]) & (key < sink_tokens)[None, :]", "key[None, :] <= query[:, None]"),
        ("head // heads_per_key", "head % heads_per_key"),
    ],
)
def test_mutations_are_noticed(old, new, mutated, device):
    # 50 leaves tiles of queries and of keys unfinished, with NaN behind
    packed = make_packed((33, 50), (4, 2), 32, F32, device)
    with cut(32, 16):
        check(kernel, packed, sink_tokens=3)
        with pytest.raises(AssertionError):
            check(mutated(kernel, old, new), packed, sink_tokens=3)


def test_mutated_start_of_the_diagonal_is_noticed(mutated, device):
    packed = make_packed((50,), (1, 1), 32, F32, device)
    with cut(16, 32):
        check(kernel, packed)
        with pytest.raises(AssertionError):
            check(mutated(kernel, "begin // KEYS * KEYS", "tl.cdiv(begin, KEYS) * KEYS"), packed)


def test_mutated_mask_of_described_values_is_noticed(mutated, device):
    old = "v = tl.where((key < length)[:, None], v, 0.0)"
    packed = make_packed((33, 50), (2, 1), 32, F32, device)
    spoilt = poisoned(packed, (1,), float("nan"))
    with cut(32, 16, descriptors=True):
        arguments = (spoilt.q_NHC, spoilt.k_NKC, spoilt.v_NKC, spoilt.cu_seqlens_S, 50, spoilt.scale)
        assert not kernel.attention(*arguments)[:33].isnan().any()
        assert mutated(kernel, old, "v = v").attention(*arguments)[:33].isnan().any()


@st.composite
def packs(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    return tuple(lengths), heads, draw(st.integers(0, 2**16)), draw(st.sampled_from([None, 5.0, 100.0]))


@settings(derandomize=True, max_examples=12, deadline=None)
@given(pack=packs())
def test_properties(pack, device):
    lengths, heads, seed, largest = pack
    packed = make_packed(lengths, heads, 16, F32, device, seed=seed, largest=largest)
    with cut(16, 16):
        o_NHC, lse_NH, entropy_NH, peak_NH, sink_NH, received_NH = run(packed)
    with cut(32, 64):
        other = run(packed)
    n = torch.cat([torch.arange(1, length + 1, device=device) for length in lengths])[:, None]
    limit = LOG_LIMIT * max(20, packed.largest_score())
    assert (entropy_NH >= 0).all() and (entropy_NH <= n.log() + limit).all()
    assert (-peak_NH.log() <= entropy_NH + limit).all()
    assert (peak_NH <= 1).all() and (peak_NH >= 1 / n - SHARE_LIMIT).all() and (sink_NH >= 0).all()
    first = (n == 1).squeeze(1)
    assert (entropy_NH[first] == 0).all() and (peak_NH[first] == 1).all() and (sink_NH[first] == 1).all()
    for a, b in zip((o_NHC, lse_NH, entropy_NH, peak_NH, sink_NH), other, strict=False):
        assert largest_error(a, b.double()) <= 4 * limit
    per_sequence = zip(received_NH.split(lengths), sink_NH.split(lengths), lengths, strict=True)
    for received_TH, sink_TH, length in per_sequence:
        assert torch.allclose(received_TH.sum(0), torch.tensor(float(length), device=device), rtol=1e-5)
        if length:
            assert torch.allclose(received_TH[0], sink_TH.sum(0), rtol=1e-4)


def test_one_vector_added_to_all_keys(device):
    packed = make_packed((40, 33), (2, 1), 32, F32, device)
    with cut(32, 16):
        before = run(packed)
        packed.k_NKC.add_(torch.randn(32, generator=torch.Generator().manual_seed(1)).to(device))
        after = run(packed)
    for index in (0, 2, 3, 4, 5):  # not lse, which moves
        assert largest_error(after[index], before[index].double()) < 4e-5
    assert largest_error(after[1], before[1].double()) > 0.1
