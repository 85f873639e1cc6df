"""What cannot be watched exactly is refused by name, and nothing stays behind in a module."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack

import looptap
from looptap.errors import StoreExistsError, WatchError
from looptap.tests.watched_modules import make_looped, sequence_values, tiny_llama

IDS = torch.arange(12).view(2, 6)
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def traces(module):
    """All that a context could leave: hooks of every kind, attributes, modes of this thread."""
    hooks = {
        (name, kind): list(getattr(part, kind)) for name, part in module.named_modules() for kind in HOOKS
    }
    return hooks, [sorted(vars(part)) for part in module.modules()], _get_current_function_mode_stack()


class Stop(Exception):
    pass


def refused(module, run, message, blocks=None, **settings):
    """The call is refused with this message, leaves no trace, and no sequence."""
    before = traces(module)
    with torch.no_grad(), looptap.watch(module, blocks, **settings) as watched:
        with pytest.raises(WatchError, match=message):
            run()
        assert watched.num_sequences == 0
    assert traces(module) == before


# --- settings and blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantities": ["lens_kl"]}, "lens_kl cannot be captured: it reads a head .* capture the model"),
        ({"quantities": ["exit_probability"]}, "exit_probability cannot be captured: it reads"),
        ({"quantities": ["lens"]}, "lens holds nothing of this model: it reads a head"),
        ({"quantities": ["norm"]}, "'norm' is not a quantity: choose from residual_norm"),
        ({"quantities": []}, "no quantity was chosen"),
        ({"quantities": ["state"]}, "the quantity state needs states="),
        ({"sink_tokens": 0}, "sink_tokens must be a whole number of at least 1, got 0"),
        ({"tokens": "some"}, "tokens 'some': choose all, last"),
        ({"blocks": "layers.*"}, r"blocks='layers\.\*' is no module of Looped: .*prelude\.\* \(1 Hand"),
        ({"sink_tokens": 1.5}, "sink_tokens must be a whole number of at least 1, got 1.5"),
        ({"sink_tokens": True}, "sink_tokens must be a whole number of at least 1, got True"),
        ({"blocks": [nn.Linear(2, 2)]}, "a Linear given as block is not part of the Looped"),
        ({"blocks": [3]}, "blocks holds a int: give names"),
        ({"blocks": []}, "blocks is empty"),
        ({"blocks": ["core.0", "core.0.q"]}, r"core\.0\.q is inside core\.0"),
    ],
)
def test_settings(settings, message):
    module = make_looped()
    before = traces(module)
    with pytest.raises(ValueError, match=message), looptap.watch(module, **settings):
        raise AssertionError("not to be entered")
    assert traces(module) == before


def test_blocks_that_are_not_clear():
    lists = {"encoder": make_looped().core[0], "decoder": nn.Sequential(nn.Linear(2, 2))}
    model = nn.ModuleDict({name: nn.ModuleList([block]) for name, block in lists.items()})
    with pytest.raises(WatchError, match=r"several lists of blocks.*encoder\.\* \(1 HandBlock\), decoder"):
        looptap.watch(model).__enter__()
    with pytest.raises(WatchError, match="Linear has no list of blocks: give blocks="):
        looptap.watch(nn.Linear(2, 2)).__enter__()


def test_states_that_are_not_there():
    module = make_looped(prelude=0)
    refused(module, lambda: module(IDS), r"\(0,2x3,1\) has no prelude", states=["prelude"])


def test_what_no_hook_can_see():
    module = make_looped()
    compiled = torch.compile(make_looped(), backend="eager")
    with pytest.raises(WatchError, match=r"Looped|OptimizedModule.*is compiled \(torch.compile\)"):
        looptap.watch(compiled, "_orig_mod.core.*").__enter__()
    module.core[1].compile(backend="eager")
    with pytest.raises(WatchError, match=r"core\.1 is compiled"):
        looptap.watch(module).__enter__()
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(WatchError, match="0 is a TorchScript module"):
        looptap.watch(scripted, "0").__enter__()


def test_weights_that_are_not_there():
    with pytest.raises(WatchError, match="on the meta device"):
        looptap.watch(make_looped().to("meta")).__enter__()


def test_a_store_that_is_there(tmp_path):
    path, module = tmp_path / "run.zarr", make_looped()
    with looptap.watch(module, store=path):
        module(IDS)
    with pytest.raises(StoreExistsError, match="choose another path"):
        looptap.watch(module, store=path).__enter__()
    with looptap.watch(module) as watched:
        pass
    with pytest.raises(WatchError, match="no forward pass of Looped was recorded: call the module inside"):
        watched.dataset()


# --- attention


def eager(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def twice(q, k, v):
    return scaled_dot_product_attention(q, k, v) + scaled_dot_product_attention(q, k, v)


def with_dropout(q, k, v):
    return scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def with_both(q, k, v):
    return scaled_dot_product_attention(q, k, v, attn_mask=SEEN.tril(), is_causal=True)


def nested(q, k, v):
    parts = (torch.nested.nested_tensor([*x.transpose(1, 2)], layout=torch.jagged) for x in (q, k, v))
    output = scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts))
    return torch.stack([*output.transpose(1, 2).unbind()]).transpose(1, 2)


def with_bias_object(q, k, v):
    return scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(6, 6))


def masked(mask):
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def heads_in_rows(q, k, v):
    return scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, -1))


def more_keys(q, k, v, is_causal=False):
    k, v = (torch.cat([x, x[:, :, :2]], 2) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def fewer_heads(q, k, v):
    return scaled_dot_product_attention(*(x[:, :2] for x in (q, k, v))).repeat(1, 2, 1, 1)


def fewer_queries(q, k, v):
    return scaled_dot_product_attention(q[:, :, :3], k, v).repeat(1, 1, 2, 1)


SEEN = torch.ones(6, 6, dtype=torch.bool)
NOT_ITSELF = SEEN.tril(-1) | (SEEN & ~SEEN.tril())
NOTHING = SEEN.tril()
NOTHING[2] = False
BLIND = "a token that its mask lets see nothing, or not itself: that is padding"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (eager, "ran without a call of scaled_dot_product_attention .*eager.* attn_implementation=.sdpa"),
        (twice, "calls scaled_dot_product_attention more than once.*cross-attention"),
        (with_dropout, r"dropout_p=0.1 .* call eval\(\)"),
        (with_both, "with both attn_mask and is_causal"),
        (nested, "attention of nested tensors"),
        (with_bias_object, "with a CausalBias as attn_mask"),
        (heads_in_rows, r"query \[8, 6, 4\] .*block of 2 rows and 6 tokens: \[rows, heads, tokens, width\]"),
        (fewer_queries, r"query \[2, 4, 3, 4\]"),
        (fewer_heads, "has 2 heads where .* has 4"),
        (more_keys, "sees 2 earlier tokens where that of other blocks saw 0: a sliding or cropped"),
        (partial(more_keys, is_causal=True), "causal over 6 queries and 8 keys.*static cache"),
        (masked(NOT_ITSELF), f"row 0 has {BLIND}"),
        (masked(NOTHING), f"row 0 has {BLIND}"),
        (masked(torch.zeros(6, 6).masked_fill(~NOTHING, float("-inf"))), f"row 0 has {BLIND}"),
        (masked(torch.zeros(2, 1, 6, 6).masked_fill(~NOTHING, -3.4e38)), f"row 0 has {BLIND}"),
        (masked(torch.zeros(6, 6).masked_fill(~NOTHING, -1e4)), f"row 0 has {BLIND}"),
        (masked(torch.zeros(6, 6).masked_fill(~NOT_ITSELF, -1e4)), f"row 0 has {BLIND}"),
        (masked(torch.stack([SEEN, NOTHING])[:, None]), f"row 1 has {BLIND}"),
        (masked(torch.full((6, 6), float("nan"))), f"row 0 has {BLIND}"),
    ],
)
def test_attention_that_is_not_one_matrix(call, message):
    module = make_looped()
    module.core[1].attend = call  # not the first block, so that others tell how many heads there are
    refused(module, lambda: module(IDS), f"(?s)block core.1.*{message}")
    # without attention quantities it is nobody's business
    with torch.no_grad(), looptap.watch(module, quantities=["residual", "steps", "gaps"]) as watched:
        module(IDS)
    assert watched.num_sequences == 2


def test_eager_transformers_and_multihead_attention():
    model = tiny_llama(attn_implementation="eager")
    refused(
        model, lambda: model(IDS), r"block model\.layers\.0 ran without .* in transformers", "model.layers.*"
    )
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 6, 16)
    refused(encoder, lambda: encoder(x), r"block layers\.0 ran without .*nn\.MultiheadAttention")
    # without attention its fused path stays what it is
    with torch.inference_mode():
        plain = encoder(x)
        with looptap.watch(encoder, quantities="residual") as watched:
            assert torch.equal(encoder(x), plain)
    assert watched.notation == "(2,0,0)"


def test_two_stacks():
    """An encoder's ids and mask are not its decoder's; each can be watched by itself, in the whole model."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    config._attn_implementation = "sdpa"
    model = T5ForConditionalGeneration(config).eval()
    mask, ids = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), IDS + 20
    run = partial(model, input_ids=IDS, attention_mask=mask, use_cache=False)
    for given in (
        {"decoder_input_ids": ids},
        {"labels": ids},
        {"decoder_attention_mask": mask, "labels": ids},
    ):
        message = r"T5For.* is an encoder and a decoder.*looptap\.watch\(model\.decoder"
        refused(model, partial(run, **given), message, "decoder.block.*", quantities="residual")
    with pytest.raises(
        WatchError, match=r"several lists of blocks.*encoder\.block\.\* \(2 T5Block\), decoder"
    ):
        looptap.watch(model).__enter__()
    with (
        torch.no_grad(),
        looptap.watch(model.decoder, "block.*", quantities="residual") as decoder,
        looptap.watch(model.encoder, "block.*", quantities="residual") as encoder,
    ):
        run(decoder_input_ids=ids)
    assert [sequence_values(encoder.dataset(), "token_id", row).tolist() for row in range(2)] == [
        IDS[0].tolist(),
        IDS[1, :3].tolist(),
    ]
    assert sequence_values(decoder.dataset(), "token_id", 1).tolist() == ids[1].tolist()
    # its blocks call attention twice
    with (
        pytest.raises(WatchError, match=r"block block\.0 (calls|ran)"),
        looptap.watch(model.decoder, "block.*"),
    ):
        run(decoder_input_ids=ids)


# --- blocks and calls


class Calls(nn.Module):
    """Its forward is `run(blocks, x)`."""

    def __init__(self, run, count=3):
        super().__init__()
        self.blocks, self.run = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(count)), run

    def forward(self, x, **kwargs):
        return self.run(self.blocks, x)


def wrapped(change):
    """A block that is called with, or returns, something else."""

    def run(blocks, x):
        for block in blocks:
            x = block(change(x))
        return x

    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda blocks, x: x, r"a forward pass of Calls called none of the blocks blocks\.0, blocks\.1"),
        (lambda blocks, x: blocks[0].forward(x), "called none of the blocks .* calls as modules"),
        (wrapped(lambda x: x[None]), r"blocks\.0 is given a tensor \[1, 2, 5, 8\]: its residual"),
        (lambda blocks, x: blocks[1](F.pad(blocks[0](x), (0, 0, 0, 2))), r"\.1 is given \[2, 7, 8\] where"),
        (lambda blocks, x: blocks[1](blocks[0](x).bfloat16()), r"blocks\.1 is given .* in bfloat16 where"),
        (lambda blocks, x: blocks[0](blocks[1](blocks[0](x))), r"not one cycle.*: blocks\.0-1, blocks\.0"),
    ],
)
def test_calls_that_have_no_structure(run, message):
    module = Calls(run)
    if "bfloat16" in message:
        module.blocks[1].bfloat16()
    refused(module, lambda: module(torch.randn(2, 5, 8)), message, quantities="residual")


def test_types_that_are_not_measured():
    module = Calls(wrapped(lambda x: x)).double()
    x = torch.randn(2, 5, 8).double()
    refused(
        module,
        lambda: module(x),
        r"is given torch\.float64, .* run the module in float32",
        quantities="residual",
    )
    module = Calls(wrapped(lambda x: x)).float()
    module.blocks[1].register_forward_hook(lambda *_: {"x": 1})
    message = r"blocks\.1 returns a dict: its residual must be a tensor"
    refused(module, lambda: module(torch.randn(2, 5, 8)), message, quantities="residual")


def test_tuples_and_keywords_are_understood():
    """transformers' older blocks return tuples, and some are called by keyword."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, other, hidden_states):
            return self.inner(hidden_states), other

    module = Calls(lambda blocks, x: [x := block(torch.ones(3), hidden_states=x)[0] for block in blocks][-1])
    module.blocks = nn.ModuleList(Block() for _ in range(2))
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), looptap.watch(module, quantities="update_norm") as watched:
        module(x)
        wanted_BT = (module.blocks[0].inner(x) - x).norm(dim=-1)
    found_T = sequence_values(watched.dataset(), "update_norm", 1)[:, 0]
    torch.testing.assert_close(found_T, wanted_BT[1], atol=1e-5, rtol=1e-5)


def test_a_part_that_is_called_alone():
    model = tiny_llama()
    message = r"model\.layers\.0 was called, but not by a forward pass of LlamaForCausalLM: watch the module"
    refused(model, lambda: model.model(IDS), message, "model.layers.*")


def test_another_structure_later():
    """One that is refused adds nothing, and what was there stays."""
    module = make_looped()
    before = traces(module)
    with torch.no_grad(), looptap.watch(module) as watched:
        module(IDS)
        module.recurrences = 2
        calls = r"called prelude\.0, .*\(6 calls\), the first one .*\(8 calls\), \(1,2x3,1\)"
        with pytest.raises(WatchError, match=calls):
            module(IDS)
        module.recurrences = 3
        module(IDS)
    assert watched.num_sequences == 4 and traces(module) == before
    assert sorted(watched.dataset()["sequence_id"].values.tolist()) == [0, 1, 2, 3]


def test_another_width_later():
    module = Calls(wrapped(lambda x: x))
    with torch.no_grad(), looptap.watch(module, quantities="residual") as watched:
        module(torch.randn(1, 5, 8))
        module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        for index, block in enumerate(module.blocks):
            block.register_forward_pre_hook(lambda *_, i=index: watched._recorder.enter(i, _[1], {}))
        with pytest.raises(
            WatchError, match=r"is given \[1, 5, 4\] in float32 where other residuals are 8 wide"
        ):
            module(torch.randn(1, 5, 4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]), "row 0 of the attention mask has a hole: its 5 real"),
        (torch.ones(2, 5), r"attention_mask is \[2, 5\] and the blocks see 2 rows of 6 tokens"),
        (torch.ones(1, 6), r"attention_mask is \[1, 6\] and the blocks see 2 rows"),
        (torch.ones(2, 9), r"attention_mask is \[2, 9\] where 0 tokens are cached and 6 new"),
        (
            torch.zeros(2, 6).masked_fill(SEEN[:2], float("-inf")),
            r"attention_mask \[2, 6\] holds other values",
        ),
    ],
)
def test_masks_that_say_nothing_clear(mask, message):
    module = make_looped()
    refused(module, lambda: module(IDS, attention_mask=mask), message)


def test_a_mask_of_no_rows():
    with looptap.watch(make_looped()) as watched, pytest.raises(WatchError, match=r"not \[1, 1, 2, 2\]"):
        watched.set_mask(torch.ones(1, 1, 2, 2))


# --- caches


def decode(model, change, message, prompt=IDS + 1, **first):
    """A prompt, then something done to its cache, then one more token, which is refused."""
    from transformers import DynamicCache

    before = traces(model)
    with torch.no_grad(), looptap.watch(model, "model.layers.*") as watched:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, **first)
        next_ids, more = change(cache) or (torch.ones(len(prompt), 1, dtype=torch.long), {})
        with pytest.raises(WatchError, match=message):
            model(next_ids, past_key_values=cache, **more)
        assert watched.num_sequences == len(prompt)
    assert traces(model) == before
    lengths = watched.dataset()["sequence_length"].values
    assert sorted(lengths[lengths > 0].tolist()) == sorted(
        first["attention_mask"].sum(-1).tolist() if first else [6, 6]
    )


def other_rows(cache):
    cache.batch_select_indices(torch.tensor([0]))
    return torch.ones(1, 1, dtype=torch.long), {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), "holds other keys .*beam search"),
        (lambda cache: cache.crop(-2), "sees 4 earlier tokens of 2 rows, .* left 2 rows of 6: .*cropped"),
        (other_rows, "sees 6 earlier tokens of 1 rows, .* left 2 rows of 6"),
        (lambda cache: cache.layers[1].keys.mul_(1.01) is None, "its cache holds other keys .*edited"),
    ],
)
def test_caches_that_changed(change, message):
    decode(tiny_llama(), lambda cache: change(cache) or None, message)


def test_padding_between_a_prompt_and_what_follows():
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    following = torch.ones(2, 1, dtype=torch.long), {"attention_mask": longer}
    message = "row 1 has padding between its earlier tokens and the new ones: pad prompts on the left"
    decode(tiny_llama(), lambda _: following, message, attention_mask=mask)


def test_a_mask_that_changed_its_mind():
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    following = torch.ones(2, 1, dtype=torch.long), {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    decode(tiny_llama(), lambda _: following, "other cached tokens real", attention_mask=mask)


def test_a_cache_from_before_and_a_static_one():
    from transformers import DynamicCache, StaticCache

    model = tiny_llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    message = "sees 6 earlier tokens of 2 rows, .* left none: a cache that was filled outside the context"
    refused(model, lambda: model(IDS[:, :1], past_key_values=cache), message, "model.layers.*")
    static = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 0] = 0  # makes transformers hand over the whole cache
    run = partial(model, IDS, attention_mask=mask, past_key_values=static)
    refused(model, run, "sees 14 earlier tokens .*static", "model.layers.*")


def test_beam_search_and_a_sliding_cache():
    model = tiny_llama()
    run = partial(model.generate, IDS[:1], num_beams=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    message = "its cache holds other keys .*beam search"
    with pytest.raises(WatchError, match=message), looptap.watch(model, "model.layers.*"):
        run()
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=5)
    config._attn_implementation = "sdpa"
    sliding = MistralForCausalLM(config).eval()
    message = "sees 4 earlier tokens of 1 rows, .* left 1 rows of 5: .*sliding"
    with pytest.raises(WatchError, match=message), looptap.watch(sliding, "model.layers.*"):
        sliding.generate(IDS[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_recurrences_that_share_a_cache():
    """transformers keeps two keys for every token then, which shows when the cache is used."""
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 2)
    model.config.num_hidden_layers = 2
    decode(model, lambda _: None, "sees 12 earlier tokens of 2 rows, .* left 2 rows of 6")


# --- nothing is left behind


def failing(module, where):
    """Raises in a block, between blocks, or in a hook of somebody else."""

    def stop(*_):
        raise Stop

    place = {"block": module.core[1].q, "between": module.adapter, "after": module.head}[where]
    return place.register_forward_pre_hook(stop)


@pytest.mark.parametrize("where", ["block", "between", "after"])
def test_the_model_raises(where):
    """The pass that raised is forgotten, and the next one is whole."""
    module = make_looped()
    handle = failing(module, where)
    before = traces(module)
    with pytest.raises(Stop), looptap.watch(module):
        module(IDS)
    assert traces(module) == before
    with torch.no_grad(), looptap.watch(module) as watched:
        with pytest.raises(Stop):
            module(IDS)
        q = torch.randn(1, 1, 3, 4)
        for _ in range(2):  # a call that no block makes
            scaled_dot_product_attention(q, q, q)
        handle.remove()
        module(IDS)
    assert watched.num_sequences == 2
    with torch.no_grad(), looptap.watch(module) as alone:
        module(IDS)
    np.testing.assert_array_equal(watched.dataset()["gap_norm"], alone.dataset()["gap_norm"])


def test_a_pass_inside_an_exception_handler():
    """What is being handled anyway does not make a pass look failed."""
    module = make_looped()
    with looptap.watch(module) as watched:
        try:
            raise Stop
        except Stop:
            module(IDS)
            handle = failing(module, "after")
            with pytest.raises(Stop):
                module(IDS)
            handle.remove()
    assert watched.num_sequences == 2


def test_an_aborted_step_leaves_its_rows_as_they_were():
    model = tiny_llama()
    from transformers import DynamicCache

    with torch.no_grad(), looptap.watch(model, "model.layers.*") as watched:
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        handle = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            model(IDS[:, :1], past_key_values=cache)
        handle.remove()
        # the cache holds a token that was never recorded
        with pytest.raises(WatchError, match=r"sees 7 earlier tokens of 2 rows, .* left 2 rows of 6"):
            model(IDS[:, :1], past_key_values=cache)
    assert watched.dataset()["sequence_length"].values.tolist() == [6, 6]


def test_the_body_raises_or_leaves():
    module = make_looped()
    before = traces(module)
    with pytest.raises(Stop), looptap.watch(module) as watched:
        module(IDS)
        raise Stop
    assert traces(module) == before
    assert watched.num_sequences == 2 and watched.dataset().sizes["depth"] == 8
    module(IDS)
    assert watched.num_sequences == 2
    attend = module.core[0].attend
    with looptap.watch(module) as watched:
        module.core[0].attend = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            module(IDS)
        module.core[0].attend = attend
        module(IDS)
    assert traces(module) == before and watched.num_sequences == 2


def test_a_store_is_not_written_when_the_body_raises(tmp_path):
    module = make_looped()
    with pytest.raises(Stop), looptap.watch(module, store=tmp_path / "run.zarr"):
        module(IDS)
        raise Stop
    assert not (tmp_path / "run.zarr").exists()


def test_two_contexts_at_once():
    """One inside the other, over the same blocks and over others."""
    module = make_looped()
    before = traces(module)
    with torch.no_grad(), looptap.watch(module) as outer:
        module(IDS)
        with looptap.watch(module, "core.*", sink_tokens=2) as inner:
            module(IDS + 20)
        module(IDS)
    assert (outer.num_sequences, inner.num_sequences) == (6, 2)
    assert (outer.notation, inner.notation) == ("(1,2x3,1)", "(0,2x3,0)")
    found, wanted = inner.dataset(), outer.dataset()
    for row in range(2):
        got = sequence_values(found, "attention_entropy", row)
        due = sequence_values(wanted, "attention_entropy", row + 2)[:, 1:7]
        assert torch.equal(got, due)
    assert traces(module) == before


def test_gradient_checkpointing():
    """Backward calls the blocks again, outside a forward pass."""
    from torch.utils.checkpoint import checkpoint

    module = Calls(lambda blocks, x: [x := checkpoint(block, x, use_reentrant=False) for block in blocks][-1])
    with looptap.watch(module, quantities="residual"):
        output = module(torch.randn(1, 3, 8, requires_grad=True))
        with pytest.raises(WatchError, match="gradient checkpointing"):
            output.sum().backward()


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
@pytest.mark.parametrize("is_compiled_before", [False, True])
@pytest.mark.slow
def test_a_function_compiled_around_the_module(is_compiled_before):
    """torch.compile steps aside for hooks: what it calls is measured as it runs."""
    module = make_looped()
    run = torch.compile(lambda ids: module(ids), backend="eager")
    with torch.no_grad():
        plain = run(IDS) if is_compiled_before else module(IDS)
        with looptap.watch(module) as watched:
            assert torch.equal(run(IDS), plain)
        with looptap.watch(module) as alone:
            module(IDS)
    torch.compiler.reset()
    found, wanted = watched.dataset(), alone.dataset()
    for name in wanted.data_vars:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.slow
def test_watching_loads_no_transformers():
    code = "import looptap, sys; looptap.watch; print('loaded:', *({'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loaded:"
