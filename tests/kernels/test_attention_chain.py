"""The chain kernel, on a GPU or in the interpreter, against float64."""

import pytest
import torch

from looptap.kernels.gpu import attention_chain as module
from looptap.kernels.gpu.tuned import Settings
from looptap.tests.kernels.patterns import Guards, Patterns
from looptap.tests.kernels.properties import given, settings
from looptap.tests.kernels.properties import strategies as st

DISTANCE = 1e-3  # relative, down to a relative distance of 1e-3
RECEIVED = 5e-6  # relative, for scores up to 30
LSE = 5e-7  # of the largest score
PROBABILITY = 2e-6  # absolute, what a pattern of nothing but ones may be off: tokens alone have distance 0
NEIGHBOURS = [0, 1, 1, 2]


@pytest.fixture
def cut(monkeypatch):
    """cut(rows, keys): tiles of this size, whatever the table says."""

    def set_to(rows, keys, of=module):
        monkeypatch.setattr(of, "find_settings", lambda *_: Settings(rows=rows, keys=keys))
        return of

    return set_to


def check(patterns, pairs, slack=1, launch=module.attention_chain, received_limit=RECEIVED):
    received, distance = patterns.chain(launch, pairs)
    wanted_received, wanted = patterns.wanted_chain(pairs)
    torch.testing.assert_close(
        received.double(), wanted_received, rtol=received_limit * slack, atol=1e-6 * slack
    )
    rounding = PROBABILITY * torch.tensor(patterns.lengths, device=wanted.device).sqrt()[:, None]
    error = (distance.double() - wanted).abs()
    assert (error <= slack * (DISTANCE * wanted + rounding)).all(), (
        error / (DISTANCE * wanted + rounding)
    ).max()
    return distance


# one token; both sides of a tile's edge and of two; several with an empty one; tiles higher, wider and square
@pytest.mark.parametrize("lengths", [(1,), (15, 16, 0, 17), (33,), (64, 1, 31), (32, 32)])
@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16), (16, 16), (64, 64)])
def test_matches_reference_at_every_edge(lengths, rows, keys, cut, device, slack):
    cut(rows, keys)
    check(Patterns(3, lengths, 2, 1, 16, device=device), NEIGHBOURS, slack)


@pytest.mark.parametrize("K", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_that_share_keys(K, dtype, cut, device, slack):
    cut(64, 32)
    check(Patterns(2, (40,), 8, K, 16, dtype=dtype, device=device), [0, 1], slack)


# less than a tile's 64 channels, between powers of two, the most; in float32 not a multiple of its pieces
@pytest.mark.parametrize("C", [24, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_widths(C, dtype, cut, device, slack):
    cut(32, 32)
    check(Patterns(2, (35,), 2, 1, C, dtype=dtype, device=device), [0, 1], slack)


# what the capture asks for at once: neighbours, all against the last; all pairs, either way, one with itself
@pytest.mark.parametrize(
    "pairs", [[0, 1, 1, 2, 2, 3], [0, 3, 1, 3, 2, 3], [1, 0, 2, 0, 0, 3, 2, 1, 3, 1, 2, 3, 2, 2]]
)
def test_four_at_once(pairs, cut, device, slack):
    cut(32, 32)
    patterns = Patterns(4, (45, 20), 2, 2, 32, dtype=torch.bfloat16, device=device)
    check(patterns, pairs, slack)
    turned = [r for a, b in zip(pairs[::2], pairs[1::2], strict=True) for r in (b, a)]
    _, forwards = patterns.chain(module.attention_chain, pairs)
    _, backwards = patterns.chain(module.attention_chain, turned)
    assert torch.equal(forwards, backwards)


def test_settings_of_the_table(device, slack):
    for C in (64, 128, 256):
        check(Patterns(3, (70, 3), 1, 1, C, dtype=torch.float16, device=device), NEIGHBOURS, slack)
    check(Patterns(2, (70,), 1, 1, 64, device=device), [0, 1], slack)


@pytest.mark.parametrize("relative", [0.3, 1e-2, 1e-3])
def test_close_patterns_keep_their_distance(relative, cut, device, slack):
    cut(64, 64)
    patterns = Patterns(2, (60, 50), 2, 2, 32, device=device, moved=relative)
    norms = torch.stack([x.square().sum((1, 2)).sqrt() for x in patterns.matrices()[0]])
    distance = check(patterns, [0, 1], slack)[0].double()
    assert 0.2 < (distance / norms).max() / relative < 5  # the case is the one meant
    wanted = patterns.wanted_chain([0, 1])[1][0]
    assert ((distance - wanted).abs() <= slack * DISTANCE * wanted).all()


def test_scores_in_the_hundreds(cut, device, slack):
    cut(64, 64)
    patterns = Patterns(2, (90,), 2, 2, 32, device=device, size=8.0)
    scores = torch.einsum("nhc,mhc->hnm", patterns.q[0], patterns.k[0]) * patterns.scale
    assert 300 < scores.abs().max() < 500
    # scores and lse are rounded in float32, of which exp makes a relative error: the limit of lse
    check(patterns, [0, 1], slack, received_limit=LSE * float(scores.abs().max()))


def test_equal_keys_and_one_hot_rows(cut, device, slack):
    """Uniform rows against rows that look at one key alone: the distance is known."""
    cut(32, 32)
    T = 50
    patterns = Patterns(2, (T,), 1, 1, 16, device=device)
    patterns.k[0].copy_(patterns.k[0][:1].expand(T, 1, 16).clone())
    patterns.q[1].zero_()
    patterns.q[1][..., 0] = 1
    patterns.k[1].zero_()
    patterns.k[1][0, 0, 0] = 400.0
    patterns.measure()
    distance = check(patterns, [0, 1], slack)
    n = torch.arange(1, T + 1, dtype=torch.float64)
    known = ((1 - 1 / n).square() + (n - 1) / n.square()).sum().sqrt()
    assert abs(distance.item() - known.item()) <= slack * DISTANCE * known


def test_equal_patterns_have_distance_zero(cut, device):
    cut(32, 16)
    patterns = Patterns(2, (61, 5), 2, 1, 24, dtype=torch.bfloat16, device=device)
    for part in (patterns.q, patterns.k, patterns.lse):
        part[1] = part[0].clone()  # other memory, other strides
    received, distance = patterns.chain(module.attention_chain, [0, 1])
    assert (distance == 0).all() and torch.equal(received[0], received[1]) and (received > 0).all()


@pytest.mark.parametrize(
    "extra", [1, 8]
)  # rows that begin at no boundary; at one of 8 elements and not of 16
def test_strides_that_are_not_aligned(extra, cut, device, slack):
    cut(32, 32)
    check(Patterns(2, (40,), 1, 1, 24, dtype=torch.float16, device=device, extra=extra), [0, 1], slack)


def test_lse_of_any_stride(cut, device, slack):
    cut(32, 32)
    patterns = Patterns(2, (40,), 2, 1, 16, device=device)
    patterns.lse = [lse.T.contiguous().T for lse in patterns.lse]
    check(patterns, [0, 1], slack)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_neighbour_shows(poison, dtype, cut, device):
    cut(32, 16)
    lengths = (20, 37, 20)
    patterns = Patterns(2, lengths, 2, 2, 24, dtype=dtype, device=device)
    received, distance = patterns.chain(module.attention_chain, [0, 1])
    for r in range(2):
        for part in (patterns.q, patterns.k, patterns.lse):
            part[r] = part[r].clone()
            part[r][:20] = part[r][57:] = poison
    dirty_received, dirty_distance = patterns.chain(module.attention_chain, [0, 1])
    assert torch.equal(dirty_received[:, 20:57], received[:, 20:57])
    assert torch.equal(dirty_distance[:, 1], distance[:, 1])
    assert not dirty_distance[:, [0, 2]].isfinite().any()


def test_writes_all_of_its_results_and_nothing_else(cut, device, slack, monkeypatch):
    cut(16, 32)
    guards = Guards(monkeypatch)
    check(Patterns(3, (33, 0, 31, 1), 2, 1, 16, device=device), NEIGHBOURS, slack)
    guards.check()


def test_gives_the_same_bits_again(cut, device):
    cut(16, 16)
    patterns = Patterns(3, (50, 21), 2, 1, 16, dtype=torch.float16, device=device)
    first, second = (patterns.chain(module.attention_chain, NEIGHBOURS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_longer_bound_changes_nothing(cut, device):
    cut(16, 16)
    patterns = Patterns(2, (20, 9), 1, 1, 16, device=device)
    exact = patterns.chain(module.attention_chain, [0, 1])
    patterns.where = (patterns.where[0], 100)
    assert all(
        torch.equal(a, b) for a, b in zip(exact, patterns.chain(module.attention_chain, [0, 1]), strict=True)
    )


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths, cut, device):
    cut(16, 16)
    patterns = Patterns(2, (5,), 2, 1, 16, device=device)
    none = [[x[:0] for x in part] for part in (patterns.q, patterns.k, patterns.lse)]
    where = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device), 5
    received, distance = module.attention_chain(*none, *where, 1.0, [0, 1])
    assert received.shape == (2, 0, 2) and torch.equal(distance, distance.new_zeros(1, len(lengths), 2))


@pytest.mark.parametrize("R", [1, 5])
def test_numbers_of_recurrences_that_are_refused(R, device):
    patterns = Patterns(R, (4,), 1, 1, 16, device=device)
    with pytest.raises(ValueError, match=f"{R} recurrences: attention_chain holds 2 to 4"):
        patterns.chain(module.attention_chain, [0, 0])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    size=st.floats(0.1, 4.0),
    seed=st.integers(0, 1000),
)
def test_properties(lengths, heads, size, seed, device, slack):
    patterns = Patterns(3, lengths, *heads, 16, device=device, size=size, moved=0.5, seed=seed)
    pairs = [0, 1, 1, 2, 0, 2]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for rows, keys in ((64, 64), (16, 32)):
            patch.setattr(module, "find_settings", lambda *_, r=rows, k=keys: Settings(rows=r, keys=k))
            found.append(patterns.chain(module.attention_chain, pairs))
        # packed is separate, to the bit
        start = 0
        for index, length in enumerate(lengths):
            rows = slice(start, start + length)
            own = [[x[rows] for x in part] for part in (patterns.q, patterns.k, patterns.lse)]
            where = torch.tensor([0, length], dtype=torch.int32, device=device), length
            received, distance = module.attention_chain(*own, *where, patterns.scale, pairs)
            assert torch.equal(received, found[1][0][:, rows]) and torch.equal(
                distance[:, 0], found[1][1][:, index]
            )
            start += length
    largest = float(torch.cat(patterns.lse).abs().max()) if sum(lengths) else 0.0
    limit = 1e-5 * max(1.0, largest / 30)  # lse is rounded
    for received, distance in found:
        sums = torch.stack([part.sum(1) for part in received.double().split(lengths, 1)], 1)  # [R, S, H]
        num_rows = torch.tensor(lengths, device=device, dtype=torch.float64)[None, :, None].expand_as(sums)
        torch.testing.assert_close(sums, num_rows, rtol=limit * slack, atol=0)
        assert (received >= 0).all()
        far, there, back = distance.double()[[2, 0, 1]]
        assert (far <= there + back + 1e-5).all() and (distance <= (2 * num_rows[0]).sqrt() + 1e-5).all()
    for a, b in zip(*found, strict=True):  # the size of tiles does not matter
        torch.testing.assert_close(a, b, rtol=2e-5 * slack, atol=1e-5 * slack)


MUTATIONS = {
    "no causal mask": ("(here[None, :] >= key[:, None]) & ", ""),
    "no row mask": (" & (here < length)[None, :]", ""),
    "sum for difference": ("moved = p[r] - p[", "moved = p[r] + p["),
    "difference of absolute values": ("tl.sum(moved * moved, 1)", "tl.sum(moved, 1)"),
    "no last block": (" + tl.maximum(num_query_blocks - num_whole, 0)", ""),
    "nothing on the diagonal": ("tl.minimum(num_query_blocks, DIAGONAL) + ", ""),
    "one key head for all": ("h // heads_per_key * (", "0 * ("),
}


def check_small_case(launch, device, slack):
    check(Patterns(2, (40, 9), 2, 2, 16, device=device), [0, 1], slack, launch=launch)


def test_the_kernel_itself_passes(cut, device, slack):
    check_small_case(cut(16, 16).attention_chain, device, slack)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_fails(name, mutated, cut, device, slack):
    wrong = cut(16, 16, of=mutated(module, *MUTATIONS[name]))
    with pytest.raises(AssertionError):
        check_small_case(wrong.attention_chain, device, slack)
