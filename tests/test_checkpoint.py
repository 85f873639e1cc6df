"""Checkpoint files: every layout read alike, every damage named, every family told from the others."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from looptap.capture.models.config import Config
from looptap.capture.models.families import FAMILIES
from looptap.capture.models.load import find_model, load_model
from looptap.capture.models.model import LoopedModel
from looptap.errors import ModelError
from looptap.tests.golden_files import (
    GOLDEN,
    NAMES,
    RAVEN,
    batch_of,
    config_of,
    copy_model,
    copy_whole,
    weights_of,
    write_shards,
)


def logits_of(path, name: str, **how) -> torch.Tensor:
    batch, _, initial_ND = batch_of(name)
    model = load_model(str(path), **how)
    with torch.inference_mode():
        return model.logits(model(batch, initial_state_ND=initial_ND))


@pytest.mark.parametrize("name", NAMES)
def test_shards_and_dtypes_give_the_same_logits(tmp_path, name):
    """One file or three shards; bfloat16 files in float32, and float32 files in bfloat16."""
    weights, paths = weights_of(name), {}
    for label in ("bf16", "f32"):
        tensors = {
            # a rotary table stays as exact as it is
            key: tensor
            if key == "freqs_cis"
            else tensor.bfloat16()
            if label == "bf16"
            else tensor.bfloat16().float()
            for key, tensor in weights.items()
        }
        for num_shards in (1, 3):
            paths[label, num_shards] = path = tmp_path / f"{label}-{num_shards}"
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config_of(name)))
            if num_shards == 1:
                save_file(tensors, path / "model.safetensors")
            else:  # q, k and v of a layer come apart
                files = {key: f"model-{i % num_shards}.safetensors" for i, key in enumerate(tensors)}
                write_shards(path, tensors, files)
    assert load_model(str(paths["bf16", 1])).dtype == torch.bfloat16
    for dtype in ("float32", "bfloat16"):
        first, *others = (logits_of(path, name, dtype=dtype) for path in paths.values())
        assert first.std() > 0 and all(torch.equal(first, other) for other in others)


def test_rows_of_the_files_are_rows_of_the_parameters():
    weights, model = weights_of("llama"), load_model(str(GOLDEN / "llama"))
    layer = "model.layers.2.self_attn."
    for name, rows in (("q", slice(0, 64)), ("k", slice(64, 80)), ("v", slice(80, 96))):
        assert torch.equal(model.blocks[2].qkv[rows], weights[f"{layer}{name}_proj.weight"])
    weights, model = weights_of("huginn"), load_model(str(GOLDEN / "huginn"))
    bias = weights["transformer.core_block.1.attn.qk_bias"]
    assert torch.equal(model.blocks[3].bias, torch.cat([bias[0].flatten(), bias[1].flatten()]))


def test_the_hash_is_that_of_the_files():
    for name in ("huginn", "retro-llama32"):
        wanted = hashlib.sha256()
        for path in sorted((GOLDEN / name).glob("model*.safetensors")):
            wanted.update(hashlib.sha256(path.read_bytes()).digest())
        assert find_model(str(GOLDEN / name)).origin.weights_sha256 == wanted.hexdigest()


def test_new_and_old_rotary_fields_mean_the_same(tmp_path):
    for name in ("llama", "retro-llama32"):
        fields = config_of(name)
        path = copy_model(name, tmp_path / name)
        fields["rope_parameters"] = {**fields.pop("rope_scaling"), "rope_theta": fields.pop("rope_theta")}
        (path / "config.json").write_text(json.dumps(fields))
        assert find_model(str(path)).description == find_model(str(GOLDEN / name)).description


# published counts of parameters, and of tensors where they are known; sizes of the published models
OURO = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 128, "vocab_size": 49152, "layer_types": None,
}  # fmt: skip
HUGINN = {
    "n_embd": 5280, "n_heads": 55, "num_key_value_heads": 55, "head_dim": 96, "intermediate_size": 17920,
    "padded_vocab_size": 65536, "n_layers": 8, "n_layers_in_recurrent_block": 4, "mean_recurrence": 32,
}  # fmt: skip
RETRO = {"n_embd": 2048, "n_layers_in_prelude": 4, "n_layers_in_coda": 4, "mean_recurrence": 32}
TINYLLAMA = RETRO | {
    "n_layers": 16, "n_layers_in_recurrent_block": 8, "n_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 5632, "padded_vocab_size": 32000,
}  # fmt: skip
LLAMA32 = RETRO | {
    "n_layers": 14, "n_layers_in_recurrent_block": 6, "n_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "padded_vocab_size": 128256,
}  # fmt: skip
OLMO2 = RETRO | {
    "n_layers": 14, "n_layers_in_recurrent_block": 6, "n_heads": 16, "num_key_value_heads": 16,
    "head_dim": 128, "intermediate_size": 8192, "padded_vocab_size": 100352,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes", "notation", "parameters", "tensors"),
    [
        ("ouro", OURO | {"num_hidden_layers": 24}, "(0,24x4,0)", 1_434_652_673, 269),
        ("ouro", OURO | {"num_hidden_layers": 48}, "(0,48x4,0)", 2_667_974_657, 533),
        ("huginn", HUGINN, "(2,4x32,2)I", 3_564_976_800, None),
        ("retro-tinyllama", TINYLLAMA, "(4,8x32,4)I", 844_171_264, None),
        ("retro-llama32", LLAMA32, "(4,6x32,4)I", 1_385_228_288, None),
        ("retro-olmo2", OLMO2, "(4,6x32,4)I", 1_359_071_232, None),
    ],
)
def test_published_sizes(name, sizes, notation, parameters, tensors):
    fields = config_of(name) | sizes
    family = FAMILIES[fields["model_type"]]
    d = family.describe(Config(GOLDEN / name / "config.json", fields), weights_of(name))
    assert d.notation == notation
    with torch.device("meta"):
        assert sum(p.numel() for p in LoopedModel(d).parameters()) == parameters
    assert tensors in (None, len(family.sources(d)))


def test_left_overs_in_a_retrofits_config_are_not_read(tmp_path):
    """Converted from Huginn's file, it may still say Huginn's number of layers, rotary base and token ids."""
    path = copy_model("retro-olmo2", tmp_path / "model")
    fields = config_of("retro-olmo2") | {"n_layers": 8, "rope_base": 50_000, "bos_token_id": 10**6}
    (path / "config.json").write_text(json.dumps(fields))
    assert find_model(str(path)).description == find_model(str(GOLDEN / "retro-olmo2")).description


def roles(weights) -> list[str]:
    """One tensor for each thing that a model has many of."""
    return list({re.sub(r"\d", "", name): name for name in weights}.values())


def optional(name: str) -> set[str]:
    return {"lm_head.weight", "freqs_cis"} if name == "huginn" else set()


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_not_the_wirings_are_named(tmp_path, name):
    """Each kind of tensor in turn: renamed, missing, of another shape, of another type; and one too many."""
    sound = weights_of(name)
    for number, role in enumerate(roles(sound)):
        path = copy_model(name, tmp_path / f"renamed{number}", lambda t, role=role: t.update(odd=t.pop(role)))
        assert "not known odd (in model" in (said := refusal(path))
        assert f"missing {role}" in said or role in optional(name)
        path = copy_model(
            name,
            tmp_path / f"longer{number}",
            lambda t, role=role: t.update({role: torch.cat([t[role], t[role]])}),
        )
        rows, *others = sound[role].shape
        says = f"{role} is {[2 * rows, *others]} where the config says {[rows, *others]} (in model"
        assert says in refusal(path)
        path = copy_model(
            name, tmp_path / f"typed{number}", lambda t, role=role: t.update({role: t[role].double()})
        )
        said = refusal(path)
        assert "one of F32, BF16, F16 is wanted" in said and f"F64 is {role} (in model" in said
        path = copy_model(name, tmp_path / f"missing{number}", lambda t, role=role: t.pop(role))
        if role in optional(name):
            assert torch.equal(logits_of(path, name), logits_of(GOLDEN / name, name))
        else:
            assert f"missing {role}" in refusal(path)


@pytest.mark.parametrize("name", NAMES)
def test_transposed_tensors_are_named(tmp_path, name):
    """Square tensors are left out: transposed, they keep their shape, and only their numbers could tell."""
    sound = weights_of(name)
    oblong = [role for role in roles(sound) if sound[role].ndim == 2 and len(set(sound[role].shape)) == 2]
    assert len(oblong) >= 3
    for number, role in enumerate(oblong):
        path = copy_model(
            name, tmp_path / f"{number}", lambda t, role=role: t.update({role: t[role].T.contiguous()})
        )
        wanted = list(sound[role].shape)
        assert f"{role} is {wanted[::-1]} where the config says {wanted} (in model" in refusal(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "says"), [("nan", "holds NaN"), ("-inf", "holds infinite values")])
@pytest.mark.slow
def test_numbers_that_are_none_are_named(tmp_path, name, value, says):
    """One stands in the last place of each kind of tensor; a load and a plan's hash both find it."""
    for number, role in enumerate(roles(weights_of(name))):
        path = copy_model(
            name, tmp_path / f"{number}", lambda t, role=role: t[role].view(-1)[-1:].fill_(float(value))
        )
        source = find_model(str(path))
        with pytest.raises(ModelError, match=f"model.*safetensors: {role} holds") as caught:
            assert source.origin.weights_sha256
        assert says in str(caught.value)
        with pytest.raises(ModelError, match=f"model.*safetensors: {role} "):
            source.load()


@pytest.mark.parametrize("name", NAMES)
def test_files_cut_short_are_named(tmp_path, name):
    path = copy_whole(name, tmp_path / "cut")
    file = sorted(path.glob("model*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-4])
    assert f"{file} is damaged or cut short ({file.stat().st_size} bytes)" in refusal(path)


def test_a_file_cut_short_after_it_was_checked(tmp_path):
    path = copy_whole("ouro", tmp_path / "cut")
    source, file = find_model(str(path)), path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for use in (source.load, lambda: source.origin.weights_sha256):
        with pytest.raises(
            ModelError, match=r"model\.safetensors was cut short while model\.norm\.weight was"
        ):
            use()


def test_numbers_that_the_dtype_cannot_hold(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = copy_model("ouro", tmp_path / "large", lambda t: t[name].view(-1)[5:6].fill_(70_000.0))
    assert load_model(str(path), dtype="bfloat16").blocks[1].gate_up.max() == 70_144
    with pytest.raises(ModelError, match=f"{name} holds 70000, and 65504 is the most .* bfloat16 or float32"):
        load_model(str(path), dtype="float16")


TIED = {"llama": "model.embed_tokens.weight", "huginn": "transformer.wte.weight"}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_stored_again_must_be_the_same(tmp_path, name):
    """The head is stored in the same file and in another shard."""
    original = TIED[name]
    tensors = weights_of(name)
    tensors["lm_head.weight"] = tensors[original].clone()
    for label, change in (("same", 0.0), ("other", 1e-3)):
        tensors["lm_head.weight"].view(-1)[-1:] += change
        whole = copy_model(name, tmp_path / label, lambda t: t.update(tensors))
        apart = copy_model(name, tmp_path / f"{label}-apart")
        (apart / "model.safetensors").unlink()
        files = {key: f"model-{key == original}.safetensors" for key in tensors}
        write_shards(apart, tensors, files)
        for path in (whole, apart):
            if label == "same":
                assert torch.equal(logits_of(path, name), logits_of(GOLDEN / name, name))
                continue
            says = f"lm_head.weight differs from {original}, of which config.json makes it a copy"
            for use in (load_model, lambda spec: find_model(spec).origin.weights_sha256):
                with pytest.raises(ModelError, match=says):
                    use(str(path))


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    """Pieces that end nowhere in particular, in a row; what is wrong in the last one is found."""
    wanted, sha256 = (
        logits_of(GOLDEN / "huginn", "huginn"),
        find_model(str(GOLDEN / "huginn")).origin.weights_sha256,
    )
    monkeypatch.setattr("looptap.capture.models.stored_tensors._PIECE_BYTES", 1004)
    assert torch.equal(logits_of(GOLDEN / "huginn", "huginn"), wanted)
    assert find_model(str(GOLDEN / "huginn")).origin.weights_sha256 == sha256
    for name, change, says in (
        ("freqs_cis", 0.1, "holds other rotary angles"),
        ("lm_head.weight", 1e-3, "differs from transformer.wte.weight"),
        ("transformer.coda.0.mlp.fc.weight", float("nan"), "holds NaN"),
    ):
        path = copy_model(
            "huginn", tmp_path / name, lambda t, name=name, change=change: t[name].view(-1)[-1:].add_(change)
        )
        with pytest.raises(ModelError, match=f"{name} {says}"):
            load_model(str(path))


def test_huginns_rotary_table(tmp_path):
    """It may be missing, or kept in another dtype than the weights; it is compared, and never used."""
    whole = logits_of(GOLDEN / "huginn", "huginn")
    for label, table in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        path = copy_model(
            "huginn", tmp_path / label, lambda t, table=table: t.update(freqs_cis=t["freqs_cis"].to(table))
        )
        assert torch.equal(logits_of(path, "huginn"), whole)
    for label, change in (
        ("swapped", lambda t: t.update(freqs_cis=t["freqs_cis"].flip(-1))),
        ("shifted", lambda t: t.update(freqs_cis=t["freqs_cis"].roll(1, 1))),
        ("one angle", lambda t: t["freqs_cis"].view(-1)[-1:].add_(1e-2)),
    ):
        path = copy_model("huginn", tmp_path / label, change)
        for use in (load_model, lambda spec: find_model(spec).origin.weights_sha256):
            with pytest.raises(ModelError, match=r"freqs_cis holds other rotary angles .* are off by"):
                use(str(path))
    path = copy_model("huginn", tmp_path / "base", rope_base=10_000)
    with pytest.raises(ModelError, match="freqs_cis holds other rotary angles"):
        load_model(str(path))


def with_frequencies(tensors, theta=10_000.0):
    """Adds frequencies like those in files of older Llamas, float32 beside weights of any dtype."""
    C = tensors["model.layers.0.self_attn.k_proj.weight"].shape[0] // 2  # two key heads
    for layer in range(5):
        frequency = theta ** (-torch.arange(0, C, 2).float() / C)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequency


def test_older_llamas_carry_frequencies_and_no_base(tmp_path):
    """Files from before rope_theta mean 10 000; frequencies beside the weights must be the config's."""
    plain = copy_model("llama", tmp_path / "plain", rope_theta=10_000.0, rope_scaling=None)
    wanted = logits_of(plain, "llama")
    old = copy_model("llama", tmp_path / "old", with_frequencies, rope_theta=None, rope_scaling=None)
    assert torch.equal(logits_of(old, "llama"), wanted)
    other = copy_model("llama", tmp_path / "other", lambda t: with_frequencies(t, 20_000.0), rope_theta=None,
                       rope_scaling=None)  # fmt: skip
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.rotary_emb\.inv_freq holds other rotary freq"
    ):
        load_model(str(other))


def test_norms_may_be_float32_beside_bfloat16_matrices(tmp_path):
    narrow = {name: t.bfloat16() if t.ndim > 1 else t for name, t in weights_of("retro-olmo2").items()}
    path = copy_model("retro-olmo2", tmp_path / "model", lambda t: t.update(narrow))
    assert load_model(str(path)).dtype == torch.bfloat16
    both = [logits_of(path, "retro-olmo2", dtype=dtype) for dtype in ("float32", "bfloat16")]
    torch.testing.assert_close(both[0], both[1].float(), atol=0.3, rtol=0)
    wide = dict(narrow) | {(name := "transformer.coda.0.mlp.fc.weight"): narrow[name].float()}
    path = copy_model("retro-olmo2", tmp_path / "wide", lambda t: t.update(wide))
    assert f"and F32 is {name} (in model.safetensors)" in refusal(path)


CONFIGS = {
    "ouro's count": ("ouro", {"total_ut_steps": None}, "the field total_ut_steps is missing"),
    "no recurrence": ("ouro", {"total_ut_steps": 0}, "total_ut_steps must be a positive whole number, got 0"),
    "ouro's theta": ("ouro", {"rope_theta": None}, "the field rope_theta is missing"),
    "ouro's eps": ("ouro", {"rms_norm_eps": None}, "the field rms_norm_eps is missing"),
    "ouro's key heads": ("ouro", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    "window in use": ("ouro", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
    "window": (
        "ouro",
        {"use_sliding_window": None, "sliding_window": 16},
        "sliding_window is 16; only None is known",
    ),
    "sliding layers": (
        "ouro",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types is ['full_attention', 'sliding_attention', 'full_attention']; only 'full_attention'",
    ),
    "ouro's scaling": ("ouro", {"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn' is not known"),
    "two bases": (
        "llama", {"rope_parameters": {"rope_theta": 77.0}}, "rope_parameters says other than rope_theta",
    ),
    "two scalings": (
        "retro-llama32", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_parameters says other than rope_theta or rope_scaling",
    ),
    "factors": (
        "retro-llama32",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        "low_freq_factor must be below high_freq_factor, got 4 and 4",
    ),
    "qwen's key heads": (
        "llama", {"model_type": "qwen2", "num_key_value_heads": None}, "field num_key_value_heads is missing",
    ),
    "part of a head": ("ouro", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is"),
    "ouro's activation": ("ouro", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    "ouro's missing head": ("llama", {"tie_word_embeddings": False}, "missing lm_head.weight"),
    "injection": ("huginn", {"injection_type": "add"}, "injection_type is 'add'; only 'linear'"),
    "initial state": ("huginn", {"state_init": "zero"}, "state_init is 'zero'; only 'like-init'"),
    "mlp": ("retro-olmo2", {"mlp_class_name": "BaseMLP"}, "mlp_class_name is 'BaseMLP'; only 'GatedMLP'"),
    "activation": ("retro-llama32", {"nonlin_name": "GELU"}, "nonlin_name is 'GELU'; only 'SiLU'"),
    "norm": ("huginn", {"norm_class_name": "LayerNorm"}, "norm_class_name is 'LayerNorm'; only 'RMSNorm_"),
    "block": ("huginn", {"block_class_name": "TransformerPreNormBlock"}, "only 'SandwichBlock' is known"),
    "linear biases": ("huginn", {"bias": True}, "bias is True; only False is known"),
    "noise": ("huginn", {"test_time_noise": 0.1}, "test_time_noise is 0.1; only 0 is known"),
    "a negative stage": ("huginn", {"n_layers_in_coda": -1}, "n_layers_in_coda must be a whole number from"),
    "qk_bias of a retrofit": ("retro-tinyllama", {"qk_bias": True}, "qk_bias and tie_embeddings must be"),
    "tied retrofit": ("retro-olmo2", {"tie_embeddings": True}, "qk_bias and tie_embeddings must be false"),
    "unsaid qk_bias": ("huginn", {"qk_bias": None}, "the field qk_bias is missing"),
    "unsaid tie": ("huginn", {"tie_embeddings": None}, "the field tie_embeddings is missing"),
    "no qk_bias": ("huginn", {"qk_bias": False}, "not known transformer.coda.0.attn.qk_bias"),
    "untied, with a head": ("huginn", {"tie_embeddings": False, "n_heads": 8}, "qk_bias needs as many"),
    "retrofit's theta": ("retro-llama32", {"rope_theta": None}, "the field rope_theta is missing"),
    "retrofit's scaling": ("retro-llama32", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not"),
    "embedding scale": ("retro-llama32", {"init_values": {"std": 0.1}}, "init_values.embed_scale is missing"),
    "std": ("huginn", {"init_values": {}}, "the field init_values.std is missing"),
    "recurrences": ("retro-olmo2", {"mean_recurrence": 2.5}, "mean_recurrence must be a positive whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_other_wirings_are_refused(tmp_path, case):
    name, changes, wanted = CONFIGS[case]
    path = copy_model(name, tmp_path / "model", **changes)
    assert wanted in (said := refusal(path)), said
    assert str(path) in said


def test_raven_wirings_are_told_apart_by_tensors(tmp_path):
    """One model_type and one block_class_name, three blocks and two ends of the loop."""
    fields = ("model_type", "block_class_name")
    assert len({tuple(config_of(name)[f] for f in fields) for name in RAVEN}) == 1
    found = {name: find_model(str(GOLDEN / name)).description for name in RAVEN}
    assert [d.block.norm for d in found.values()] == ["huginn", "pre", "pre", "olmo2"]
    assert [d.norm_before_coda for d in found.values()] == [True, False, False, False]
    assert [d.block.rotary.theta for d in found.values()] == [50_000, 10_000, 500_000, 500_000]
    assert [d.block.eps for d in found.values()] == [1e-6, 1e-5, 1e-5, 1e-6]
    assert [d.embedding_scale for d in found.values()] == [8, 1, 1, 1]
    values = config_of("retro-llama32")["init_values"]
    path = copy_model("retro-llama32", tmp_path / "scaled", init_values={**values, "embed_scale": 3.5})
    assert find_model(str(path)).description == replace(found["retro-llama32"], embedding_scale=3.5)


def test_sliding_window_beside_a_switch_that_is_off(tmp_path):
    path = copy_model("ouro", tmp_path / "model", use_sliding_window=False, sliding_window=4096)
    assert find_model(str(path)).description == find_model(str(GOLDEN / "ouro")).description


def test_no_pickle_and_no_code_is_read(tmp_path):
    """Others' weights and modules beside the files change nothing; a pickle alone is no checkpoint."""
    path = copy_whole("ouro", tmp_path / "model")
    (path / "modeling_ouro.py").write_text("raise SystemExit('code of the directory ran')")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04not to be opened")
    assert torch.equal(logits_of(path, "ouro"), logits_of(GOLDEN / "ouro", "ouro"))
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(path)
