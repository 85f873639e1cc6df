"""Comparisons of block invocations on a CPU against their float64 references."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looptap.kernels import attention_pairs, reference, residual_pairs
from looptap.kernels.attention import make_cu_seqlens
from looptap.kernels.attention_blocks import QUERIES_PER_BLOCK
from looptap.kernels.attention_pairs import attention_chain, attention_gram, distance_from_gram
from looptap.kernels.residual_pairs import residual_entropy, residual_similarity

B = QUERIES_PER_BLOCK
DISTANCE, GRAM, RECEIVED = 1e-3, 1e-5, 5e-6


class Patterns:
    """n invocations, each some way on from the one before; q and k are slices of one matrix each."""

    def __init__(self, n, lengths, H=2, K=1, C=16, dtype=torch.float32, moved=0.1, size=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randn(n, sum(lengths), (H + 2 * K) * C, generator=generator) * size
        steps[1:] *= moved
        qkv = steps.cumsum(0).to(dtype)
        self.q, self.k = (
            qkv[..., : H * C].unflatten(-1, (H, C)),
            qkv[..., H * C : -K * C].unflatten(-1, (K, C)),
        )
        self.lengths, self.scale = list(lengths), C**-0.5
        self.where = make_cu_seqlens(lengths), max(lengths)
        self.a = [reference.attention_matrix(q, k, lengths) for q, k in zip(self.q, self.k, strict=True)]
        lse = [reference.attention_lse(q, k, lengths) for q, k in zip(self.q, self.k, strict=True)]
        self.lse = torch.stack(lse).float()

    def chain(self, pairs):
        return attention_chain(
            self.q.unbind(), self.k.unbind(), self.lse.unbind(), *self.where, self.scale, pairs
        )

    def gram(self):
        return attention_gram(self.q, self.k, self.lse, *self.where, self.scale)


# one token; both sides of a block's edge; several sequences, equal ones in a run and apart, empty ones
LENGTHS = [
    (1,),
    (B - 1,),
    (B,),
    (B + 1,),
    (2 * B + 3, 2 * B + 3),
    (0, 5, 5, 0, 5, 1, 0, 0, 5),
    (130, 64, 64, 0),
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (8, 1)])
def test_chain_matches_reference(lengths, H, K):
    patterns = Patterns(3, lengths, H, K)
    pairs = [(0, 1), (2, 1), (0, 2)]
    received, distance = patterns.chain(pairs)
    wanted = torch.stack([torch.cat([x.sum(-2).T for x in a]) for a in patterns.a])
    torch.testing.assert_close(received.double(), wanted, rtol=RECEIVED, atol=1e-6)
    for (i, j), got in zip(pairs, distance, strict=True):
        wanted = reference.attention_distance(patterns.a[i], patterns.a[j])
        torch.testing.assert_close(got.double(), wanted, rtol=DISTANCE, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chain_in_half_precision_is_exact_in_what_is_stored(dtype):
    patterns = Patterns(2, (100,), 4, 2, dtype=dtype)
    distance = patterns.chain([(0, 1)])[1][0].double()
    wanted = reference.attention_distance(*patterns.a)
    torch.testing.assert_close(distance, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("relative", [0.3, 1e-2, 1e-3])
def test_close_patterns_keep_their_distance(relative):
    patterns = Patterns(2, (150, 90), moved=relative)
    norm = torch.stack([a.square().sum((1, 2)).sqrt() for a in patterns.a[0]])
    distance = patterns.chain([(0, 1)])[1][0].double()
    assert 0.2 < (distance / norm).max() / relative < 5  # the case is the one meant
    torch.testing.assert_close(distance, reference.attention_distance(*patterns.a), rtol=DISTANCE, atol=0)


def test_equal_patterns_have_distance_zero():
    patterns = Patterns(2, (100, 7), moved=0.0)
    received, distance = patterns.chain([(0, 1), (1, 1)])
    assert (distance == 0).all() and torch.equal(received[0], received[1]) and (received > 0).all()


def test_chain_of_places_that_do_not_exist():
    with pytest.raises(AssertionError, match="not places in 2"):
        Patterns(2, (5,)).chain([(0, 2)])


def check_gram(gram, patterns):
    wanted = reference.attention_gram(patterns.a)
    norm = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.mT)
    assert ((gram - wanted).abs() <= GRAM * norm.unsqueeze(-1) * norm.unsqueeze(-2)).all()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("n", "H", "K"), [(1, 4, 4), (5, 6, 2), (3, 8, 1)])
def test_gram_matches_reference(lengths, n, H, K):
    patterns = Patterns(n, lengths, H, K, moved=0.7)
    check_gram(patterns.gram(), patterns)


# a strip of a sequence of 5 with 6 heads in 3 groups takes 3 · 5 · 5 · 4 · 6 = 1800 bytes: one key head at a
# time, two, one sequence, three sequences
@pytest.mark.parametrize("strip_bytes", [1, 1300, 1800, 5500])
def test_gram_in_pieces(strip_bytes, monkeypatch):
    monkeypatch.setattr(attention_pairs, "STRIP_BYTES", strip_bytes)
    patterns = Patterns(3, (5, 5, 5, 5, 70, 5), 6, 3, moved=0.7)
    check_gram(patterns.gram(), patterns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_in_half_precision(dtype):
    patterns = Patterns(4, (100, 9), 4, 2, dtype=dtype, moved=0.5)
    check_gram(patterns.gram(), patterns)


def test_distances_from_a_gram_matrix():
    patterns = Patterns(4, (90, 12), 4, 2, moved=0.5)
    distance = distance_from_gram(patterns.gram())
    wanted = [[reference.attention_distance(a, b).mean(1) for b in patterns.a] for a in patterns.a]
    wanted = torch.stack([torch.stack(row) for row in wanted]).permute(2, 0, 1)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), wanted, rtol=1e-4, atol=1e-4)
    assert (distance.diagonal(dim1=1, dim2=2) == 0).all() and torch.equal(distance, distance.mT)
    chain = patterns.chain([(0, 3)])[1][0].mean(1)
    torch.testing.assert_close(distance[:, 0, 3], chain, rtol=1e-4, atol=0)


def test_distances_of_what_is_not_finite():
    gram = torch.eye(2, dtype=torch.float64).expand(2, 3, 2, 2).clone()
    gram[1] = float("nan")
    distance = distance_from_gram(gram)
    assert distance[0].isfinite().all() and distance[1].isnan().all()


def test_nothing_of_a_neighbour_shows():
    patterns = Patterns(2, (20, 70, 20), moved=0.5)
    received, distance = patterns.chain([(0, 1)])
    gram = patterns.gram()
    for part in (patterns.q, patterns.k, patterns.lse):
        part[:, :20] = part[:, 90:] = float("nan")
    dirty_received, dirty_distance = patterns.chain([(0, 1)])
    dirty_gram = patterns.gram()
    assert torch.equal(dirty_received[:, 20:90], received[:, 20:90]) and torch.equal(dirty_gram[1], gram[1])
    assert torch.equal(dirty_distance[:, 1], distance[:, 1])
    assert dirty_distance[:, [0, 2]].isnan().all() and dirty_gram[[0, 2]].isnan().all()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // 4 for x in tree_leaves(result) if isinstance(x, torch.Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("name", ["chain", "gram"])
def test_memory_is_linear_in_the_length(name, monkeypatch):
    monkeypatch.setattr(attention_pairs, "STRIP_BYTES", 1)
    largest = []
    for T in (600, 1200):
        patterns = Patterns(2, (T,), 1, 1, 8)
        implementation = getattr(attention_pairs, f"_attention_{name}_cpu")
        with _Largest() as mode:
            if name == "chain":
                parts = (list(x.unbind()) for x in (patterns.q, patterns.k, patterns.lse))
                implementation(*parts, *patterns.where, patterns.scale, [0, 1])
            else:
                implementation(patterns.q, patterns.k, patterns.lse, *patterns.where, patterns.scale)
        largest.append(mode.elements)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 1200 * 1200 / 4


def test_operations_are_registered_as_they_behave():
    patterns = Patterns(2, (9, 0, 4))
    lists = [list(x.unbind()) for x in (patterns.q, patterns.k, patterns.lse)]
    chain, gram = torch.ops.looptap.attention_chain.default, torch.ops.looptap.attention_gram.default
    torch.library.opcheck(chain, (*lists, *patterns.where, patterns.scale, [0, 1, 1, 0]))
    stacked = patterns.q, patterns.k, patterns.lse
    torch.library.opcheck(gram, (*stacked, *patterns.where, patterns.scale))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    n=st.integers(1, 5),
    size=st.floats(0.1, 5.0),
    moved=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_properties(lengths, n, size, moved, seed):
    patterns = Patterns(n, lengths, size=size, moved=moved, seed=seed)
    received, distance = patterns.chain([(0, n - 1), (n - 1, 0)])
    assert torch.equal(distance[0], distance[1])
    limit = 1e-5 * max(1.0, float(patterns.lse.abs().max()) / 30) if sum(lengths) else 0  # lse is rounded
    for part, T in zip(received.double().split(lengths, 1), lengths, strict=True):
        torch.testing.assert_close(part.sum(1), torch.full((n, 2), T).double(), rtol=limit, atol=0)
    gram = patterns.gram()
    square = gram.diagonal(dim1=-2, dim2=-1)
    largest = gram.amax((-2, -1)).clamp_min(1e-30)
    assert (torch.linalg.eigvalsh(gram)[..., 0] >= -1e-6 * n * largest).all()
    assert (gram.square() <= square.unsqueeze(-1) * square.unsqueeze(-2) * (1 + 1e-6)).all()
    far = (square[..., 0] + square[..., -1] - 2 * gram[..., 0, -1]).clamp_min(0).sqrt()
    norm = largest.sqrt()  # √1e-6 of it is what inner products in float32 cannot tell from 0
    assert ((far - distance[0]).abs() <= 1e-3 * norm).all()


@pytest.mark.parametrize("lengths", [(1,), (7, 1, 30), (100,)])
@pytest.mark.parametrize("D", [1, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_matches_reference(lengths, D, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(D)
    x = torch.randn(5, sum(lengths), D + 3, generator=generator).cumsum(0).to(dtype)[..., 3:]
    wanted = reference.residual_similarity(x, lengths)
    for piece_bytes in (residual_pairs.PIECE_BYTES, 4 * 5 * D * 7):  # at once; seven tokens at a time
        monkeypatch.setattr(residual_pairs, "PIECE_BYTES", piece_bytes)
        got = residual_similarity(x, lengths)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-7)
        torch.testing.assert_close(
            got.diagonal(dim1=1, dim2=2), torch.ones(len(lengths), 5), rtol=0, atol=5e-7
        )


@pytest.mark.parametrize("factor", [1e19, 1e-25])
def test_similarity_of_residuals_whose_squares_leave_float32(factor):
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(residual_similarity(x * factor, [7]), residual_similarity(x, [7]))


def test_similarity_of_opposite_zero_and_no_residuals():
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, -x * 3, x])
    x[2, 4] = 0
    got = residual_similarity(x, [4, 0, 2])
    expected = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    torch.testing.assert_close(got[0], expected, rtol=0, atol=2e-7)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[2, :2, :2], expected[:2, :2], rtol=0, atol=2e-7)
    assert got[2, 2].isnan().all() and got[2, :, 2].isnan().all()


# more tokens than channels, as many, fewer; widths that are not round
@pytest.mark.parametrize(
    ("lengths", "D"), [((1, 2, 3), 5), ((40, 7), 16), ((16,), 16), ((300, 100), 33), ((20,), 200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_matches_reference(lengths, D, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(D)
    x = (torch.randn(sum(lengths), D, generator=generator) * torch.rand(D, generator=generator)).to(dtype)
    wanted = reference.residual_entropy(x, lengths)
    for piece_bytes in (residual_pairs.PIECE_BYTES, 500):
        monkeypatch.setattr(residual_pairs, "PIECE_BYTES", piece_bytes)
        got = residual_entropy(x, lengths)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", [12, 40])
def test_entropies_that_are_known(D):
    T = 12
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))[0]
    one_direction = torch.arange(1.0, T + 1)[:, None] * basis[:1]
    two = torch.cat([basis[:1].expand(6, D), basis[1:2].expand(6, D)])
    got = residual_entropy(torch.cat([3 * basis[:T], one_direction, two]), [T, T, T])
    wanted = torch.tensor([T, 1.0, 2.0]).log()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_entropy_of_what_has_none():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[2:4] = 0
    x[4, 1], x[6, 2] = float("nan"), float("inf")
    got = residual_entropy(x, [2, 2, 2, 0, 2, 1])
    assert got.isnan().tolist() == [False, True, True, True, True, False]
    assert residual_entropy(x[:0], []).shape == (0,)
    assert residual_similarity(x[None, :0], []).shape == (0, 1, 1)
