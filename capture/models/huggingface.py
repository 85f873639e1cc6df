"""Models in the usual layout of Hugging Face files, `model.layers.{i}.…`: Llama and those that came of it.

Ouro (ByteDance, arXiv 2510.25741) is one of them with all its layers run `total_ut_steps` times, a norm on
each side of a branch, the final norm at the end of every recurrence and not again before the head, and an
exit gate that reads what that norm leaves.

The same name stands for different norms: Llama's post_attention_layernorm is the MLP's input norm, as is
Ouro's; OLMo-2's is the attention's output norm.
"""

from collections.abc import Collection
from dataclasses import replace

from ...errors import ModelError, shown
from .config import Config, read_rotary
from .description import Block, Description
from .loop_schedule import prelude_core_coda
from .sources import Copy, Source

# by the block's kind of norms: each norm's name in the files and here
_NORMS = {
    "pre": {
        "input_layernorm": "attention_branch_input_norm",
        "post_attention_layernorm": "mlp_branch_input_norm",
    },
    "olmo2": {
        "post_attention_layernorm": "attention_branch_output_norm",
        "post_feedforward_layernorm": "mlp_branch_output_norm",
    },
    "ouro": {
        "input_layernorm": "attention_branch_input_norm",
        "input_layernorm_2": "attention_branch_output_norm",
        "post_attention_layernorm": "mlp_branch_input_norm",
        "post_attention_layernorm_2": "mlp_branch_output_norm",
    },
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_llama(config: Config, names: Collection[str]) -> Description:
    for switch in ("attention_bias", "mlp_bias"):
        config.must_be(switch, False)
    # files from before the field, such as the first TinyLlama's, mean the 10 000 of their time
    return _feedforward(config, Block(norm="pre", eps=config.number("rms_norm_eps")), default_theta=10_000.0)


def read_olmo2(config: Config, names: Collection[str]) -> Description:
    config.must_be("attention_bias", False)
    return _feedforward(config, Block(norm="olmo2", eps=config.number("rms_norm_eps"), qk_norm="all_heads"))


def read_qwen2(config: Config, names: Collection[str]) -> Description:
    config.integer("num_key_value_heads")  # without it the authors' class takes 32
    return _feedforward(config, Block(norm="pre", eps=config.number("rms_norm_eps"), bias="qkv"))


def read_qwen3(config: Config, names: Collection[str]) -> Description:
    config.must_be("attention_bias", False)
    for name in ("num_key_value_heads", "head_dim"):  # without them the authors' class takes 32 and 128
        config.integer(name)
    return _feedforward(config, Block(norm="pre", eps=config.number("rms_norm_eps"), qk_norm="each_head"))


def read_ouro(config: Config, names: Collection[str]) -> Description:
    for switch in ("attention_bias", "mlp_bias"):
        config.must_be(switch, False)
    config.integer("num_key_value_heads")
    d = _feedforward(config, Block(norm="ouro", eps=config.number("rms_norm_eps")))
    phases = prelude_core_coda(0, d.num_blocks, config.integer("total_ut_steps"), 0)
    return replace(d, phases=phases, recurrence_end="norm", exit_gate=True)


def _feedforward(config: Config, block: Block, default_theta: float | None = None) -> Description:
    """The fields that Llama's descendants share."""
    config.must_be("hidden_act", "silu")
    _check_full_attention(config)
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % num_heads and config.value("head_dim") is None:
        raise ModelError(f"{config.path}: hidden_size {width} is no multiple of {num_heads} attention heads")
    return Description(
        phases=prelude_core_coda(config.integer("num_hidden_layers"), 0, 0, 0),
        width=width,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_width=config.integer("head_dim", width // num_heads),
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        block=replace(block, rotary=read_rotary(config, default_theta)),
        tied_head=config.flag("tie_word_embeddings"),
    )


def _check_full_attention(config: Config) -> None:
    """Refuses sliding windows; Qwen2's files carry the width of one beside use_sliding_window false."""
    config.must_be("use_sliding_window", False)
    if config.value("sliding_window") is not None and config.value("use_sliding_window") is None:
        config.must_be("sliding_window", None)
    kinds = config.value("layer_types") or []
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
        raise ModelError(f"{config.path}: layer_types is {shown(kinds)}; only 'full_attention' is known here")


def list_sources(d: Description) -> list[Source]:
    """Returns every tensor that the files must hold."""
    D, M, C = d.width, d.mlp_width, d.head_width
    H, K = d.num_heads, d.num_kv_heads
    found = [
        Source(_EMBEDDING, (d.vocab_size, D), "embedding"),
        Source("model.norm.weight", (D,), "final_norm"),
    ]
    if not d.tied_head:
        found.append(Source(_HEAD, (d.vocab_size, D), "head"))
    if d.exit_gate:
        found.append(Source("model.early_exit_gate.weight", (1, D), "exit_gate_weight"))
        found.append(Source("model.early_exit_gate.bias", (1,), "exit_gate_bias"))
    for i in range(d.num_blocks):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        attention = f"{theirs}self_attn."
        for name, rows, first in (("q", H * C, 0), ("k", K * C, H * C), ("v", K * C, (H + K) * C)):
            found.append(Source(f"{attention}{name}_proj.weight", (rows, D), f"{ours}qkv", first))
            if d.block.bias:
                found.append(Source(f"{attention}{name}_proj.bias", (rows,), f"{ours}bias", first))
        found += [
            Source(f"{attention}o_proj.weight", (D, H * C), f"{ours}attention_out"),
            Source(f"{theirs}mlp.gate_proj.weight", (M, D), f"{ours}gate_up"),
            Source(f"{theirs}mlp.up_proj.weight", (M, D), f"{ours}gate_up", M),
            Source(f"{theirs}mlp.down_proj.weight", (D, M), f"{ours}mlp_out"),
        ]
        for name, place in _NORMS[d.block.norm].items():
            found.append(Source(f"{theirs}{name}.weight", (D,), ours + place))
        if d.block.qk_norm:
            q_heads, k_heads = (H, K) if d.block.qk_norm == "all_heads" else (1, 1)
            found.append(Source(f"{attention}q_norm.weight", (q_heads * C,), f"{ours}q_norm"))
            found.append(Source(f"{attention}k_norm.weight", (k_heads * C,), f"{ours}k_norm"))
    return found


def list_copies(d: Description) -> list[Copy]:
    """Returns what files may hold besides: a tied head again, and rotary frequencies, as older Llamas do."""
    copies = [Copy(_HEAD, (d.vocab_size, d.width), _EMBEDDING)] if d.tied_head else []
    frequencies = (d.head_width // 2,)
    return copies + [
        Copy(f"model.layers.{i}.self_attn.rotary_emb.inv_freq", frequencies, "rotary frequencies")
        for i in range(d.num_blocks)
    ]
