"""The Gram kernels, on a GPU or in the interpreter, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from looptap.kernels import reference
from looptap.kernels.attention_pairs import distance_from_gram
from looptap.kernels.gpu import attention_gram as module
from looptap.kernels.gpu.tuned import Settings
from looptap.tests.kernels.patterns import Guards, Patterns
from looptap.tests.kernels.properties import given, settings
from looptap.tests.kernels.properties import strategies as st

GRAM = 5e-4  # of √(G_aa G_bb)


@pytest.fixture
def cut(monkeypatch):
    """cut(edge, block): tiles and blocks of the result of this size, whatever the table says."""

    def set_to(edge, block=16, of=module):
        by_kernel = {
            "attention_gram": Settings(rows=edge, keys=edge),
            "attention_gram_product": Settings(rows=block, keys=256),
        }
        monkeypatch.setattr(of, "find_settings", lambda kernel, *_: by_kernel[kernel])
        monkeypatch.setattr(of, "PROGRAMS", 2)  # few programs: each takes milliseconds in the interpreter
        return of

    return set_to


def check(gram, patterns, slack=1):
    wanted = reference.attention_gram(patterns.matrices())
    norm = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (gram - wanted).abs() / (norm.unsqueeze(-1) * norm.unsqueeze(-2)).clamp_min(1e-300)
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.mT)
    assert (error <= GRAM * slack).all(), error.max()


# one token; both sides of a tile's edge and of two; several with an empty one
@pytest.mark.parametrize("lengths", [(1,), (15, 0, 17), (16, 31), (33,), (32, 1, 5)])
@pytest.mark.parametrize("n", [1, 5])
def test_matches_reference_at_every_edge(lengths, n, cut, device, slack):
    cut(16)
    patterns = Patterns(n, lengths, 2, 1, 16, device=device, moved=0.7)
    check(patterns.gram(module.attention_gram), patterns, slack)


@pytest.mark.parametrize("n", [15, 16, 17, 33])  # both sides of a block's edge; three blocks a side
def test_blocks_of_invocations(n, cut, device, slack):
    cut(32)
    patterns = Patterns(n, (20,), 1, 1, 16, dtype=torch.float16, device=device, moved=0.5)
    check(patterns.gram(module.attention_gram), patterns, slack)


@pytest.mark.parametrize("K", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_that_share_keys(K, dtype, cut, device, slack):
    cut(64)
    patterns = Patterns(2, (40,), 8, K, 16, dtype=dtype, device=device, moved=0.7)
    check(patterns.gram(module.attention_gram), patterns, slack)


@pytest.mark.parametrize("C", [24, 80, 96, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_widths(C, dtype, cut, device, slack):
    cut(32)
    patterns = Patterns(2, (35,), 1, 1, C, dtype=dtype, device=device, moved=0.7)
    check(patterns.gram(module.attention_gram), patterns, slack)


def test_settings_of_the_table(device, slack, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 2)
    for C in (64, 128, 256):
        patterns = Patterns(2, (70, 3), 1, 1, C, dtype=torch.float16, device=device)
        check(patterns.gram(module.attention_gram), patterns, slack)
    for n in (33, 129):  # a block of 64; two of 128
        patterns = Patterns(n, (5,), 1, 1, 16, device=device)
        check(patterns.gram(module.attention_gram), patterns, slack)


@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize(("tiles", "held"), [(1, 1), (4, 4), (13, 12)])  # of 6 maps with 6 each
def test_workspace_that_holds_only_a_part(tiles, held, programs, cut, device, slack, monkeypatch):
    cut(16)
    n = 3
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "TILES_BYTES", tiles * 2 * n * 16 * 16)
    guards = Guards(monkeypatch)
    patterns = Patterns(n, (40, 17, 33), 2, 1, 16, dtype=torch.float16, device=device, moved=0.5)
    check(patterns.gram(module.attention_gram), patterns, slack)
    guards.check()
    workspaces = [memory for memory, _ in guards.guarded if memory.dtype == torch.float16]
    assert len(workspaces) == 1 and guards.guarded[0][1] == held * n * 16 * 16


@pytest.mark.parametrize("n", [1, 96, 192, 1000])
@pytest.mark.parametrize("max_length", [1, 1000, 100_000])
@pytest.mark.parametrize("maps", [1, 16, 10_000])
def test_workspace_is_bounded(n, max_length, maps):
    edge, by_product = 128, Settings(rows=128, keys=64)
    num_tiles = -(-max_length // edge) * (-(-max_length // edge) + 1) // 2
    num_blocks = -(-n // 128) * (-(-n // 128) + 1) // 2
    held, tiles, splits = module._cut(n, maps, num_tiles, edge, num_blocks, by_product)
    tiles_bytes, products_bytes = held * tiles * n * edge**2 * 2, held * splits * num_blocks * 128**2 * 4
    assert tiles_bytes + products_bytes <= 64 * 2**20
    assert 1 <= held <= maps and 1 <= tiles <= num_tiles and edge**2 % (64 * splits) == 0


def test_writes_all_that_it_reads_and_nothing_else(cut, device, slack, monkeypatch):
    cut(32)
    guards = Guards(monkeypatch)
    patterns = Patterns(5, (33, 0, 64, 1), 2, 1, 16, dtype=torch.bfloat16, device=device)
    check(patterns.gram(module.attention_gram), patterns, slack)
    guards.check()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_neighbour_shows(poison, dtype, cut, device):
    cut(16)
    patterns = Patterns(2, (20, 37, 20), 2, 2, 24, dtype=dtype, device=device)
    gram = patterns.gram(module.attention_gram)
    for r in range(2):
        for part in (patterns.q, patterns.k, patterns.lse):
            part[r] = part[r].clone()
            part[r][:20] = part[r][57:] = poison
    dirty = patterns.gram(module.attention_gram)
    assert torch.equal(dirty[1], gram[1])
    assert not dirty[[0, 2]].isfinite().any()


def test_small_probabilities_keep_their_digits(cut, device, slack):
    """Probabilities of 1e-7, which float16 would round to one digit: e⁻¹² times each, by way of lse."""
    cut(32)
    patterns = Patterns(2, (50,), 1, 1, 16, device=device)
    patterns.lse = [lse + 12 for lse in patterns.lse]
    gram = patterns.gram(module.attention_gram)
    check(gram * torch.tensor(24.0, dtype=torch.float64).exp(), patterns, slack)


def test_scores_in_the_hundreds(cut, device, slack):
    cut(64)
    patterns = Patterns(3, (90,), 1, 1, 32, dtype=torch.float16, device=device, size=9.0, moved=0.5)
    assert torch.stack(patterns.lse).max() > 300
    check(patterns.gram(module.attention_gram), patterns, slack)


def test_equal_keys_give_the_sum_over_rows(cut, device, slack):
    """Uniform rows: Σ_i i (1/i)² is a harmonic number."""
    cut(16)
    patterns = Patterns(1, (40,), 1, 1, 16, device=device)
    patterns.k[0].copy_(patterns.k[0][:1].expand(40, 1, 16).clone())
    patterns.measure()
    gram = patterns.gram(module.attention_gram)
    harmonic = (1 / torch.arange(1, 41, dtype=torch.float64)).sum()
    assert abs(gram.item() / harmonic.item() - 1) <= GRAM * slack


@pytest.mark.parametrize("extra", [1, 8])
def test_strides_that_are_not_aligned(extra, cut, device, slack):
    cut(32)
    patterns = Patterns(2, (40,), 2, 1, 24, dtype=torch.float16, device=device, extra=extra)
    wide = torch.stack(patterns.qkv)
    q = wide[:, :, extra : extra + 48].unflatten(2, (2, 24))
    k = wide[:, :, extra + 48 : extra + 72].unflatten(2, (1, 24))
    lse = torch.stack(patterns.lse, 1).transpose(0, 1)  # [n, N, H] of a matrix [N, n, H]
    gram = module.attention_gram(q, k, lse, *patterns.where, patterns.scale)
    check(gram, patterns, slack)


def test_gives_the_same_bits_again(cut, device):
    cut(16)
    patterns = Patterns(3, (50, 21), 2, 1, 16, dtype=torch.float16, device=device)
    assert torch.equal(patterns.gram(module.attention_gram), patterns.gram(module.attention_gram))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
@pytest.mark.parametrize("max_length", [0, 5])
def test_no_tokens(lengths, max_length, cut, device):
    cut(16)
    patterns = Patterns(2, (5,), 2, 1, 16, device=device)
    none = [torch.stack(part)[:, :0] for part in (patterns.q, patterns.k, patterns.lse)]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    gram = module.attention_gram(*none, cu_seqlens, max_length, 1.0)
    assert torch.equal(gram, gram.new_zeros(len(lengths), 2, 2, 2))


_place = module._place


@triton.jit
def _places(index_ptr, row_ptr, column_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    row, column = _place(tl.load(index_ptr + at))
    tl.store(row_ptr + at, row)
    tl.store(column_ptr + at, column)


def test_places_in_the_triangle(device):
    rows = [0, 1, 2, 3, 63, 100, 2047, 2048, 4095, 4096, 30_000, 46_339]  # the root is rounded from 2895 on
    wanted = [(row, column) for row in rows for column in {0, row // 2, row}]
    wanted = torch.tensor(wanted[:32] + [(0, 0)] * (32 - len(wanted)), device=device)
    index = (wanted[:, 0] * (wanted[:, 0] + 1) // 2 + wanted[:, 1]).int()
    row, column = torch.empty_like(index), torch.empty_like(index)
    _places[(1,)](index, row, column, 32)
    assert torch.equal(torch.stack([row, column], 1).long(), wanted)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    n=st.integers(1, 6),
    size=st.floats(0.1, 4.0),
    moved=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_properties(lengths, n, size, moved, seed, device, slack):
    patterns = Patterns(n, lengths, 1, 1, 16, device=device, size=size, moved=moved, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for edge in (64, 16):
            by_kernel = {"attention_gram": edge, "attention_gram_product": 16}
            patch.setattr(module, "find_settings", lambda k, *_, s=by_kernel: Settings(rows=s[k], keys=256))
            patch.setattr(module, "PROGRAMS", 1)
            found.append(patterns.gram(module.attention_gram))
    # the size of tiles does not matter, but for a probability that lies between two of fp16's: the products
    # behind it round differently in tiles of another shape, and in one of few rows a step of fp16 is 4e-5
    torch.testing.assert_close(*found, rtol=GRAM * slack, atol=1e-7)
    gram = found[1]
    largest = gram.amax((-2, -1)).clamp_min(1e-30)
    assert torch.equal(gram, gram.mT) and (gram >= 0).all()
    assert (torch.linalg.eigvalsh(gram)[..., 0] >= -1e-6 * slack * n * largest).all()
    square = gram.diagonal(dim1=-2, dim2=-1)
    assert (gram.square() <= square.unsqueeze(-1) * square.unsqueeze(-2) * (1 + 1e-5 * slack)).all()
    distance = distance_from_gram(gram)
    assert (distance.diagonal(dim1=-2, dim2=-1) == 0).all()
    # every row of attention sums to 1, so its square is between one over its keys and 1
    tokens = torch.tensor(lengths, device=device, dtype=torch.float64)[:, None, None]
    assert (square <= tokens * (1 + GRAM * slack)).all()
    least = torch.stack([(1 / torch.arange(1, T + 1, dtype=torch.float64)).sum() for T in lengths])
    assert (square >= least.to(device)[:, None, None] * (1 - GRAM * slack)).all()


MUTATIONS = {
    "no causal mask": ("(row[:, None] >= key[None, :]) & ", ""),
    "no row mask": (" & (row < length)[:, None]", ""),
    "one tile less": ("(num_rows + 1) // 2 - first_tile", "(num_rows + 1) // 2 - 1 - first_tile"),
    "tiles behind the end": (
        "tl.minimum(num_rows * (num_rows + 1) // 2 - first_tile, num_tiles)",
        "num_tiles",
    ),
    "row by row with itself": ("mask=(b < n)[:, None]", "mask=(a < n)[:, None]"),
    "no factor taken out": (".mul_(4.0 ** -int(_SHIFT))", ".mul_(2.0 ** -int(_SHIFT))"),
    "one key head for all": ("h // heads_per_key * (", "0 * ("),
    "no factor on what is stored": ("_SHIFT = tl.constexpr(15)", "_SHIFT = tl.constexpr(0)"),
}


def check_small_case(launch, device, slack, monkeypatch):
    """What every mutation changes: two blocks, a tile of 16 rows behind the shorter sequence's end, small
    probabilities.
    """
    guards = Guards(monkeypatch)
    patterns = Patterns(17, (9, 20), 2, 2, 16, device=device, moved=1.0)
    patterns.lse = [lse + 12 for lse in patterns.lse]
    check(patterns.gram(launch) * torch.tensor(24.0, dtype=torch.float64).exp(), patterns, slack)
    guards.check()


def test_the_kernel_itself_passes(cut, device, slack, monkeypatch):
    check_small_case(cut(16).attention_gram, device, slack, monkeypatch)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_fails(name, mutated, cut, device, slack, monkeypatch):
    wrong = cut(16, of=mutated(module, *MUTATIONS[name]))
    with pytest.raises(AssertionError):
        check_small_case(wrong.attention_gram, device, slack, monkeypatch)
