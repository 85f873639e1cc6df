"""Changes config.json at random and demands the reference's numbers, or a refusal that names the field.

    python -m looptap.tests.config_mutations CASES [FIRST]

The reference of llama, olmo2, qwen2 and qwen3 is transformers, which loads the same directory; of ouro and
huginn_raven the stored outputs of their authors' code, which only a field that nothing reads leaves as they
are.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from looptap.capture.models.load import load_model
from looptap.capture.models.tap import Packed
from looptap.errors import ModelError
from looptap.tests.golden_files import GOLDEN, batch_of, config_of, stored

WITH_TRANSFORMERS = ("llama", "olmo2", "qwen2", "qwen3")
WITH_GOLDEN = ("ouro", "huginn", "retro-llama32", "retro-olmo2", "retro-tinyllama")
T, TOLERANCE = 24, 1e-4

# fields that say what a model of some family computes, from configs of this and of other families
FIELDS = {
    "is_causal": [False, 0, "no"], "use_bidirectional_attention": [True], "is_decoder": [True, False],
    "is_encoder_decoder": [True], "add_cross_attention": [True], "attention_bias": [True], "mlp_bias": [True],
    "hidden_act": ["gelu", "relu", "swish", "silu"], "hidden_activation": ["gelu"],
    "rms_norm_eps": [1e-3, 1e-12, "1e-5", None, 0], "layer_norm_eps": [1e-3], "norm_eps": [1e-3],
    "rope_theta": [77.0, 1e6, 0, None, True, 10**400], "rope_base": [77], "rotary_dim": [4],
    "partial_rotary_factor": [0.5, 1.0], "rotary_pct": [0.25], "rope_interleaved": [True],
    "rope_parameters": [
        None, {"rope_type": "default"}, {"rope_theta": 300.0}, {"rope_type": "default", "rope_theta": 300.0},
        {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": None, "type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "default", "type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, [], "default",
    ],
    "rope_scaling": [
        None, {"type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": None, "type": "linear", "factor": 3.0}, {"type": "default"}, {"factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ],
    "sliding_window": [4, 4096, None, 0], "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, 2],
    "layer_types": [None, ["sliding_attention"] * 3, ["full_attention"] * 3, "full_attention"],
    "attention_chunk_size": [4], "no_rope_layers": [[0, 1, 1]], "use_rope": [True, False],
    "num_attention_heads": [2, 8, 4], "num_key_value_heads": [1, 2, 4, None], "head_dim": [4, 8, 16, None],
    "hidden_size": [32, 64], "intermediate_size": [48, 50], "num_hidden_layers": [1, 2, 3, 4, 10**9],
    "vocab_size": [90, 91], "max_position_embeddings": [128, 8, 0], "tie_word_embeddings": [True, False],
    "query_pre_attn_scalar": [2.0], "attn_logit_softcapping": [5.0], "final_logit_softcapping": [5.0],
    "logit_scale": [0.5], "embedding_multiplier": [3.0], "residual_multiplier": [0.3],
    "attention_multiplier": [0.3], "logits_scaling": [3.0], "clip_qkv": [0.1], "qk_layernorm": [True],
    "use_qk_norm": [True], "parallel_residual": [True], "use_parallel_residual": [True],
    "tie_embeddings": [False],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "gptq"}],
    "auto_map": [
        {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, {"AutoConfig": "configuration_x.X"},
    ],
    "architectures": [["LlamaBiModel"], [], ["BertModel"], None, "LlamaForCausalLM"],
    "attention_dropout": [0.0, 0.5], "pretraining_tp": [1, 2], "initializer_range": [0.5],
    "dtype": ["bfloat16"],
    "torch_dtype": ["float16"], "bos_token_id": [3], "pad_token_id": [0, 5], "use_cache": [False, True],
    "model_type": ["llama", "olmo2", "qwen2", "qwen3", "mistral", "gemma", None],
    "num_experts": [4], "num_experts_per_tok": [2], "alibi": [True], "position_embedding_type": ["absolute"],
    "prefix_lm": [True], "loop_num": [2], "num_loops": [3], "total_ut_steps": [2], "mean_recurrence": [2],
    "injection_type": ["add", "linear"], "test_time_noise": [0.3], "state_init": ["zero"],
    "qk_bias": [True, False],
    "early_exit_threshold": [0.5], "hidden_size_per_layer_input": [8],
    "made_up": [1, True, "x", [1], {"a": 1}],
}  # fmt: skip
# what changes the reference itself where that is a stored output
_REAL = {
    "rms_norm_eps", "norm_eps", "rope_theta", "rope_base", "rope_parameters", "rope_scaling",
    "total_ut_steps", "mean_recurrence", "num_key_value_heads", "num_attention_heads", "head_dim",
}  # fmt: skip


@dataclass
class Found:
    """What came of many cases."""

    counts: Counter[str] = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)
    """Cases where looptap's numbers are others than the reference's, and nothing was said."""


@cache
def _saved(kind: str) -> Path:
    """A small random model of transformers, saved once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(tempfile.mkdtemp(prefix=f"mutated-{kind}-"))
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind, vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, rms_norm_eps=1e-5,
        max_position_embeddings=128, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_().mul_(0.3).add_(float(name.endswith("norm.weight")))
    model.save_pretrained(path)
    return path


def mutate(fields: dict, chance: random.Random, names: list[str]) -> str:
    """Changes one to three fields of a config; returns what was done."""
    done = []
    for name in chance.sample(names, chance.choice([1, 1, 1, 2, 3])):
        if name in fields and chance.random() < 0.1:
            del fields[name]
            done.append(f"{name} left out")
        else:
            fields[name] = chance.choice(FIELDS[name])
            done.append(f"{name} = {fields[name]!r:.60}")
    return ", ".join(done)


def _theirs(path: Path, ids_ST: torch.Tensor) -> torch.Tensor | None:
    """Logits of transformers' own model of the directory; None where it makes none."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        ).eval()
        with torch.no_grad():
            return model(ids_ST, use_cache=False).logits[0]
    except Exception:  # whatever a broken config raises there
        return None


def try_case(number: int, folder: Path, found: Found) -> None:
    """Tries one case; adds what came of it."""
    chance = random.Random(number)
    kind = chance.choice((*WITH_TRANSFORMERS, *WITH_GOLDEN))
    is_golden, names = kind in WITH_GOLDEN, sorted(FIELDS)
    if is_golden:
        names = [name for name in names if name not in _REAL]
    source = GOLDEN / kind if is_golden else _saved(kind)
    fields = config_of(kind) if is_golden else json.loads((source / "config.json").read_text())
    what = f"case {number}, {kind}: {mutate(fields, chance, names)}"
    path = folder / str(number)
    path.mkdir()
    for file in source.iterdir():
        if file.name.startswith("model") and "safetensors" in file.name:
            (path / file.name).symlink_to(file.resolve())
    (path / "config.json").write_text(json.dumps(fields))
    try:
        model = load_model(str(path), dtype="float32")
    except ModelError as error:
        assert str(path) in str(error), (what, error)
        found.counts["refused"] += 1
        return
    with torch.inference_mode():
        if is_golden:
            batch, _, initial_ND = batch_of(kind)
            logits = model.logits(model(batch, initial_state_ND=initial_ND))
            wanted = stored(kind, "reference")["logits"].flatten(0, 1)
        else:
            ids_ST = torch.randint(90, (1, T), generator=torch.Generator().manual_seed(number))
            logits, wanted = model.logits(model(Packed(ids_ST[0], (T,)))), _theirs(path, ids_ST)
    if wanted is None:
        found.counts["not loaded by the reference"] += 1
    elif logits.shape == wanted.shape and (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
        found.counts["equal"] += 1
    else:
        found.silent.append(what)


def try_cases(numbers: range) -> Found:
    """Tries many cases in a temporary directory."""
    found = Found()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            try_case(number, Path(folder), found)
    return found


if __name__ == "__main__":
    cases, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    result = try_cases(range(first, first + cases))
    print(dict(result.counts), f"{len(result.silent)} silent")
    print(*result.silent, sep="\n")
    sys.exit(bool(result.silent))
