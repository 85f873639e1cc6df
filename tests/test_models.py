"""Descriptions and random weights; the forward pass against one written from the papers' words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from looptap.capture.models.description import Block, Llama3Scaling, Rotary
from looptap.capture.models.exit_gate import exit_probability
from looptap.capture.models.load import load_model
from looptap.capture.models.loop_schedule import prelude_core_coda
from looptap.capture.models.model import LoopedModel
from looptap.capture.models.random_spec import parse_random
from looptap.capture.models.tap import Packed
from looptap.capture.taps.statistics import Buffers, Statistics
from looptap.tests.oracle import LENGTHS, Listening, Straight, describe, fill, initial_state, random_ids

LLAMA = Path(__file__).parent / "golden" / "llama"

WIRINGS = {
    "pre": describe(block=Block(norm="pre", eps=1e-5)),
    "ouro": describe(block=Block(norm="ouro"), prelude=0, coda=0, recurrence_end="norm", exit_gate=True),
    "huginn": describe(
        block=Block(norm="huginn", bias="qk", rotary=Rotary(theta=50.0, interleaved=True)),
        num_kv_heads=4,
        norm_before_coda=True,
        embedding_scale=24**0.5,
        tied_head=True,
    ),
    "olmo2": describe(block=Block(norm="olmo2", qk_norm="all_heads"), logit_scale=0.3),
    "llama3": describe(
        block=Block(
            rotary=Rotary(
                theta=100.0,
                scaling=Llama3Scaling(
                    factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=64
                ),
            )
        )
    ),
    "qwen2": describe(block=Block(bias="qkv")),
    "qwen3": describe(block=Block(qk_norm="each_head")),
}
# prelude, core, recurrences, coda; heads, key heads, head width
SHAPES = {
    "one layer": (0, 1, 1, 0, 1, 1, 2),
    "three layers, one key head": (0, 3, 4, 0, 4, 1, 8),
    "odd heads": (1, 1, 2, 1, 3, 3, 6),
    "odd groups": (3, 1, 5, 0, 9, 3, 4),
    "no prelude, long coda": (0, 1, 2, 3, 5, 1, 12),
    "uneven": (1, 3, 2, 2, 6, 2, 10),
}


def with_injection(d):
    return replace(d, injection="linear", initial_state="truncated")


def resized(d, shape):
    """The wiring in other sizes; Huginn's bias needs a key head for every query head, Ouro has no ends."""
    prelude, core, recurrences, coda, H, K, C = shape
    if d.block.norm == "ouro":
        prelude = coda = 0
    return replace(
        d, phases=prelude_core_coda(prelude, core, recurrences, coda), width=26, mlp_width=18,
        num_heads=H, num_kv_heads=H if d.block.bias == "qk" else K, head_width=C,
    )  # fmt: skip


@pytest.mark.parametrize("injection", [False, True], ids=["none", "injection"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_forward_matches_the_papers_words(wiring, injection):
    assert_matches(with_injection(WIRINGS[wiring]) if injection else WIRINGS[wiring])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_forward_in_other_sizes(wiring, shape):
    d = resized(WIRINGS[wiring], SHAPES[shape])
    assert_matches(d if wiring == "ouro" else with_injection(d))


def assert_matches(d):
    """Every residual and logit, and the exit gate, against the oracle in float64."""
    model, batch = fill(LoopedModel(d)), random_ids(d.vocab_size)
    initial_ND = initial_state(d, sum(LENGTHS))
    tap = Listening()
    with torch.inference_mode():
        logits = model.logits(model(batch, tap, initial_ND))
        gates = [model.exit_gate_logits(s) for s in tap.loop_states.values()] if d.exit_gate else []
    assert list(tap.residuals) == list(d.steps()), "blocks ran in another order, or under other addresses"
    assert list(tap.loop_states) == list(range(d.recurrences))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for start, length in zip(starts, LENGTHS, strict=False):
        rows = slice(start, start + length)
        straight = Straight(model)
        wanted = straight(batch.token_id_N[rows], None if initial_ND is None else initial_ND[rows])
        for got, right in zip(tap.residuals.values(), straight.residuals, strict=True):
            torch.testing.assert_close(got[rows].double(), right, atol=5e-5, rtol=2e-5)
        for got, right in zip(gates, straight.gate_logits, strict=True):
            torch.testing.assert_close(got[rows].double(), right, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(logits[rows].double(), wanted, atol=5e-5, rtol=2e-5)


def test_exit_probability_is_that_of_a_chain_of_choices():
    """Against the definition in float64; a confident gate, a doubtful one and one that never leaves."""
    gate_logits = torch.tensor([[40.0, -40.0, 0.3, 12.0], [1.0, -30.0, -2.0, 11.0], [5.0, -8.0, 0.0, 9.0]])
    found = exit_probability(gate_logits)
    wanted, left = [], torch.ones(4, dtype=torch.float64)
    for gate in gate_logits[:-1].double():
        wanted.append(left / (1 + (-gate).exp()))
        left = left / (1 + gate.exp())
    torch.testing.assert_close(found.double(), torch.stack([*wanted, left]), atol=0, rtol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(4), atol=1e-6, rtol=0)
    assert torch.equal(exit_probability(gate_logits[:1]), torch.ones(1, 4)), "one recurrence: it takes all"
    halves = exit_probability(gate_logits.bfloat16())
    assert halves.dtype == torch.float32
    assert halves[-1, 3] > 0, "in bfloat16 the cumulative sum is 1 before the last recurrence"


def test_loop_states_follow_the_rule_that_ends_a_recurrence():
    """Ouro's are normed, and the last of them is what the head reads; pre-norm's are the bare residual."""
    for wiring, is_normed in (("ouro", True), ("pre", False)):
        model, tap = fill(LoopedModel(WIRINGS[wiring])), Listening()
        d = model.description
        with torch.inference_mode():
            head_input = model(random_ids(d.vocab_size), tap)
        last = next(step for step in d.steps() if step.depth == d.depth - d.coda - 1)
        bare = tap.residuals[last]
        rms = bare / (bare.square().mean(-1, keepdim=True) + d.block.eps).sqrt() * model.final_norm
        state = tap.loop_states[d.recurrences - 1]
        torch.testing.assert_close(state, rms if is_normed else bare, atol=1e-5, rtol=0)
        assert torch.equal(head_input, state) == is_normed


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_packed_sequence_equals_itself_alone(wiring):
    d = with_injection(WIRINGS[wiring])
    model, batch = fill(LoopedModel(d)), random_ids(d.vocab_size)
    initial_ND = initial_state(d, sum(LENGTHS))
    with torch.inference_mode():
        packed = model(batch, initial_state_ND=initial_ND).split(LENGTHS)
        for got, ids, initial in zip(
            packed, batch.token_id_N.split(LENGTHS), initial_ND.split(LENGTHS), strict=True
        ):
            alone = model(Packed(ids, (len(ids),)), initial_state_ND=initial)
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_tap_changes_nothing(wiring):
    d = WIRINGS[wiring]
    model, batch = fill(LoopedModel(d)), random_ids(d.vocab_size)
    N = sum(LENGTHS)
    values = {
        "residual_norm": torch.empty(d.depth, N),
        "gap_norm": torch.empty(d.depth, N),
        "attention_entropy": torch.empty(d.depth, N, d.num_heads),
    }
    with torch.inference_mode():
        plain = model(batch)
        tapped = model(batch, Statistics(d, Buffers(values)))
    torch.testing.assert_close(tapped, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_bfloat16_errs_no_more_than_plain_torch(wiring):
    """Both from the same rounded weights; one long sequence, because a few tokens would compare luck."""
    d = with_injection(WIRINGS[wiring])
    model = fill(LoopedModel(d)).bfloat16()
    batch = random_ids(d.vocab_size, (60,))
    initial_ND = initial_state(d, 60).bfloat16()
    wanted = Straight(model)(batch.token_id_N, initial_ND)
    with torch.inference_mode():
        got = model.logits(model(batch, initial_state_ND=initial_ND))
    plain = Straight(model, torch.bfloat16)(batch.token_id_N, initial_ND)
    assert got.dtype == torch.bfloat16
    error, allowed = ((x.double() - wanted).square().mean().sqrt() for x in (got, plain))
    assert error <= 2 * allowed
    assert error < 0.1 * wanted.square().mean().sqrt()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wiring", WIRINGS)
def test_cuda_equals_cpu(wiring):
    d = with_injection(WIRINGS[wiring])
    model, batch = fill(LoopedModel(d)), random_ids(d.vocab_size)
    initial_ND = initial_state(d, sum(LENGTHS))
    with torch.inference_mode():
        wanted = model.logits(model(batch, initial_state_ND=initial_ND))
        on_gpu = Packed(batch.token_id_N.cuda(), batch.lengths)
        model = model.cuda()
        got = model.logits(model(on_gpu, initial_state_ND=initial_ND.cuda())).cpu()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_description_counts_and_steps():
    d = describe(prelude=1, core=2, recurrences=2, coda=1)
    assert (d.num_blocks, d.depth, d.notation) == (4, 6, "(1,2x2,1)")
    assert with_injection(d).notation == "(1,2x2,1)I"
    assert [tuple(step) for step in d.steps()] == [
        (0, 0, "prelude", 0, -1),
        (1, 1, "core", 0, 0),
        (2, 2, "core", 1, 0),
        (3, 1, "core", 0, 1),
        (4, 2, "core", 1, 1),
        (5, 3, "coda", 0, -1),
    ]
    longer = d.with_recurrences(7)
    assert (longer.depth, longer.num_blocks) == (16, 4)
    assert len(list(longer.steps())) == 16


def test_with_loop_keeps_every_layer_in_its_place():
    d = describe(prelude=6, core=0, recurrences=0, coda=0)
    assert d.with_loop(2, 4, 5).notation == "(2,3x5,1)"
    assert d.with_loop(0, 5, 1).notation == "(0,6x1,0)"
    # a feedforward model may have been written with a coda; its layers count on
    assert describe(prelude=3, core=0, recurrences=0, coda=2).with_loop(1, 3, 2).notation == "(1,3x2,1)"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: describe(core=0), "core of 0 layers cannot run 3 times"),
        (lambda: describe(recurrences=0), "core of 2 layers cannot run 0 times"),
        (lambda: describe(prelude=0, core=0, recurrences=0, coda=0), "no layers"),
        (lambda: describe(num_kv_heads=3), "4 query heads cannot share 3"),
        (lambda: describe(head_width=9), "even head width, got 9"),
        (lambda: describe(core=0, recurrences=0, injection="linear"), "no core"),
        (lambda: describe(core=0, recurrences=0, exit_gate=True), "exit gate and no loop"),
        (lambda: Block(norm="post"), "'post' is not known; choose one of pre, ouro, huginn, olmo2"),
        (lambda: describe().with_recurrences(0), "at least 1, got 0"),
        (lambda: describe(core=0, recurrences=0).with_recurrences(3), "no core to repeat.*--loop"),
        (lambda: describe().with_loop(0, 0, 2), "looped already"),
        (lambda: describe(prelude=5, core=0, recurrences=0, coda=0).with_loop(3, 5, 2), "0 to 4"),
        (lambda: describe(prelude=5, core=0, recurrences=0, coda=0).with_loop(3, 2, 2), "layers 3-2"),
        (lambda: describe(prelude=5, core=0, recurrences=0, coda=0).with_loop(1, 2, 0), "at least 1, got 0"),
        (lambda: parse_random("random:(4,0,0)I"), "no core"),
    ],
)
def test_impossible_descriptions_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_random_weights_are_drawn_as_documented():
    model = load_model("random:(1,2x3,1)I,norm=huginn,width=192,heads=4,gain=0.5,embedding_std=2")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        std = 2.0 if name == "embedding" else 0.5 / 192**0.5
        wanted = parameter.numel() ** -0.5  # one standard error of the mean, in units of std
        assert abs(parameter.mean()) < 5 * wanted * std, name
        assert abs(parameter.std() / std - 1) < 5 * wanted, name
    assert model.embedding.shape == (256, 192), "tokens are bytes"
    assert model.blocks[0].gate_up.shape == (8 * 192, 192)
    default = load_model("random:(2,0,0),width=64")
    assert abs(default.embedding.std() - 1) < 0.03
    assert abs(default.head.std() * 64**0.5 - 0.32) < 0.01


def test_random_seed_decides_the_weights():
    def weights(options):
        return load_model(f"random:(0,2x3,0)I,width=32,heads=2{options}").state_dict()

    first, again, other = weights(",seed=1"), weights(",seed=1"), weights(",seed=2")
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert value.ndim == 1 or not torch.equal(value, other[name])
    identity = [parse_random(f"random:(0,2x3,0),width=32,seed={s}").weights_sha256 for s in (1, 1, 2)]
    assert identity[0] == identity[1] != identity[2]


# the places of DESIGN's norm kinds: on the branch's input, on its output, on the stream after the add
@pytest.mark.parametrize(
    ("norm", "places"),
    [
        ("pre", {"branch_input"}),
        ("ouro", {"branch_input", "branch_output"}),
        ("huginn", {"branch_input", "stream"}),
        ("olmo2", {"branch_output"}),
    ],
)
def test_random_norms_stand_where_the_kind_says(norm, places):
    model = load_model(f"random:(1,2x2,1)I,norm={norm},width=32,heads=2")
    names = {name for name, _ in model.blocks[0].named_parameters() if name.endswith("norm")}
    assert names == {f"{half}_{place}_norm" for half in ("attention", "mlp") for place in places}
    d = model.description
    assert (d.recurrence_end == "norm") == (norm == "ouro")
    assert d.norm_before_coda == (norm == "huginn")


def test_a_looped_window_equals_its_layers_by_hand():
    plain, looped = load_model(str(LLAMA)), load_model(str(LLAMA), loop="1-3x4")
    batch = random_ids(256)
    tap = Listening()
    with torch.inference_mode():
        logits = looped.logits(looped(batch, tap))
    assert looped.description.notation == "(1,3x4,1)"
    rows = slice(10, 19)  # the third of LENGTHS
    straight = Straight(plain)
    x = straight.weights["embedding"][batch.token_id_N[rows]]
    for layer in (0, *[1, 2, 3] * 4, 4):
        x = straight.block(x, layer)
    for got, wanted in zip(tap.residuals.values(), straight.residuals, strict=True):
        torch.testing.assert_close(got[rows].double(), wanted, atol=2e-5, rtol=2e-5)
    wanted = straight.rms(x, straight.weights["final_norm"]) @ straight.weights["embedding"].T
    torch.testing.assert_close(logits[rows].double(), wanted, atol=2e-5, rtol=2e-5)


def test_a_window_looped_once_is_the_plain_model_to_the_bit():
    batch = random_ids(256)
    with torch.inference_mode():
        for loop in ("0-4x1", "2-3x1"):
            assert torch.equal(load_model(str(LLAMA), loop=loop)(batch), load_model(str(LLAMA))(batch))
