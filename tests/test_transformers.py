"""Qwen2 and Qwen3, of which there is no stored fixture: against transformers on small random models."""

import pytest
import torch
from safetensors.torch import load_file

from looptap.capture.models.load import load_model
from looptap.capture.models.tap import Packed
from looptap.tests.oracle import Listening

SIZES = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
HEADS = {
    "groups": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "one key head": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 20},
}


def save_random(kind: str, path, **fields):
    """A model of transformers with weights of its own everywhere, biases and norms included, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SIZES, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator).mul_(0.15)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_equals_transformers(tmp_path, kind, heads, is_tied):
    theirs = save_random(kind, tmp_path, tie_word_embeddings=is_tied, **HEADS[heads])
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) != is_tied
    telling = {"qwen2": "self_attn.v_proj.bias", "qwen3": "self_attn.k_norm.weight"}[kind]
    assert f"model.layers.2.{telling}" in names
    ours, tap = load_model(str(tmp_path)), Listening()
    ids_ST = torch.randint(90, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = theirs(ids_ST, output_hidden_states=True, use_cache=False)
        head_input = ours(Packed(ids_ST.flatten(), (33, 33)), tap)
        logits = ours.logits(head_input)
    torch.testing.assert_close(logits, wanted.logits.flatten(0, 1), atol=1e-4, rtol=0)
    # theirs: the embedding, every layer's output but the last, and that one after the final norm
    found = [tap.entering[step] for step in ours.description.steps()] + [head_input]
    for got, right in zip(found, wanted.hidden_states, strict=True):
        torch.testing.assert_close(got, right.flatten(0, 1), atol=1e-4, rtol=0)
