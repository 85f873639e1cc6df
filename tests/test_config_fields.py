"""Every field of a config is read, known to be harmless, or refused by name; so are files beside it."""

import json
import shutil

import pytest

from looptap.capture.models.config import Config
from looptap.capture.models.families import FAMILIES
from looptap.capture.models.harmless_fields import COMMON
from looptap.capture.models.load import find_model
from looptap.errors import ModelError, plain, shown
from looptap.tests.config_mutations import try_cases
from looptap.tests.golden_files import GOLDEN, NAMES, config_of, copy_model, weights_of


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(path))
    return str(caught.value)


@pytest.mark.slow
def test_mutated_configs_give_the_reference_or_are_refused():
    found = try_cases(range(400))
    assert found.silent == []
    assert found.counts["equal"] > 40 and found.counts["refused"] > 200


@pytest.mark.full
def test_mutated_configs_for_long():
    found = try_cases(range(400, 3000))
    assert found.silent == [] and found.counts["equal"] > 300


@pytest.mark.parametrize("value", [1, 0, "x", True, [0], {"a": 1}, 1.5])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_refused_by_name(tmp_path, name, value):
    path = copy_model(name, tmp_path / "model", strange_switch=value)
    said = refusal(path)
    assert f"strange_switch ({value!r})" in said and "remove it from a copy" in said


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_says_nothing_is_taken(tmp_path, value):
    find_model(str(copy_model("llama", tmp_path / "model", strange_switch=value)))


def test_fields_inside_objects_are_held_too(tmp_path):
    scaling = config_of("llama")["rope_scaling"] | {"attention_factor": 1.3}
    said = refusal(copy_model("llama", tmp_path / "model", rope_scaling=scaling))
    assert "rope_scaling.attention_factor (1.3)" in said


REFUSED = {
    "bidirectional": ({"is_causal": False}, "is_causal is False; only True is known"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says that the"),
    "another class": ({"architectures": ["LlamaBiModel"]}, "architectures is ['LlamaBiModel']"),
    "own code": ({"auto_map": {"AutoModel": "modeling.LlamaModel"}}, "auto_map gives this model code"),
    "two kinds of rotary": (
        {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        "rope_scaling.rope_type and rope_scaling.type disagree",
    ),
    "older kind of rotary": (
        {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "'linear' is not known",
    ),
    "too large a number": ({"rope_theta": 10**400}, "rope_theta must be a positive number, got 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_another_model_is_refused(tmp_path, case):
    changes, wanted = REFUSED[case]
    said = refusal(copy_model("llama", tmp_path / "model", **changes))
    assert wanted in said and len(said) < 600


@pytest.mark.parametrize("name", ["ouro", "huginn"])
def test_code_beside_the_weights_is_the_authors_or_refused(tmp_path, name):
    other = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    assert "code of its own" in refusal(copy_model(name, tmp_path / "model", auto_map=other))


def test_a_tie_that_transformers_would_make_is_refused(tmp_path):
    said = refusal(copy_model("retro-olmo2", tmp_path / "model", tie_word_embeddings=True))
    assert "tie_word_embeddings is True; only False" in said


def test_no_harmless_field_is_read():
    """Then it would not be harmless."""
    for name in NAMES:
        config = Config(GOLDEN / name / "config.json", config_of(name))
        family = FAMILIES[config.fields["model_type"]]
        family.describe(config, weights_of(name))
        assert not config._read & COMMON


@pytest.mark.parametrize(
    "file",
    ["adapter_config.json", "adapter_model.safetensors", "quantize_config.json", "hf_quant_config.json"],
)
def test_files_that_make_another_model_are_refused(tmp_path, file):
    path = copy_model("llama", tmp_path / "model")
    (path / file).write_text("{}")
    assert file in refusal(path)


def test_two_sets_of_weights_are_refused(tmp_path):
    """transformers would load the single file, others what the index names."""
    path = copy_model("llama", tmp_path / "model")
    single = path / "model.safetensors"
    assert single.is_file()
    shutil.copy(single, path / "part.safetensors")
    weight_map = dict.fromkeys(weights_of("llama"), "part.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "two sets of weights" in refusal(path)
    single.unlink()
    find_model(str(path))


def test_an_index_of_the_single_file_is_one_set(tmp_path):
    path = copy_model("llama", tmp_path / "model")
    weight_map = dict.fromkeys(weights_of("llama"), "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    find_model(str(path))


def test_messages_are_short_and_plain():
    assert shown("a" * 5000) == "'" + "a" * 52 + "… (5,002 characters) …" + "a" * 26 + "'"
    assert plain("a\x00b\x1b[31m\nc\udcff") == "a\\x00b\\x1b[31m\nc\\udcff"
    assert str(ModelError("x" * 10**6)).startswith("xx") and len(str(ModelError("x" * 10**6))) < 4100
