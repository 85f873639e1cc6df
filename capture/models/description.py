"""The loop, described: all that tells one looped language model from another, and nothing about weights.

A model is a schedule of steps, a block kind, an injection, a rule for the initial state, a rule for the end
of a recurrence, and two scales. Checkpoint loaders and `random:` specs make descriptions; the general model
runs them.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ...errors import DescriptionError
from .loop_schedule import Schedule, prelude_core_coda


class Placement(NamedTuple):
    """The places of a block's RMS norms, the same in both of its halves."""

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
    """The make of a transformer block; all blocks of a model are of one kind."""

    norm: str = "pre"
    """A key of `NORMS`."""
    eps: float = 1e-6
    qk_norm: Literal["all_heads", "each_head"] | None = None
    """RMS norm of q and of k before the rotation: over all heads at once (OLMo-2), or over each head with one
    weight for all (Qwen3).
    """
    bias: Literal["qk", "qkv"] | None = None
    """Bias on the output of the attention's input matrix, before the rotation: qk as in Huginn, qkv as in
    Qwen2.
    """
    rotary: Rotary = field(default_factory=Rotary)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise DescriptionError(f"norm {self.norm!r} is not known; choose one of {', '.join(NORMS)}")


@dataclass(frozen=True, kw_only=True)
class Description(Schedule):
    """One looped model; sizes in channels, heads, tokens.

    What enters and leaves a recurrence (injection, a drawn initial state, a norm, an exit gate) is told of
    one loop: a schedule of several runs its phases one after the other on one residual stream.
    """

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
        super().__post_init__()
        if self.injection and not self.loops:
            raise DescriptionError(f"{self.notation} injects into a loop and has no core")
        if self.exit_gate and not self.loops:
            raise DescriptionError(f"{self.notation} has an exit gate and no loop to leave")
        if len(self.loops) > 1 and self._has_rules:
            raise DescriptionError(
                f"{self.notation} has {len(self.loops)} loops, and what enters or leaves a recurrence can "
                "only be told of one"
            )
        if self.num_blocks == 0:
            raise DescriptionError(f"{self.notation} has no layers")
        if {step.block for step in self.steps()} != set(range(self.num_blocks)):
            raise DescriptionError(f"{self.notation} does not run blocks 0 to {self.num_blocks - 1}")
        if self.num_heads % self.num_kv_heads:
            raise DescriptionError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads")
        if self.head_width % 2:
            raise DescriptionError(f"rotary positions need an even head width, got {self.head_width}")

    @property
    def notation(self) -> str:
        """The paper's notation, such as (2,4x32,2)I, with I for injection."""
        return super().notation + ("I" if self.injection else "")

    @property
    def closes_with_norm(self) -> bool:
        """Whether a norm still stands between the last block and the head."""
        return self.recurrence_end != "norm" or self.visits[-1][0].recurrence < 0

    @property
    def _has_rules(self) -> bool:
        """Whether a recurrence is more than its blocks."""
        is_plain = self.initial_state == "prelude" and self.recurrence_end is None
        return bool(self.injection or self.exit_gate or self.norm_before_coda or not is_plain)

    def document(self) -> dict[str, Any]:
        """Returns what a plan records, as JSON: every field; the schedule as its counts if they suffice."""
        facts = asdict(self)
        phases = facts.pop("phases")
        return (self.counts._asdict() if self.counts else {"phases": phases}) | facts

    def with_recurrences(self, recurrences: int) -> "Description":
        """Returns the description of the same model with another number of recurrences."""
        if not self.loops:
            raise DescriptionError(
                f"{self.notation} has no core to repeat; "
                "give a window of its layers with --loop first-lastxtimes"
            )
        if self.counts is None:
            raise DescriptionError(f"{self.notation} has no one core; its recurrences are its own")
        if recurrences < 1:
            raise DescriptionError(f"recurrences must be at least 1, got {recurrences}")
        return replace(self, phases=prelude_core_coda(*self.counts._replace(recurrences=recurrences)))

    def with_loop(self, first: int, last: int, recurrences: int) -> "Description":
        """Returns a feedforward model's description with layers first..last, both included, run as a core."""
        if self.loops:
            raise DescriptionError(f"{self.notation} is looped already; --loop takes a feedforward model")
        if not 0 <= first <= last < self.num_blocks:
            raise DescriptionError(
                f"layers {first}-{last} are not in this model, which has 0 to {self.num_blocks - 1}"
            )
        if recurrences < 1:
            raise DescriptionError(f"recurrences must be at least 1, got {recurrences}")
        after = self.num_blocks - last - 1
        return replace(self, phases=prelude_core_coda(first, last - first + 1, recurrences, after))
