"""Descriptions, random weights, checkpoints; the forward pass against one written from the papers' words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from looptap.capture.models.description import Block, Description, Llama3Scaling, Rotary, Step
from looptap.capture.models.load import find_model, load_model
from looptap.capture.models.model import LoopedModel
from looptap.capture.models.random import parse_random
from looptap.capture.models.tap import Packed, Plain
from looptap.capture.tap import Buffers, Statistics

LLAMA = Path(__file__).parent / "golden" / "llama"
LENGTHS = (9, 1, 9, 17)  # a run of equal ones apart, a lone token, nothing round


def describe(**changes) -> Description:
    """A small model; heads, key heads and widths all differ, so that no two axes can be swapped unseen."""
    fields = {
        "prelude": 1, "core": 2, "recurrences": 3, "coda": 1,
        "width": 24, "num_heads": 4, "num_kv_heads": 2, "head_width": 10, "mlp_width": 40,
        "vocab_size": 50, "max_positions": 64, "block": Block(),
    }  # fmt: skip
    return Description(**{**fields, **changes})


def fill(model: LoopedModel, seed: int = 0) -> LoopedModel:
    """Random weights, norms included, so that a norm with another's weight shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim == 1:
            parameter.mul_(0.25).add_(1)
        elif name != "embedding":
            parameter.mul_(parameter.shape[1] ** -0.5)
    return model


def random_ids(vocab_size: int, lengths=LENGTHS) -> Packed:
    generator = torch.Generator().manual_seed(5)
    return Packed(torch.randint(vocab_size, (sum(lengths),), generator=generator), tuple(lengths))


class Listening(Plain):
    """Keeps every residual and loop state, with the address it came under."""

    def __init__(self):
        self.residuals, self.loop_states = {}, {}

    def residual(self, step, half, x_ND, branch_ND, norms):
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "mlp":
            assert step not in self.residuals
            self.residuals[step] = result.residual_ND
        return result

    def loop_state(self, recurrence, state_ND):
        self.loop_states[recurrence] = state_ND


class Straight:
    """One sequence's forward pass as the papers word it: the oracle in float64, plain torch in bfloat16."""

    def __init__(self, model: LoopedModel, dtype=torch.float64):
        self.d, self.dtype = model.description, dtype
        self.weights = {name: p.to(dtype) for name, p in model.named_parameters()}
        self.residuals: list[torch.Tensor] = []

    def rms(self, x, weight):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (wide / (wide.square().mean(-1, keepdim=True) + self.d.block.eps).sqrt()).to(x.dtype)

    def rotated(self, x_HTC):
        """Every pair of channels is a complex number, turned by position · frequency."""
        rotary, C = self.d.block.rotary, x_HTC.shape[-1]
        frequencies = []
        for j in range(C // 2):
            f = rotary.theta ** (-2 * j / C)
            if (s := rotary.scaling) is not None:
                wavelength = 2 * torch.pi / f
                low, high = (s.original_max_positions / x for x in (s.low_freq_factor, s.high_freq_factor))
                if wavelength > low:
                    f = f / s.factor
                elif wavelength >= high:
                    span = s.high_freq_factor - s.low_freq_factor
                    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / span
                    f = (1 - smooth) * f / s.factor + smooth * f
            frequencies.append(f)
        wide = x_HTC.to(torch.promote_types(x_HTC.dtype, torch.float32))
        position = torch.arange(x_HTC.shape[1], dtype=wide.dtype)
        angle = position.outer(torch.tensor(frequencies, dtype=wide.dtype))
        first, second = (
            (wide[..., 0::2], wide[..., 1::2]) if rotary.interleaved else wide.split(C // 2, dim=-1)
        )
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        pairs = (turned.real, turned.imag)
        whole = torch.stack(pairs, -1).flatten(-2) if rotary.interleaved else torch.cat(pairs, -1)
        return whole.to(x_HTC.dtype)

    def attention(self, x, name):
        d, T = self.d, len(x)
        H, K, C = d.num_heads, d.num_kv_heads, d.head_width
        q, k, v = (x @ self.weights[f"{name}.qkv"].T).split([H * C, K * C, K * C], dim=-1)
        if d.block.qk_norm:
            q = self.rms(q, self.weights[f"{name}.q_norm"])
            k = self.rms(k, self.weights[f"{name}.k_norm"])
        q, k, v = (part.view(T, -1, C).transpose(0, 1) for part in (q, k, v))
        q, k = self.rotated(q), self.rotated(k)
        heads = []
        for h in range(H):
            group = h // (H // K)
            scores = q[h] @ k[group].T / C**0.5
            scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[group])
        return torch.cat(heads, dim=-1) @ self.weights[f"{name}.attention_out"].T

    def mlp(self, x, name):
        gate, up = self.weights[f"{name}.gate_up"].split(self.d.mlp_width)
        return (F.silu(x @ gate.T) * (x @ up.T)) @ self.weights[f"{name}.mlp_out"].T

    def block(self, x, index):
        name, rms = f"blocks.{index}", self.rms
        norm = {
            key: self.weights.get(f"{name}.{key}_norm")
            for half in ("attention", "mlp")
            for key in (f"{half}_branch_input", f"{half}_branch_output", f"{half}_stream")
        }
        for half, branch in (("attention", self.attention), ("mlp", self.mlp)):
            before, after, stream = (
                norm[f"{half}_{place}"] for place in ("branch_input", "branch_output", "stream")
            )
            match self.d.block.norm:
                case "pre":
                    x = x + branch(rms(x, before), name)
                case "ouro":
                    x = x + rms(branch(rms(x, before), name), after)
                case "huginn":
                    x = rms(x + branch(rms(x, before), name), stream)
                case "olmo2":
                    x = x + rms(branch(x, name), after)
        self.residuals.append(x)
        return x

    def __call__(self, ids_T, initial_TD=None):
        """Logits."""
        d, final = self.d, self.weights["final_norm"]
        x = self.weights["embedding"][ids_T] * d.embedding_scale
        for layer in range(d.prelude):
            x = self.block(x, layer)
        state = x if initial_TD is None else initial_TD.to(self.dtype)
        for _ in range(d.recurrences):
            if d.injection:
                state = torch.cat([state, x], dim=-1) @ self.weights["adapter"].T
            for layer in range(d.core):
                state = self.block(state, d.prelude + layer)
            if d.block.norm == "ouro":
                state = self.rms(state, final)
        if d.block.norm == "huginn":
            state = self.rms(state, final)
        for layer in range(d.coda):
            state = self.block(state, d.prelude + d.core + layer)
        if d.block.norm != "ouro":
            state = self.rms(state, final)
        return state @ self.weights["embedding" if d.tied_head else "head"].T * d.logit_scale


WIRINGS = {
    "pre": describe(block=Block(norm="pre", eps=1e-5)),
    "ouro": describe(block=Block(norm="ouro"), prelude=0, coda=0, recurrence_end="norm"),
    "huginn": describe(
        block=Block(norm="huginn", rotary=Rotary(theta=50.0, interleaved=True)),
        norm_before_coda=True,
        embedding_scale=24**0.5,
        tied_head=True,
    ),
    "olmo2": describe(block=Block(norm="olmo2", qk_norm=True), logit_scale=0.3),
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
}


def initial_state(d: Description, num_tokens: int) -> torch.Tensor | None:
    if d.initial_state == "prelude":
        return None
    return torch.randn(num_tokens, d.width, generator=torch.Generator().manual_seed(9))


def with_injection(d: Description) -> Description:
    return replace(d, injection="linear", initial_state="normal")


@pytest.mark.parametrize("injection", [False, True], ids=["none", "injection"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_forward_matches_the_papers_words(wiring, injection):
    d = with_injection(WIRINGS[wiring]) if injection else WIRINGS[wiring]
    model, batch = fill(LoopedModel(d)), random_ids(d.vocab_size)
    initial_ND = initial_state(d, sum(LENGTHS))
    tap = Listening()
    with torch.inference_mode():
        logits = model.logits(model(batch, tap, initial_ND))
    assert list(tap.residuals) == list(d.steps()), "blocks ran in another order, or under other addresses"
    assert list(tap.loop_states) == list(range(d.recurrences))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for start, length in zip(starts, LENGTHS, strict=False):
        rows = slice(start, start + length)
        straight = Straight(model)
        wanted = straight(batch.token_id_N[rows], None if initial_ND is None else initial_ND[rows])
        for got, right in zip(tap.residuals.values(), straight.residuals, strict=True):
            torch.testing.assert_close(got[rows].double(), right, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(logits[rows].double(), wanted, atol=5e-5, rtol=2e-5)


def test_loop_states_follow_the_rule_that_ends_a_recurrence():
    """Ouro's are normed, and the last of them is what the head reads; pre-norm's are the bare residual."""
    for wiring, is_normed in (("ouro", True), ("pre", False)):
        model, tap = fill(LoopedModel(WIRINGS[wiring])), Listening()
        d = model.description
        with torch.inference_mode():
            head_input = model(random_ids(d.vocab_size), tap)
        last = Step(d.prelude + d.core * d.recurrences - 1, "core", d.core - 1, d.recurrences - 1)
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
        (0, "prelude", 0, -1),
        (1, "core", 0, 0),
        (2, "core", 1, 0),
        (3, "core", 0, 1),
        (4, "core", 1, 1),
        (5, "coda", 0, -1),
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


def write_checkpoint(directory: Path, tensors: dict, *, num_shards: int = 1, **config) -> Path:
    directory.mkdir()
    fields = json.loads((LLAMA / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, **config}))
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(num_shards):
        part = dict(list(tensors.items())[shard::num_shards])  # q, k and v of a layer come apart
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def logits_of(path: Path, **how) -> torch.Tensor:
    model = load_model(str(path), **how)
    with torch.inference_mode():
        return model.logits(model(random_ids(256)))


def test_every_layout_of_a_checkpoint_gives_the_same_logits(tmp_path):
    tied = load_file(LLAMA / "model.safetensors")
    untied = tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    wanted = logits_of(LLAMA)
    assert wanted.std() > 0
    paths = [
        write_checkpoint(tmp_path / "single", tied),
        write_checkpoint(tmp_path / "sharded", tied, num_shards=3),
        write_checkpoint(tmp_path / "untied", untied, tie_word_embeddings=False),
        write_checkpoint(tmp_path / "both", untied, num_shards=2, tie_word_embeddings=False),
    ]
    for path in paths:
        assert torch.equal(logits_of(path), wanted), path.name
    untied["lm_head.weight"] += 1
    other = write_checkpoint(tmp_path / "other-head", untied, tie_word_embeddings=False)
    assert not torch.equal(logits_of(other), wanted), "the head in the files is not read"


def test_new_and_old_rotary_fields_mean_the_same(tmp_path):
    fields = json.loads((LLAMA / "config.json").read_text())
    new = {"rope_parameters": {**fields["rope_scaling"], "rope_theta": fields["rope_theta"]}}
    path = write_checkpoint(tmp_path / "new", load_file(LLAMA / "model.safetensors"), **new)
    config = {k: v for k, v in {**fields, **new}.items() if k not in ("rope_scaling", "rope_theta")}
    (path / "config.json").write_text(json.dumps(config))
    assert find_model(str(path)).description == find_model(str(LLAMA)).description


def test_bfloat16_files(tmp_path):
    rounded = {name: t.bfloat16() for name, t in load_file(LLAMA / "model.safetensors").items()}
    path = write_checkpoint(tmp_path / "bf16", rounded)
    exact = write_checkpoint(tmp_path / "f32", {name: t.float() for name, t in rounded.items()})
    model = load_model(str(path))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.embedding, rounded["model.embed_tokens.weight"])
    k_proj = rounded["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(model.blocks[2].qkv[64:80], k_proj), "k's rows follow q's 8 heads of 8"
    assert torch.equal(logits_of(path, dtype="float32"), logits_of(exact))
    assert torch.equal(logits_of(path), logits_of(exact, dtype="bfloat16"))
