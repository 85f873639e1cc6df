"""Padded batches and cached decoding: the same numbers as each row alone, in one pass."""

import pytest
import torch
from torch import nn

import looptap
from looptap.errors import WatchError
from looptap.tests.watched_modules import make_looped, sequence_values, tiny_llama

LENGTHS = (9, 5, 1, 12)  # one token; a row without padding
ROWS = [[*range(1 + n, 1 + 2 * n)] for n in LENGTHS]


def padded(side, rows=ROWS, width=None):
    """Ids and mask [rows, tokens]."""
    width = width or max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for row, tokens in enumerate(rows):
        here = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, here], mask[row, here] = torch.tensor(tokens), 1
    return ids, mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


def alone(model, rows, **settings):
    """Every row by itself."""
    with torch.no_grad(), looptap.watch(model, "model.layers.*", **settings) as watched:
        for row in rows:
            model(torch.tensor([row]), use_cache=False)
    return watched.dataset()


def assert_same_rows(found, wanted, tolerance=1e-5):
    """Every quantity, and token, of every sequence."""
    assert found.sizes["sequence"] == wanted.sizes["sequence"]
    for name in ("token_id", "token_position", *wanted.data_vars):
        for row in filter(lambda row: row >= 0, wanted["sequence_id"].values.tolist()):
            got, due = (sequence_values(dataset, name, row) for dataset in (found, wanted))
            torch.testing.assert_close(
                got,
                due,
                atol=tolerance,
                rtol=tolerance,
                equal_nan=True,
                msg=lambda m, n=name, r=row: f"{n}, {r}: {m}",
            )


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_bool", [False, True])
def test_padding_in_transformers(llama, side, is_bool):
    ids, mask = padded(side)
    given = ids, mask.bool() if is_bool else mask, positions(mask)  # by place, as parameters are named
    with torch.no_grad():
        plain = llama(*given).logits
        with looptap.watch(llama, "model.layers.*", sink_tokens=2, states=["all"]) as watched:
            assert torch.equal(llama(*given).logits, plain)
    dataset = watched.dataset()
    assert dataset.attrs["plan"]["num_tokens"] == sum(LENGTHS)
    assert_same_rows(dataset, alone(llama, ROWS, sink_tokens=2, states=["all"]))


@pytest.mark.parametrize("architecture", ["mistral", "gemma3", "qwen2"])
def test_sliding_windows_in_transformers(architecture):
    """A window of 4 in every layer, in every other one, or in later ones; shorter and longer rows."""
    import transformers

    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
        "sliding_window": 4,
    }  # fmt: skip
    if architecture == "mistral":
        config = transformers.MistralConfig(**sizes)
    elif architecture == "gemma3":
        alternating = ["sliding_attention", "full_attention"] * 2
        config = transformers.Gemma3TextConfig(**sizes, head_dim=8, layer_types=alternating)
    else:
        config = transformers.Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=2)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert model.config._attn_implementation == "sdpa"
    ids, mask = padded("left")
    with torch.no_grad(), looptap.watch(model, "model.layers.*") as watched:
        model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    dataset = watched.dataset()
    assert_same_rows(dataset, alone(model, ROWS))
    # the last query of the longest row does not see the first key where there is a window
    sink_LH = sequence_values(dataset, "attention_sink", 3)[-1]
    is_windowed = (sink_LH == 0).all(-1)
    assert is_windowed.tolist() == {
        "mistral": [True] * 4, "gemma3": [True, False] * 2, "qwen2": [False, False, True, True],
    }[architecture]  # fmt: skip


def greedy(model, ids, **more):
    sampling = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    return model.generate(ids, **sampling, pad_token_id=0, eos_token_id=59, **more)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_generate_equals_one_pass(key_heads):
    """Token by token with a cache, as `generate` does; the last token it chose was never run."""
    model = tiny_llama(num_key_value_heads=key_heads)
    ids = torch.tensor([[3, 7, 11, 20], [5, 9, 2, 44]])
    with torch.no_grad():
        plain = greedy(model, ids)
    with looptap.watch(model, "model.layers.*", states=["all"], tokens="every:3") as watched:
        assert torch.equal(greedy(model, ids), plain)
    assert plain.shape == (2, 10) and watched.num_sequences == 2
    found = watched.dataset()
    rows = [row[:-1].tolist() for row in plain]
    assert_same_rows(found, alone(model, rows, states=["all"], tokens="every:3"))
    kept = found["state_token"].values
    assert (kept >= 0).sum() == 2 * 3
    assert found.attrs["plan"]["model"]["num_kv_heads"] == key_heads


def test_generate_goes_on_with_left_padding(llama):
    ids, mask = padded("left")
    with looptap.watch(llama, "model.layers.*", states=["all"], tokens="last") as watched:
        made = greedy(llama, ids, attention_mask=mask)
    rows = [[*row, *new[:-1].tolist()] for row, new in zip(ROWS, made[:, 12:], strict=True)]
    assert_same_rows(watched.dataset(), alone(llama, rows, states=["all"], tokens="last"))


def test_a_one_token_prompt(llama):
    """The very first pass has one query already."""
    ids, mask = padded("left", [[7], [9]], width=1)
    with looptap.watch(llama, "model.layers.*") as watched:
        made = greedy(llama, ids, attention_mask=mask)
    assert_same_rows(watched.dataset(), alone(llama, [row[:-1].tolist() for row in made]))


def test_a_prompt_in_chunks(llama):
    """Several tokens at once behind a cache, and after it a new batch without one."""
    from transformers import DynamicCache

    ids = torch.tensor([[*range(1, 15)], [*range(20, 34)]])
    with torch.no_grad(), looptap.watch(llama, "model.layers.*") as watched:
        cache = DynamicCache(config=llama.config)
        for start, end in ((0, 5), (5, 6), (6, 14)):
            llama(ids[:, start:end], past_key_values=cache, use_cache=True)
        llama(ids[:1, :3])
    assert watched.num_sequences == 3
    assert_same_rows(watched.dataset(), alone(llama, [*ids.tolist(), ids[0, :3].tolist()]))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_without_attention_quantities(llama, beams):
    """Nothing would tell which rows go on."""
    message = "goes on from a cache of 12 tokens, and a cache can only be followed with attention"
    ids, mask = padded("left")
    for more in ({"attention_mask": mask}, {}):
        with (
            pytest.raises(WatchError, match=message),
            looptap.watch(llama, "model.layers.*", quantities="residual") as watched,
        ):
            greedy(llama, ids, num_beams=beams, **more)
        assert watched.num_sequences == 4 * beams
    quantities = ["residual", "attention_peak"]
    with looptap.watch(llama, "model.layers.*", quantities=quantities) as watched:
        made = greedy(llama, ids, attention_mask=mask)
    rows = [[*row, *new[:-1].tolist()] for row, new in zip(ROWS, made[:, 12:], strict=True)]
    assert_same_rows(watched.dataset(), alone(llama, rows, quantities=quantities))


def test_a_longer_mask_tells_of_a_cache_too():
    module = Masked(lambda mask: {"is_causal": True})
    longer = torch.ones(2, 5)
    message = "goes on from a cache of 2 tokens"
    with (
        pytest.raises(WatchError, match=message),
        looptap.watch(module, "inner.*.*", quantities="residual"),
    ):
        module(torch.ones(2, 3, dtype=torch.long), longer)


@pytest.mark.parametrize("blocks", ["model.layers.*", "model.layers.0"])
def test_two_caches_taken_for_one(llama, blocks):
    """Equally long ones whose last tokens agree: keys of the first layer are a matter of token and place."""
    from transformers import DynamicCache

    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 4]])
    following = torch.full((2, 1), 9)
    caches = [DynamicCache(config=llama.config) for _ in range(2)]
    with torch.no_grad(), looptap.watch(llama, blocks) as watched:
        for cache, given in zip(caches, (ids, ids + 20), strict=True):
            llama(given, past_key_values=cache)
        with pytest.raises(WatchError, match="past_key_values is another object"):
            llama(following, past_key_values=caches[0])
        llama(following, past_key_values=caches[1])
        caches[1].reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(WatchError, match="its cache holds other keys"):
            llama(following, past_key_values=caches[1])
    assert watched.num_sequences == 4


def test_a_cache_that_was_made_by_the_model(llama):
    """The first pass is not given it."""
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), looptap.watch(llama, "model.layers.*") as watched:
        cache = llama(ids, use_cache=True).past_key_values
        llama(ids + 20, past_key_values=cache)
    wanted = alone(llama, [[1, 2, 3, 4, 21, 22, 23, 24]])
    assert_same_rows(watched.dataset(), wanted)


def test_keys_that_are_computed_anew():
    """Multi-head latent attention keeps less than keys: what it makes of it differs by rounding."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=60, hidden_size=128, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=32, n_routed_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for length in (1, 2, 7):
            with looptap.watch(model, "model.layers.*") as watched:
                greedy(model, torch.arange(1, 1 + 2 * length).view(2, length))
            assert watched.num_sequences == 2


def test_a_looped_module_with_a_cache_a_block_and_recurrence():
    """A cache must hold every recurrence apart; one that they share sees twice the tokens."""
    module = make_looped(prelude=0, coda=0, has_injection=False)
    ids = torch.arange(24).view(2, 12)
    for block in module.core:
        block.attend = attend_at_the_end
    with torch.no_grad(), looptap.watch(module, "core.*") as whole:
        module(ids)
    caches = {}

    def with_own_cache(block):
        count = iter(range(10**6))

        def before(module, args):
            module.cache = caches.get((block, visit := next(count) % 3), ())
            module.visit = visit

        def after(module, args, output):
            caches[block, module.visit] = module.cache

        return before, after

    for index, block in enumerate(module.core):
        before, after = with_own_cache(index)
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    with torch.no_grad(), looptap.watch(module, "core.*") as watched:
        for start, end in ((0, 7), (7, 8), (8, 12)):
            module(ids[:, start:end])
    assert_same_rows(watched.dataset(), whole.dataset())


def test_more_recurrences_behind_a_cache():
    """They have no keys to be compared with, and are refused as another structure."""
    module = make_looped(prelude=0, core=1, recurrences=1, coda=0, has_injection=False)
    block = module.core[0]
    block.attend, block.cache = attend_at_the_end, ()
    with torch.no_grad(), looptap.watch(module, "core.*") as watched:
        module(torch.arange(4)[None])
        cache, module.recurrences = block.cache, 2
        block.register_forward_pre_hook(lambda *_: setattr(block, "cache", cache))
        with pytest.raises(
            WatchError, match=r"called core\.0 x2 \(2 calls\), the first one core\.0 \(1 calls\)"
        ):
            module(torch.arange(4, 5)[None])
    assert watched.num_sequences == 1


def attend_at_the_end(q, k, v):
    """The last tokens see themselves and three before them."""
    T, J = q.shape[-2], k.shape[-2]
    mask = torch.ones(T, J, dtype=torch.bool).tril(J - T).triu(J - T - 3)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Masked(nn.Module):
    """Hand-written: `how` turns a mask [rows, tokens] into what attention is given."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = make_looped(), how

    def forward(self, input_ids, attention_mask=None):
        given = self.how(attention_mask)
        for block in self.inner.blocks:
            block.attend = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, **given)
        return self.inner(input_ids)


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


HOW = {
    "ignored, causal": lambda mask: {"is_causal": True},
    "ignored, all": lambda mask: {},
    "keys": lambda mask: {"attn_mask": mask.bool()[:, None, None]},
    "causal and keys": lambda mask: {"attn_mask": causal(mask.shape[1]) & mask.bool()[:, None, None]},
    "added": lambda mask: {"attn_mask": (mask.float()[:, None, None] - 1) * 1e4},
    "added, too little": lambda mask: {"attn_mask": (mask.float()[:, None, None] - 1) * 20},
    "causal alone": lambda mask: {"attn_mask": causal(mask.shape[1])},
    "causal alone, added": lambda mask: {"attn_mask": causal(mask.shape[1]).float().log()},
    "all": lambda mask: {"attn_mask": torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool)},
}
HANDLED = {
    "left": ("keys", "causal and keys", "added"),
    "right": ("ignored, causal", "keys", "causal and keys", "added", "causal alone", "causal alone, added"),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.slow
def test_a_mask_that_the_module_may_ignore(how, side):
    """Right padding behind causal attention is seen by no real token; anything else must be masked."""
    ids, mask = padded(side)
    module = Masked(HOW[how])
    if how not in HANDLED[side]:
        whys = {"ignored, causal": "causal without a mask", "ignored, all": "runs without a mask"}
        why = whys.get(how, "its mask lets them")
        with (
            pytest.raises(WatchError, match=rf"(?s)block inner\.prelude\.0: row 0 .*padded.*{why}.*ignores"),
            looptap.watch(module, "inner.*.*"),
        ):
            module(ids, mask)
        return
    with torch.no_grad(), looptap.watch(module, "inner.*.*") as watched:
        module(ids, mask)
    with torch.no_grad(), looptap.watch(module, "inner.*.*") as single:
        for row in ROWS:
            module(torch.tensor([row]), torch.ones(1, len(row)))
    # rotary angles of padded rows begin elsewhere, which turns queries and keys alike
    assert_same_rows(watched.dataset(), single.dataset(), tolerance=1e-4)


@pytest.mark.slow
def test_a_mask_that_is_set_by_hand():
    """The mask is for a module without attention_mask; it holds for one pass."""
    module = make_looped()
    ids, mask = padded("right")
    with torch.no_grad(), looptap.watch(module) as watched:
        watched.set_mask(mask)
        module(ids)
        module(ids)
    dataset = watched.dataset()
    lengths = dict(zip(dataset["sequence_id"].values, dataset["sequence_length"].values, strict=True))
    assert [lengths[row] for row in range(8)] == [*LENGTHS, 12, 12, 12, 12]
    with torch.no_grad(), looptap.watch(module) as single:
        for row in ROWS:
            module(torch.tensor([row]))
    for name in single.dataset().data_vars:
        for row in range(4):
            torch.testing.assert_close(
                sequence_values(dataset, name, row),
                sequence_values(single.dataset(), name, row),
                atol=1e-5,
                rtol=1e-5,
                equal_nan=True,
            )


def test_a_row_of_padding_alone_has_no_slots(llama):
    ids, mask = padded("right", [[5, 6, 7], [], [8]])
    mask[1] = 0
    with torch.no_grad(), looptap.watch(llama, "model.layers.*") as watched:
        llama(ids, attention_mask=mask)
    dataset = watched.dataset()
    assert watched.num_sequences == 3
    assert sorted(dataset["sequence_id"].values.tolist()) == [0, 2]
    assert sequence_values(dataset, "token_id", 2).tolist() == [8]
