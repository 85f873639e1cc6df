"""The loop, described: all that tells one looped language model from another, and nothing about weights.

A model is an ordered list of steps over prelude, core and coda, a block kind, an injection, a rule for the
initial state, a rule for the end of a recurrence, and two scales. Checkpoint loaders and `random:` specs make
descriptions; the general model runs them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ...errors import DescriptionError

Stage = Literal["prelude", "core", "coda"]
STAGES: tuple[Stage, ...] = ("prelude", "core", "coda")


class Step(NamedTuple):
    """The address of one block invocation."""

    depth: int  # realised depth, from 0
    stage: Stage
    layer: int  # place of the block inside its stage
    recurrence: int  # pass through the core, from 0; -1 outside the core


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Blocks before, inside and after the loop, and how often it runs; without a loop all are prelude."""

    prelude: int
    core: int
    recurrences: int
    coda: int

    @property
    def num_blocks(self) -> int:
        """Blocks with weights of their own."""
        return self.prelude + self.core + self.coda

    @property
    def depth(self) -> int:
        """Block invocations of one forward pass."""
        return self.prelude + self.core * self.recurrences + self.coda

    @property
    def notation(self) -> str:
        """The paper's: (prelude,core×recurrences,coda)."""
        core = f"{self.core}x{self.recurrences}" if self.core else "0"
        return f"({self.prelude},{core},{self.coda})"

    def steps(self) -> Iterator[Step]:
        """Every block invocation in the order they run."""
        depth = 0
        sizes = ((self.prelude, 1), (self.core, self.recurrences), (self.coda, 1))
        for stage, (layers, recurrences) in zip(STAGES, sizes, strict=True):
            for recurrence in range(recurrences):
                for layer in range(layers):
                    yield Step(depth, stage, layer, recurrence if stage == "core" else -1)
                    depth += 1


class Placement(NamedTuple):
    """Where a block has its RMS norms, in both of its halves alike."""

    branch_input: bool
    branch_output: bool
    stream: bool  # on the residual stream, after the add


NORMS: dict[str, Placement] = {
    "pre": Placement(True, False, False),
    "ouro": Placement(True, True, False),
    "huginn": Placement(True, False, True),
    "olmo2": Placement(False, True, False),
}


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's stretching of slow rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions over the whole head width."""

    theta: float = 10_000.0
    interleaved: bool = False
    """Pairs are channels (2j, 2j+1), as in Huginn, instead of (j, j + C/2)."""
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one transformer block is made of; every block of a model is of one kind."""

    norm: str = "pre"
    """A key of `NORMS`."""
    eps: float = 1e-6
    qk_norm: Literal["all_heads", "each_head"] | None = None
    """RMS norm of q and of k before the rotation: over all heads at once (OLMo-2), or over each head with one
    weight for all (Qwen3).
    """
    bias: Literal["qk", "qkv"] | None = None
    """Of what comes out of the attention's input matrix, before the rotation: qk as in Huginn, qkv as in
    Qwen2.
    """
    rotary: Rotary = field(default_factory=Rotary)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise DescriptionError(f"norm {self.norm!r} is not known; choose one of {', '.join(NORMS)}")


@dataclass(frozen=True, kw_only=True)
class Description(Loop):
    """One looped model; sizes in channels, heads, tokens."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocab_size: int
    max_positions: int
    block: Block
    injection: Literal["linear"] | None = None
    """linear: a recurrence starts from Linear(concat(state, prelude output)), state first, without bias."""
    initial_state: Literal["prelude", "normal", "truncated"] = "prelude"
    """What enters the first recurrence: the prelude's output, or a draw per sequence and position; truncated:
    from a normal cut at three of its standard deviations (Huginn and the retrofits).
    """
    initial_std: float = 1.0
    """Standard deviation of the draw, before it is cut."""
    recurrence_end: Literal["norm"] | None = None
    """norm: the final norm closes every recurrence and none stands before the head (Ouro)."""
    exit_gate: bool = False
    """A linear gate on what every recurrence leaves (Ouro); recorded, and never the end of the loop."""
    norm_before_coda: bool = False
    """The final norm is applied between core and coda too (Huginn)."""
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tied_head: bool = False

    def __post_init__(self) -> None:
        if (self.core == 0) != (self.recurrences == 0):
            raise DescriptionError(f"a core of {self.core} layers cannot run {self.recurrences} times")
        if self.injection and not self.core:
            raise DescriptionError(f"{self.notation} injects into a loop and has no core")
        if self.exit_gate and not self.core:
            raise DescriptionError(f"{self.notation} has an exit gate and no loop to leave")
        if min(self.prelude, self.core, self.coda) < 0 or self.num_blocks == 0:
            raise DescriptionError(f"{self.notation} has no layers")
        if self.num_heads % self.num_kv_heads:
            raise DescriptionError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads")
        if self.head_width % 2:
            raise DescriptionError(f"rotary positions need an even head width, got {self.head_width}")

    @property
    def notation(self) -> str:
        """The paper's, with I for injection."""
        return super().notation + ("I" if self.injection else "")

    @property
    def closes_with_norm(self) -> bool:
        """Whether a norm still stands between the last block and the head."""
        return self.recurrence_end != "norm" or self.coda > 0

    def with_recurrences(self, recurrences: int) -> "Description":
        """The same model run another number of times."""
        if not self.core:
            raise DescriptionError(
                f"{self.notation} has no core to repeat; "
                "give a window of its layers with --loop first-lastxtimes"
            )
        if recurrences < 1:
            raise DescriptionError(f"recurrences must be at least 1, got {recurrences}")
        return replace(self, recurrences=recurrences)

    def with_loop(self, first: int, last: int, recurrences: int) -> "Description":
        """A feedforward model with layers first..last, both included, run as a core."""
        if self.core:
            raise DescriptionError(f"{self.notation} is looped already; --loop takes a feedforward model")
        if not 0 <= first <= last < self.num_blocks:
            raise DescriptionError(
                f"layers {first}-{last} are not in this model, which has 0 to {self.num_blocks - 1}"
            )
        if recurrences < 1:
            raise DescriptionError(f"recurrences must be at least 1, got {recurrences}")
        return replace(
            self,
            prelude=first,
            core=last - first + 1,
            recurrences=recurrences,
            coda=self.num_blocks - last - 1,
        )
