"""Attention statistics under every mask: the operation against float64, and what a context makes of calls."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import looptap
from looptap.kernels import reference
from looptap.kernels.attention import attention_statistics, attention_with_statistics, make_cu_seqlens
from looptap.kernels.attention_blocks import QUERIES_PER_BLOCK
from looptap.tests.watched_modules import make_looped, sequence_values

LIMITS = {"entropy": 2e-5, "peak": 2e-6, "sink": 2e-6, "received": 3e-5}
NEVER = float("-inf")


def causal(T, J):
    """Queries are the last T of J tokens."""
    return torch.ones(T, J, dtype=torch.bool).tril(J - T)


def biased(T, J, H, dtype=torch.float32):
    """ALiBi: a slope for each head, and keys ahead hidden."""
    slope_H11 = (2.0 ** -torch.arange(1, H + 1)).view(H, 1, 1)
    distance_TJ = torch.arange(J) - torch.arange(J - T, J).unsqueeze(1)
    return (slope_H11 * distance_TJ).masked_fill(~causal(T, J), NEVER).to(dtype)[None]


MASKS = {
    "none": lambda B, H, T, J: None,
    "boolean": lambda B, H, T, J: causal(T, J)[None, None],
    "window": lambda B, H, T, J: (causal(T, J) & ~causal(T, J).tril(J - T - 5))[None, None],
    "minus infinity": lambda B, H, T, J: torch.zeros(1, 1, T, J).masked_fill(~causal(T, J), NEVER),
    "finite": lambda B, H, T, J: torch.zeros(B, 1, T, J).masked_fill(~causal(T, J), -3.4e38),
    "half": lambda B, H, T, J: torch.zeros(1, 1, T, J, dtype=torch.half).masked_fill(~causal(T, J), -65504),
    "alibi": lambda B, H, T, J: biased(T, J, H),
    "alibi, bfloat16": lambda B, H, T, J: biased(T, J, H, torch.bfloat16),
    "one row of keys": lambda B, H, T, J: (torch.arange(J) % 3 != 1)[None, None, None],
    "by row and head": lambda B, H, T, J: (
        causal(T, J) & (torch.rand(B, H, T, J, generator=torch.Generator().manual_seed(1)) < 0.3)
        | torch.eye(T, J, dtype=torch.bool).roll(J - T, 1)
    ),
}


def random_qk(B, H, K, T, J, C=8, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, length, C, generator=generator) * scale for n, length in ((H, T), (K, J))]


def assert_statistics(found, wanted):
    for name, limit in LIMITS.items():
        got = getattr(found, f"{name}_NH").double()
        torch.testing.assert_close(got, wanted[name], atol=limit, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# one query; both sides of a block's edge; a ragged third block
@pytest.mark.parametrize("T", [1, QUERIES_PER_BLOCK - 1, QUERIES_PER_BLOCK, QUERIES_PER_BLOCK + 1, 130])
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("name", MASKS)
def test_any_mask_matches_reference(name, T, past):
    B, H, K, J = 2, 6, 3, T + past
    q, k = random_qk(B, H, K, T, J)
    mask = MASKS[name](B, H, T, J)
    found = attention_statistics(q, k, scale=0.6, mask=mask, sink_tokens=3)
    assert_statistics(found, reference.attention_statistics(q, k, scale=0.6, mask=mask, sink_tokens=3))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (8, 1)])
def test_causal_matches_reference_and_the_packed_operation(T, H, K):
    q, k = random_qk(3, H, K, T, T)
    found = attention_statistics(q, k, scale=0.5, is_causal=True, sink_tokens=2)
    assert_statistics(found, reference.attention_statistics(q, k, scale=0.5, is_causal=True, sink_tokens=2))
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, k)]
    _, ours = attention_with_statistics(*packed, make_cu_seqlens((T,) * 3), T, 0.5, sink_tokens=2)
    for one, other in zip(found, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_inputs_give_exact_statistics(dtype):
    q, k = (x.to(dtype) for x in random_qk(1, 4, 2, 70, 70, scale=1.5))
    mask = MASKS["boolean"](1, 4, 70, 70)
    assert_statistics(
        attention_statistics(q, k, scale=0.4, mask=mask),
        reference.attention_statistics(q, k, scale=0.4, mask=mask),
    )


def test_what_is_kept_owns_its_memory():
    """A view of one block's probabilities would keep all of them alive."""
    q, k = random_qk(2, 4, 4, 130, 130)
    for x in attention_statistics(q, k, scale=1.0, is_causal=True):
        assert x.untyped_storage().nbytes() == x.numel() * 4


# --- inside a context: whatever is called, the rows of the call's own probabilities

B, T = 2, 66  # two blocks of queries


def gqa(**more):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **more)


def repeated(q, k, v):
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def wide_values(q, k, v):
    """Values of another width than queries; the block is given its own width back."""
    return F.scaled_dot_product_attention(q, k, v.repeat(1, 1, 1, 2), is_causal=True, enable_gqa=True)[
        ..., : v.shape[-1]
    ]


def by_position(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)


def operator(q, k, v):
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


CALLS = {
    "causal": (gqa(is_causal=True), {"is_causal": True}),
    "scaled": (gqa(is_causal=True, scale=1.3), {"is_causal": True, "scale": 1.3}),
    "no mask": (gqa(), {}),
    "by position": (by_position, {"is_causal": True}),
    "repeated keys": (repeated, {"is_causal": True}),
    "wide values": (wide_values, {"is_causal": True}),
    "operator": (operator, {"is_causal": True}),
}
CALLS |= {
    name: (gqa(attn_mask=mask), {"mask": mask})
    for name, mask in {
        "boolean [T, T]": causal(T, T),
        "window [1, 1, T, T]": MASKS["window"](B, 4, T, T),
        "minus infinity [H, T, T]": biased(T, T, 4)[0],
        "finite [B, 1, T, T]": MASKS["finite"](B, 4, T, T),
        "bidirectional bias [1, H, T, T]": torch.randn(
            1, 4, T, T, generator=torch.Generator().manual_seed(2)
        ),
    }.items()
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.slow
def test_every_kind_of_call(name, context):
    module = make_looped(key_heads=2)
    call, wanted_as = CALLS[name]
    for block in module.blocks:
        block.attend = call
    ids = torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(0))
    with context():
        plain = module(ids)
        for block in module.blocks:
            block.seen.clear()
        with looptap.watch(module, sink_tokens=2) as watched:
            assert torch.equal(module(ids), plain)
    dataset = watched.dataset()
    visits = {block: iter(block.seen) for block in module.blocks}
    order = [*module.prelude, *[*module.core] * 3, *module.coda]
    for depth, block in enumerate(order):
        wanted = reference.attention_statistics(*next(visits[block]), sink_tokens=2, **wanted_as)
        for what, limit in LIMITS.items():
            got_BTH = torch.stack(
                [sequence_values(dataset, f"attention_{what}", row)[:, depth] for row in range(B)]
            )
            torch.testing.assert_close(got_BTH.flatten(0, 1).double(), wanted[what], atol=limit, rtol=0)
    assert dataset.plan["model"]["num_kv_heads"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module(dtype):
    """Float32 statistics of the rounded queries and keys, and of the rounded residuals."""
    module = make_looped(key_heads=2).to(dtype)
    outputs = []
    for block in module.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append((inputs[0], output)))
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad(), looptap.watch(module, states=["all"]) as watched:
        module(ids)
    dataset = watched.dataset()
    q, k = module.core[1].seen[2]  # depth 6: the core's last invocation
    assert q.dtype == dtype
    wanted = reference.attention_statistics(q, k, is_causal=True)
    for what, limit in LIMITS.items():
        got_TH = sequence_values(dataset, f"attention_{what}", 0)[:, 6]
        torch.testing.assert_close(got_TH.double(), wanted[what], atol=limit, rtol=0)
    assert dataset.plan["dtype"] == str(dtype).removeprefix("torch.")
    for depth, (before, after) in enumerate(outputs):
        state = torch.from_numpy(dataset["state"].values[:40, depth].astype("float32"))
        assert torch.equal(state, after[0].float())
        update_T = (after[0].double() - before[0].double()).norm(dim=-1)
        torch.testing.assert_close(
            dataset_depth(dataset, "update_norm", depth).double(), update_T, rtol=1e-5, atol=0
        )


def dataset_depth(dataset, quantity, depth):
    return sequence_values(dataset, quantity, 0)[:, depth]


def test_autocast_is_measured_as_it_runs():
    """Under autocast attention rounds its float32 queries and keys; the statistics are those of what is
    rounded, and not rounded themselves.
    """
    module = make_looped(key_heads=2, prelude=0, recurrences=1, coda=0, core=1)
    inner = module.core[0].attend
    given = []

    def attend(q, k, v):
        given.append((q.float() * 1.1, k.float() * 0.9))  # no numbers of bfloat16
        return inner(*given[-1], v.float())

    module.core[0].attend = attend
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = module(ids)
        with looptap.watch(module) as watched:
            assert torch.equal(module(ids), plain)
    q, k = (x.bfloat16() for x in given[-1])
    wanted = reference.attention_statistics(q, k, is_causal=True)["entropy"]
    got_TH = sequence_values(watched.dataset(), "attention_entropy", 0)[:, 0].double()
    torch.testing.assert_close(got_TH, wanted, atol=2e-5, rtol=0)


def test_gradients_are_those_without_watching():
    ids = torch.arange(30).view(2, 15)
    gradients = []
    for is_watched in (False, True):
        module = make_looped()
        with looptap.watch(module) if is_watched else nullcontext():
            module(ids).square().mean().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(map(torch.equal, *gradients))


def test_tokens_without_a_batch_axis():
    module = make_looped(key_heads=2)
    ids_T = torch.arange(20)
    with torch.no_grad(), looptap.watch(module) as alone:
        module(ids_T)
    with torch.no_grad(), looptap.watch(module) as batched:
        module(ids_T[None])
    one, other = alone.dataset(), batched.dataset()
    for name in one.data_vars:
        got, wanted = (torch.from_numpy(x[name].values) for x in (one, other))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert one["token_id"].values[:20].tolist() == ids_T.tolist()


def test_dropout_elsewhere_is_left_alone():
    """Random numbers that the module draws are the ones it draws alone."""
    module = make_looped()
    module.norm.register_forward_hook(lambda _, inputs, output: F.dropout(output, 0.5, training=True))
    ids = torch.arange(20).view(1, 20)
    torch.manual_seed(3)
    plain = module(ids)
    torch.manual_seed(3)
    with looptap.watch(module):
        assert torch.equal(module(ids), plain)


def test_a_call_outside_the_blocks_is_not_counted():
    module = make_looped()
    x = torch.randn(1, 1, 3, 4)

    def attend_too(*_):
        F.scaled_dot_product_attention(x, x, x)

    module.norm.register_forward_hook(attend_too)
    with torch.no_grad(), looptap.watch(module) as watched:
        F.scaled_dot_product_attention(x, x, x)
        module(torch.arange(20).view(1, 20))
        F.scaled_dot_product_attention(x, x, x)
    assert watched.num_sequences == 1
