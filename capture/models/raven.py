"""The three wirings behind `model_type` huginn_raven, which their config.json does not tell apart.

Huginn-0125 (arXiv 2502.05171): norms before the branch and on the stream, interleaved rotary pairs, a bias on
q and k before the rotation, embeddings times √width, a tied head, and the final norm twice: between core and
coda, and before the head.

Retrofitted recurrence (arXiv 2511.07384) from a Llama or TinyLlama (pre-norm) or from OLMo-2 (norms on branch
outputs, q and k normed over all heads): half-split rotary pairs by rope_theta, as rope_base in their files is
a left-over that nothing reads; grouped heads; a head of its own; the final norm before the head alone; a far
smaller initial state.

All three: adapter on concat(state, prelude output), state first, q, k and v rows in one matrix, gate rows
before up rows in another, an initial state drawn from a normal cut at three standard deviations. Token ids
named in the retrofits' files are Huginn's, and are ordinary words there: none is read.
"""

from collections.abc import Collection

from ...errors import ModelError
from .config import Config, read_rotary
from .description import Block, Description, Rotary
from .loop_schedule import prelude_core_coda
from .sources import Copy, Source

# by the block's kind of norms: each norm's name in the files and here
_NORMS = {
    "huginn": {
        "norm_1": "attention_branch_input_norm",
        "norm_2": "attention_stream_norm",
        "norm_3": "mlp_branch_input_norm",
        "norm_4": "mlp_stream_norm",
    },
    "pre": {"norm_1": "attention_branch_input_norm", "norm_2": "mlp_branch_input_norm"},
    "olmo2": {"norm_1": "attention_branch_output_norm", "norm_2": "mlp_branch_output_norm"},
}
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
# what every wiring here has in common and other models of this name do not
_COMMON = {
    "block_class_name": "SandwichBlock",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "bias": False,
    "injection_type": "linear",
    "state_init": "like-init",
    "test_time_noise": 0,
}


def read_raven(config: Config, names: Collection[str]) -> Description:
    """Reads the description of whichever of the three wirings the tensors' names belong to."""
    for name, wanted in _COMMON.items():
        config.must_be(name, wanted)
    config.must_be("tie_word_embeddings", config.flag("tie_embeddings", None))
    if any(name.endswith(".norm_3.weight") for name in names):
        return _huginn(config)
    is_olmo2 = any(name.endswith(".attn.q_norm.weight") for name in names)
    return _retrofit(config, "olmo2" if is_olmo2 else "pre")


def _huginn(config: Config) -> Description:
    width, init = config.integer("n_embd"), config.nested("init_values")
    has_bias = config.flag("qk_bias", None)
    block = Block(
        norm="huginn",
        eps=config.number("norm_eps"),
        bias="qk" if has_bias else None,
        rotary=Rotary(theta=config.number("rope_base"), interleaved=True),
    )
    d = _describe(
        config,
        block,
        max_positions=config.integer("block_size"),
        initial_std=init.number("std") * width**0.5,
        embedding_scale=width**0.5,
        norm_before_coda=True,
        tied_head=config.flag("tie_embeddings", None),
    )
    if has_bias and d.num_kv_heads != d.num_heads:
        raise ModelError(
            f"{config.path}: qk_bias needs as many key heads as query heads, got num_key_value_heads "
            f"{d.num_kv_heads} and n_heads {d.num_heads}"
        )
    return d


def _retrofit(config: Config, norm: str) -> Description:
    init = config.nested("init_values")
    if config.flag("qk_bias", None) or config.flag("tie_embeddings", None):
        raise ModelError(
            f"{config.path}: qk_bias and tie_embeddings must be false for a model without the norm_3 and "
            "norm_4 of Huginn; this is another wiring"
        )
    block = Block(
        norm=norm,
        eps=config.number("norm_eps"),
        qk_norm="all_heads" if norm == "olmo2" else None,
        rotary=read_rotary(config),
    )
    return _describe(
        config,
        block,
        max_positions=config.integer("max_position_embeddings"),
        initial_std=init.number("std"),
        embedding_scale=init.number("embed_scale"),
        norm_before_coda=False,
        tied_head=False,
    )


def _describe(
    config: Config,
    block: Block,
    *,
    max_positions: int,
    initial_std: float,
    embedding_scale: float,
    norm_before_coda: bool,
    tied_head: bool,
) -> Description:
    """The fields that all three share."""
    prelude, core, coda = (
        config.integer(f"n_layers_in_{stage}", least=least)
        for stage, least in (("prelude", 0), ("recurrent_block", 1), ("coda", 0))
    )
    width, num_heads = config.integer("n_embd"), config.integer("n_heads")
    return Description(
        phases=prelude_core_coda(prelude, core, config.integer("mean_recurrence"), coda),
        width=width,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_width=config.integer("head_dim", width // num_heads),
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("padded_vocab_size"),
        max_positions=max_positions,
        block=block,
        injection="linear",
        initial_state="truncated",
        initial_std=initial_std,
        norm_before_coda=norm_before_coda,
        embedding_scale=embedding_scale,
        tied_head=tied_head,
    )


def list_sources(d: Description) -> list[Source]:
    """Returns every tensor that the files must hold."""
    D, M, C = d.width, d.mlp_width, d.head_width
    H, K = d.num_heads, d.num_kv_heads
    found = [
        Source(_EMBEDDING, (d.vocab_size, D), "embedding"),
        Source("transformer.adapter.weight", (D, 2 * D), "adapter"),
        Source("transformer.ln_f.weight", (D,), "final_norm"),
    ]
    if not d.tied_head:
        found.append(Source(_HEAD, (d.vocab_size, D), "head"))
    stages = (("prelude", d.prelude), ("core_block", d.core), ("coda", d.coda))
    theirs = [f"transformer.{stage}.{i}." for stage, layers in stages for i in range(layers)]
    for i, block in enumerate(theirs):
        ours = f"blocks.{i}."
        found += [
            Source(f"{block}attn.Wqkv.weight", ((H + 2 * K) * C, D), f"{ours}qkv"),
            Source(f"{block}attn.proj.weight", (D, H * C), f"{ours}attention_out"),
            Source(f"{block}mlp.fc.weight", (2 * M, D), f"{ours}gate_up"),
            Source(f"{block}mlp.proj.weight", (D, M), f"{ours}mlp_out"),
        ]
        for name, place in _NORMS[d.block.norm].items():
            found.append(Source(f"{block}{name}.weight", (D,), ours + place))
        if d.block.bias:
            found.append(Source(f"{block}attn.qk_bias", (2, 1, H, C), f"{ours}bias"))
        if d.block.qk_norm:
            found.append(Source(f"{block}attn.q_norm.weight", (H * C,), f"{ours}q_norm"))
            found.append(Source(f"{block}attn.k_norm.weight", (K * C,), f"{ours}k_norm"))
    return found


def list_copies(d: Description) -> list[Copy]:
    """Returns what Huginn's files hold besides: the tied head again, and the rotary table of its code."""
    copies = []
    if d.tied_head:
        copies.append(Copy(_HEAD, (d.vocab_size, d.width), _EMBEDDING))
    if d.block.rotary.interleaved:
        copies.append(Copy("freqs_cis", (1, d.max_positions, 1, d.head_width // 2, 2), "rotary table"))
    return copies
