"""Looped models written by hand in plain PyTorch, as a user would bring them: nothing of looptap inside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention  # bound here, before anything listens

from looptap.tests.golden_files import config_of, stored, weights_of


class HandBlock(nn.Module):
    """One block; `attend` is how its attention is called, `seen` the queries and keys of every call."""

    def __init__(self, width=16, heads=4, key_heads=4, mlp=24, *, eps=1e-6, theta=1e4, is_ouro=False):
        super().__init__()
        self.heads, self.key_heads, self.theta = heads, key_heads, theta
        C = width // heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, key_heads * C, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, width, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(width, eps) for _ in range(2))
        self.after_1, self.after_2 = (nn.RMSNorm(width, eps) if is_ouro else nn.Identity() for _ in range(2))
        self.attend = lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != key_heads
        )
        self.cache = None
        self.seen = []

    def forward(self, x: Tensor) -> Tensor:
        *_, T, _ = x.shape
        y = self.norm_1(x)
        q, k, v = (
            project(y).unflatten(-1, (n, -1)).transpose(-2, -3)
            for project, n in ((self.q, self.heads), (self.k, self.key_heads), (self.v, self.key_heads))
        )
        past = 0 if self.cache is None or not self.cache else self.cache[0].shape[-2]
        q, k = (rotate(part, torch.arange(past, past + T), self.theta) for part in (q, k))
        if self.cache is not None:
            if past:
                k, v = torch.cat([self.cache[0], k], -2), torch.cat([self.cache[1], v], -2)
            self.cache = (k, v)
        self.seen.append((q.detach(), k.detach()))
        o = self.attend(q, k, v)
        x = x + self.after_1(self.o(o.transpose(-2, -3).flatten(-2)))
        y = self.norm_2(x)
        return x + self.after_2(self.down(F.silu(self.gate(y)) * self.up(y)))


def rotate(x: Tensor, position_T: Tensor, theta: float) -> Tensor:
    C = x.shape[-1]
    angle_TC = position_T.float().outer(theta ** -(torch.arange(0, C, 2).float() / C)).repeat(1, 2)
    a, b = x.chunk(2, -1)
    cos, sin = angle_TC.cos().to(x.dtype), angle_TC.sin().to(x.dtype)
    return x * cos + torch.cat([-b, a], -1) * sin


class Looped(nn.Module):
    """Prelude, a core that runs several times, coda; recurrences may start from the prelude's output too."""

    def __init__(
        self, prelude=1, core=2, recurrences=3, coda=1, *, vocab=50, width=16, has_injection=True, **kind
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.prelude, self.core, self.coda = (
            nn.ModuleList(HandBlock(width, **kind) for _ in range(n)) for n in (prelude, core, coda)
        )
        self.adapter = nn.Linear(2 * width, width, bias=False) if has_injection else None
        self.norm = nn.RMSNorm(width, kind.get("eps", 1e-6))
        self.head = nn.Linear(width, vocab, bias=False)
        self.recurrences = recurrences
        self.is_norm_in_loop = kind.get("is_ouro", False)

    def forward(self, input_ids: Tensor, initial_state: Tensor | None = None, attention_mask=None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.prelude:
            x = block(x)
        state = x if initial_state is None else initial_state
        for _ in range(self.recurrences):
            if self.adapter is not None:
                state = self.adapter(torch.cat([state, x], -1))
            for block in self.core:
                state = block(state)
            if self.is_norm_in_loop:
                state = self.norm(state)
        for block in self.coda:
            state = block(state)
        return self.head(state if self.is_norm_in_loop else self.norm(state))

    @property
    def blocks(self) -> list[HandBlock]:
        return [*self.prelude, *self.core, *self.coda]


def make_looped(seed=0, **sizes) -> Looped:
    """Makes a looped module with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    module = Looped(**sizes).eval()
    with torch.no_grad():
        for block in module.blocks:
            block.q.weight.mul_(4)
            block.k.weight.mul_(4)
    return module


def with_weights_of(model) -> Looped:
    """The same loop as one of our own models with pre-norm blocks, with its weights."""
    d = model.description
    module = Looped(
        d.prelude, d.core, d.recurrences, d.coda, vocab=d.vocab_size, width=d.width, heads=d.num_heads,
        key_heads=d.num_kv_heads, mlp=d.mlp_width, eps=d.block.eps, theta=d.block.rotary.theta,
        has_injection=d.injection is not None,
    )  # fmt: skip
    with torch.no_grad():
        for hand, own in zip(module.blocks, model.blocks, strict=True):
            C = d.head_width
            parts = own.qkv.split([d.num_heads * C, d.num_kv_heads * C, d.num_kv_heads * C])
            gate_up = own.gate_up.chunk(2)
            ours = (*parts, own.attention_out, *gate_up, own.mlp_out)
            theirs = (hand.q, hand.k, hand.v, hand.o, hand.gate, hand.up, hand.down)
            for linear, weight in zip(theirs, ours, strict=True):
                linear.weight.copy_(weight)
            hand.norm_1.weight.copy_(own.attention_branch_input_norm)
            hand.norm_2.weight.copy_(own.mlp_branch_input_norm)
        module.embedding.weight.copy_(model.embedding)
        module.head.weight.copy_(model.embedding if model.head is None else model.head)
        module.norm.weight.copy_(model.final_norm)
        if module.adapter is not None:
            module.adapter.weight.copy_(model.adapter)
    return module.eval()


def golden_ouro() -> Looped:
    """The stored Ouro model's weights in a module written by hand."""
    config, weights = config_of("ouro"), weights_of("ouro")
    module = Looped(
        0, config["num_hidden_layers"], config["total_ut_steps"], 0, vocab=config["vocab_size"],
        width=config["hidden_size"], heads=config["num_attention_heads"],
        key_heads=config["num_key_value_heads"], mlp=config["intermediate_size"], eps=config["rms_norm_eps"],
        theta=config["rope_theta"], is_ouro=True, has_injection=False,
    )  # fmt: skip
    names = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "norm_1": "input_layernorm",
        "after_1": "input_layernorm_2", "norm_2": "post_attention_layernorm",
        "after_2": "post_attention_layernorm_2",
    }  # fmt: skip
    renamed = {
        f"core.{i}.{ours}.weight": weights[f"model.layers.{i}.{theirs}.weight"]
        for i in range(config["num_hidden_layers"])
        for ours, theirs in names.items()
    }
    renamed |= {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    module.load_state_dict({**renamed, "head.weight": weights["lm_head.weight"]})
    logits = stored("ouro", "reference")["logits"]
    with torch.no_grad():
        torch.testing.assert_close(
            module(stored("ouro", "inputs")["input_ids"].long()), logits, atol=1e-4, rtol=0
        )
    return module.eval()


def tiny_llama(**config):
    """A transformers Llama of two layers with random weights, in sdpa mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    made = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, "pad_token_id": 0, **config})
    made._attn_implementation = config.get("attn_implementation", "sdpa")
    return LlamaForCausalLM(made).eval()


def sequence_values(dataset, quantity: str, sequence_id: int) -> Tensor:
    """One quantity of one sequence's tokens, wherever it stands in the store."""
    at = dataset["sequence_id"].values.tolist().index(sequence_id)
    start, length = (int(dataset[f"sequence_{what}"].values[at]) for what in ("start", "length"))
    return torch.from_numpy(dataset[quantity].values[start : start + length].copy())
