"""One capture of the architecture study: a randomly initialised loop, named by its place on the study's axes.

The axes are the fields of `Cell`: the study makes a model's spec of them, and its analysis reads them back
from what the plan in a store says of the model.
"""

from dataclasses import dataclass, fields

from ...errors import ArchitectureError
from .plan import StoredModel


@dataclass(frozen=True)
class Cell:
    """One combination with its seed; where there is a default, it is the paper's (arXiv 2604.11791, 4.2)."""

    norm: str
    injection: bool
    layers: int = 12
    recurrences: int = 128
    width: int = 256
    gain: float = 0.32
    embedding_std: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the cell's store."""
        injection = "injection" if self.injection else "no-injection"
        return (
            f"{self.norm}-{injection}-{self.layers}x{self.recurrences}"
            f"-width{self.width}-gain{_short(self.gain)}-embedding{_short(self.embedding_std)}-seed{self.seed}"
        )

    def spec(self, head_width: int) -> str:
        """Returns the spec of the model, as `looptap capture` takes it."""
        return (
            f"random:(0,{self.layers}x{self.recurrences},0){'I' if self.injection else ''},norm={self.norm},"
            f"width={self.width},heads={max(1, self.width // head_width)},gain={_short(self.gain)},"
            f"embedding_std={_short(self.embedding_std)},seed={self.seed}"
        )


AXES = [field.name for field in fields(Cell) if field.name != "seed"]


def cell_of(model: StoredModel) -> Cell:
    """Returns the cell that a model was made from.

    Args:
        model: what a store's plan says of it; the scales and the seed stand in its spec alone.
    Raises:
        ArchitectureError: it is not of an architecture study.
    """
    spec = str(model.spec)
    options = dict(each.split("=") for each in spec.rpartition(")")[2].split(",") if "=" in each)
    if not spec.startswith("random:") or not {"gain", "embedding_std", "seed"} <= options.keys():
        raise ArchitectureError(f"{spec} is no model of an architecture study")
    return Cell(
        norm=model.norm,
        injection=model.injection is not None,
        layers=model.core,
        recurrences=model.recurrences,
        width=model.width,
        gain=float(options["gain"]),
        embedding_std=float(options["embedding_std"]),
        seed=int(options["seed"]),
    )


def _short(number: float) -> str:
    """Returns the shortest text that reads back as the number."""
    return repr(float(number)).removesuffix(".0")
