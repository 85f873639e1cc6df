"""Checkpoints in Hugging Face directories that this project knows: what their config.json means and where
each tensor goes.

A family is two things: a reading of the config as a description, and a list of every tensor that the files
must hold. The list is exact; a checkpoint with one tensor more or less is another wiring, and is refused by
`checkpoint.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .description import Block, Description, Llama3Scaling, Rotary


class ModelError(ValueError):
    """A model that cannot be used as it is given; says what is wrong with it and what would be right."""


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and the rows of our parameter that it fills."""

    tensor: str
    shape: tuple[int, ...]
    parameter: str
    first_row: int = 0


@dataclass(frozen=True)
class Family:
    read_config: Callable[["Config"], Description]
    sources: Callable[[Description], list[Source]]


@dataclass(frozen=True)
class Config:
    """config.json with its path, so that every complaint names both the field and the file."""

    path: Path
    fields: dict[str, Any]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.path}: {name} must be a positive whole number, got {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self.path}: {name} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        """A switch that is off unless the config turns it on."""
        value = self._get(name, False)
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {name} must be true or false, got {value!r}")
        return value

    def nested(self, name: str) -> "Config":
        """The fields of an object inside the config; none where there is no such object."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise ModelError(f"{self.path}: {name} must be an object, got {value!r}")
        return Config(self.path, value)

    def must_be(self, name: str, wanted: object) -> None:
        """Refuses a config that asks for something other than what is wired here; absent means wanted."""
        if (value := self.fields.get(name, wanted)) != wanted:
            raise ModelError(
                f"{self.path}: {name} is {value!r}; only {wanted!r} is known here, so this is another wiring"
            )

    def _get(self, name: str, default: object) -> object:
        value = self.fields.get(name)
        if value is None and default is None:
            raise ModelError(f"{self.path}: the field {name} is missing")
        return default if value is None else value


def _llama(config: Config) -> Description:
    for switch in ("attention_bias", "mlp_bias"):
        config.must_be(switch, False)
    return _feedforward(config, Block(norm="pre", eps=config.number("rms_norm_eps")))


def _olmo2(config: Config) -> Description:
    config.must_be("attention_bias", False)
    return _feedforward(config, Block(norm="olmo2", eps=config.number("rms_norm_eps"), qk_norm=True))


def _feedforward(config: Config, block: Block) -> Description:
    """The fields that Llama's descendants share."""
    config.must_be("hidden_act", "silu")
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % num_heads and config.fields.get("head_dim") is None:
        raise ModelError(f"{config.path}: hidden_size {width} is no multiple of {num_heads} attention heads")
    return Description(
        prelude=config.integer("num_hidden_layers"),
        core=0,
        recurrences=0,
        coda=0,
        width=width,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_width=config.integer("head_dim", width // num_heads),
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        block=replace(block, rotary=_rotary(config)),
        tied_head=config.flag("tie_word_embeddings"),
    )


def _rotary(config: Config) -> Rotary:
    """Old files carry rope_theta and rope_scaling, newer ones rope_parameters with both inside."""
    newer, older = config.nested("rope_parameters"), config.nested("rope_scaling")
    scaling = older if older.fields else newer
    theta = (newer if "rope_theta" in newer.fields else config).number("rope_theta")
    kind = scaling.fields.get("rope_type", scaling.fields.get("type", "default"))
    if kind == "default":
        return Rotary(theta=theta)
    if kind != "llama3":
        raise ModelError(f"{config.path}: rotary scaling {kind!r} is not known; default and llama3 are")
    return Rotary(
        theta=theta,
        scaling=Llama3Scaling(
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_max_positions=scaling.integer("original_max_position_embeddings"),
        ),
    )


def _feedforward_sources(norms: dict[str, str]) -> Callable[[Description], list[Source]]:
    """Tensors of the usual layout, given each norm's name in the files and here."""

    def sources(d: Description) -> list[Source]:
        D, M, C = d.width, d.mlp_width, d.head_width
        H, K = d.num_heads, d.num_kv_heads
        found = [
            Source("model.embed_tokens.weight", (d.vocab_size, D), "embedding"),
            Source("model.norm.weight", (D,), "final_norm"),
        ]
        if not d.tied_head:
            found.append(Source("lm_head.weight", (d.vocab_size, D), "head"))
        for i in range(d.num_blocks):
            theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
            attention = theirs + "self_attn."
            found += [
                Source(f"{attention}q_proj.weight", (H * C, D), f"{ours}qkv"),
                Source(f"{attention}k_proj.weight", (K * C, D), f"{ours}qkv", H * C),
                Source(f"{attention}v_proj.weight", (K * C, D), f"{ours}qkv", (H + K) * C),
                Source(f"{attention}o_proj.weight", (D, H * C), f"{ours}attention_out"),
                Source(f"{theirs}mlp.gate_proj.weight", (M, D), f"{ours}gate_up"),
                Source(f"{theirs}mlp.up_proj.weight", (M, D), f"{ours}gate_up", M),
                Source(f"{theirs}mlp.down_proj.weight", (D, M), f"{ours}mlp_out"),
            ]
            found += [Source(f"{theirs}{name}.weight", (D,), ours + place) for name, place in norms.items()]
            if d.block.qk_norm:
                found.append(Source(f"{attention}q_norm.weight", (H * C,), f"{ours}q_norm"))
                found.append(Source(f"{attention}k_norm.weight", (K * C,), f"{ours}k_norm"))
        return found

    return sources


# the same name stands for different norms: Llama's post_attention_layernorm is the MLP's input norm, OLMo-2's
# the attention's output norm
FAMILIES: dict[str, Family] = {
    "llama": Family(
        _llama,
        _feedforward_sources(
            {
                "input_layernorm": "attention_branch_input_norm",
                "post_attention_layernorm": "mlp_branch_input_norm",
            }
        ),
    ),
    "olmo2": Family(
        _olmo2,
        _feedforward_sources(
            {
                "post_attention_layernorm": "attention_branch_output_norm",
                "post_feedforward_layernorm": "mlp_branch_output_norm",
            }
        ),
    ),
}
