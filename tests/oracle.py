"""What models are held to: a forward pass written from the papers' words, and models small enough to run it.

Nothing of the package computes here. Weights are named as `LoopedModel` names them.
"""

import torch
import torch.nn.functional as F

from looptap.capture.models.description import Block, Description
from looptap.capture.models.loop_schedule import prelude_core_coda
from looptap.capture.models.model import LoopedModel
from looptap.capture.models.tap import Packed, Plain

LENGTHS = (9, 1, 9, 17)  # a run of equal ones apart, a lone token, nothing round


def describe(**changes) -> Description:
    """A small model; heads, key heads and widths all differ, so that no two axes can be swapped unseen."""
    counts = {"prelude": 1, "core": 2, "recurrences": 3, "coda": 1}
    counts = {name: changes.pop(name, count) for name, count in counts.items()}
    fields = {
        "phases": prelude_core_coda(**counts),
        "width": 24, "num_heads": 4, "num_kv_heads": 2, "head_width": 10, "mlp_width": 40,
        "vocab_size": 50, "max_positions": 64, "block": Block(),
    }  # fmt: skip
    return Description(**{**fields, **changes})


def fill(model: LoopedModel, seed: int = 0) -> LoopedModel:
    """Random weights, norms included, so that a norm with another's weight shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("bias"):
            parameter.mul_(0.5)
        elif parameter.ndim == 1:
            parameter.mul_(0.25).add_(1)
        elif name != "embedding":
            parameter.mul_(parameter.shape[1] ** -0.5)
    return model


def random_ids(vocab_size: int, lengths=LENGTHS) -> Packed:
    generator = torch.Generator().manual_seed(5)
    return Packed(torch.randint(vocab_size, (sum(lengths),), generator=generator), tuple(lengths))


def initial_state(d: Description, num_tokens: int) -> torch.Tensor | None:
    if d.initial_state == "prelude":
        return None
    return torch.randn(num_tokens, d.width, generator=torch.Generator().manual_seed(9))


class Listening(Plain):
    """Keeps every residual, mid-block state, block input and loop state, with the address it came under."""

    def __init__(self):
        self.residuals, self.mids, self.entering, self.loop_states = {}, {}, {}, {}

    def residual(self, step, half, x_ND, branch_ND, norms):
        result = super().residual(step, half, x_ND, branch_ND, norms)
        found = self.mids if half == "attention" else self.residuals
        assert step not in found
        found[step] = result.residual_ND
        if half == "attention":
            self.entering[step] = x_ND
        return result

    def loop_state(self, step, state_ND):
        self.loop_states[step.recurrence] = state_ND


class Straight:
    """One sequence's forward pass as the papers word it: the oracle in float64, plain torch in bfloat16."""

    def __init__(self, model: LoopedModel, dtype=torch.float64):
        self.d, self.dtype = model.description, dtype
        self.weights = {name: p.to(dtype) for name, p in model.named_parameters()}
        self.residuals: list[torch.Tensor] = []
        self.gate_logits: list[torch.Tensor] = []

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

    def queries_keys_values(self, x, name):
        d, T = self.d, len(x)
        H, K, C = d.num_heads, d.num_kv_heads, d.head_width
        w = {key: self.weights.get(f"{name}.{key}") for key in ("q_norm", "k_norm", "bias")}
        q, k, v = (x @ self.weights[f"{name}.qkv"].T).split([H * C, K * C, K * C], dim=-1)
        if d.block.bias == "qk":
            bias_HC = w["bias"].view(2, H, C)
            q, k = q + bias_HC[0].flatten(), k + bias_HC[1].flatten()
        elif d.block.bias == "qkv":
            q, k, v = (x + b for x, b in zip((q, k, v), w["bias"].split([H * C, K * C, K * C]), strict=True))
        if d.block.qk_norm == "all_heads":
            q, k = self.rms(q, w["q_norm"]), self.rms(k, w["k_norm"])
        q, k, v = (part.view(T, -1, C).transpose(0, 1) for part in (q, k, v))
        if d.block.qk_norm == "each_head":
            q, k = self.rms(q, w["q_norm"]), self.rms(k, w["k_norm"])
        return self.rotated(q), self.rotated(k), v

    def attention(self, x, name):
        H, K, T = self.d.num_heads, self.d.num_kv_heads, len(x)
        q, k, v = self.queries_keys_values(x, name)
        heads = []
        for h in range(H):
            group = h // (H // K)
            scores = q[h] @ k[group].T / self.d.head_width**0.5
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
            if d.exit_gate:
                gate = state @ self.weights["exit_gate_weight"].T + self.weights["exit_gate_bias"]
                self.gate_logits.append(gate.squeeze(-1))
        if d.block.norm == "huginn":
            state = self.rms(state, final)
        for layer in range(d.coda):
            state = self.block(state, d.prelude + d.core + layer)
        if d.block.norm != "ouro":
            state = self.rms(state, final)
        return state @ self.weights["embedding" if d.tied_head else "head"].T * d.logit_scale
