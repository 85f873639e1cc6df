"""The plan: a dataset, a model and settings, resolved once into units, before anything runs.

The same inputs always give the same plan. A worker reads what it needs from the store that the plan made;
plans are never sent to workers.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import PlanError
from . import token_memory
from .data import Dataset, check_rows, read_dataset
from .models.description import Description
from .models.load import ModelSource, find_model
from .models.model import LoopedModel
from .models.starts import WORDS as INITIAL_STATES
from .models.starts import StatesFile, check_start, open_states
from .selection import select_depths, select_halves, select_tokens
from .settings import CaptureSettings
from .store.layout import ArraySpec, Coordinate
from .store.plan import StoredModel, StoredPlan, StoredSettings, StoredTokenizer
from .store.quantities import GROUPS, QUANTITIES, resolve_quantities
from .tokenizer import model_tokenizer
from .units import Slots, array_specs, default_unit_tokens, depth_coordinates, pack
from .versions import versions


@dataclass(frozen=True)
class Plan:
    """What will be captured, and where each token goes."""

    settings: CaptureSettings
    source: ModelSource
    dataset: Dataset
    quantities: tuple[str, ...]
    state_depths: tuple[int, ...]
    device: str
    dtype: str
    slots: Slots
    initial_states: StatesFile | None = None

    @property
    def description(self) -> Description:
        return self.source.description

    @property
    def store(self) -> str | Path:
        """Path or URL of the store."""
        return self.settings.run.store

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a forward pass: the setting; or the device's default, and fewer where maps of all
        pairs of blocks would keep more than the setting's memory.
        """
        if self.settings.measure.batch_tokens:
            return self.settings.measure.batch_tokens
        # on two cores 512 tokens ran as fast as 2048 within 3 %, and keep a quarter of the loop for the gaps
        tokens = 512 if self.device == "cpu" else 16_384
        if not (of_token := token_memory.map_bytes(self.description, self.quantities, self.dtype)):
            return tokens
        return max(1, min(tokens, self._gap_memory_bytes // of_token))

    @property
    def longest_batch(self) -> int:
        """Most tokens that one forward pass will see."""
        longest = max(self.batch_tokens, self.dataset.longest)
        return min(self.slots.unit_tokens, self.dataset.num_tokens, longest)

    @property
    def kept_bytes(self) -> int:
        """Bytes that one batch would keep until the last recurrence."""
        return self.longest_batch * token_memory.kept_bytes(self.description, self.quantities, self.dtype)

    @property
    def gap_method(self) -> str | None:
        """How gaps and the lens get what the last recurrence leaves; None where neither is measured."""
        if not self.kept_bytes:
            return None
        return "keep states" if self.kept_bytes <= self._gap_memory_bytes else "run twice"

    @property
    def _gap_memory_bytes(self) -> int:
        return int(self.settings.measure.gap_memory_gib * 2**30)

    def load_model(self) -> LoopedModel:
        """Loads the model with its weights on the plan's device."""
        return self.source.load(self.device, self.dtype)

    def arrays(self) -> dict[str, ArraySpec]:
        """Returns the store's arrays that units fill."""
        d = self.description
        sizes = {
            "depth": d.depth,
            "depth_other": d.depth,
            "recurrence": d.recurrences,
            "head": d.num_heads,
            "hidden": d.width,
            "depth_state": len(self.state_depths),
        }
        return array_specs(self.quantities, self.slots, sizes, self.dtype, self.settings.measure.state_codec)

    def coordinates(self) -> dict[str, Coordinate]:
        """Returns all that is known of every slot before the capture."""
        depths = self.state_depths if "state" in self.quantities else None
        has_pairs = any("depth_other" in QUANTITIES[name].axes for name in self.quantities)
        steps = list(self.description.steps())
        return {**depth_coordinates(steps, depths, has_pairs=has_pairs), **self.slots.coordinates()}

    def stored(self) -> StoredPlan:
        """Returns the plan as the store records it: contents of model and data, not paths of this machine."""
        model, data, measure = self.settings.model, self.settings.data, self.settings.measure
        states, tokenizer = self.initial_states, self.dataset.tokenizer
        settings = {
            **vars(measure),
            "quantities": self.quantities,
            "initial_state": measure.initial_state if states is None else states.identity(),
            "unit_tokens": self.slots.unit_tokens,
            "batch_tokens": self.batch_tokens,
        }
        return StoredPlan(
            model=StoredModel.of(self.source.identity()),
            data=self.dataset.identity,
            tokenizer=tokenizer
            and StoredTokenizer(
                name=tokenizer.name,
                sha256=tokenizer.sha256,
                special_tokens=None if data.special_tokens == "model" else data.special_tokens,
                beginning=tuple(self.dataset.beginning) or None,
            ),
            settings=StoredSettings(
                field=data.field,
                limit=data.limit,
                loop=model.loop,
                recurrences=model.recurrences,
                dtype=self.dtype,
                device=self.device,
                **settings,
            ),
            **self.slots.facts(),
            gap_method=self.gap_method,
            dtype=self.dtype,
            backend="pytorch" if self.device == "cpu" else "triton",
            versions=versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def make_plan(
    settings: CaptureSettings, source: ModelSource | None = None, dataset: Dataset | None = None
) -> Plan:
    """Checks everything that can be checked before work begins, and lays out the units.

    Args:
        source: the settings' model, where it was found already.
        dataset: the data, where it is at hand already: the settings' file is then not looked at.
    Raises:
        UserError: ModelError, DataError, PlanError and others; nothing was written.
    """
    settings.check()
    model, data, measure = settings.model, settings.data, settings.measure
    source = source or find_model(model.model, model.loop, model.recurrences)
    d = source.description
    names = [name for text in measure.quantities for name in text.split(",")]
    names += ["state"] if measure.states else []
    quantities = resolve_quantities(names, absent_quantities(d))
    if "state" in quantities and not measure.states:
        raise PlanError("the quantity state needs --states, for example --states core[all]@last")
    state_depths = select_depths(measure.states, d)
    select_tokens(measure.tokens, 0, 0, 1)  # its form, checked before the data is read
    select_halves(measure.zero, d)
    check_start(measure.initial_state, d)
    if measure.prelude_output != "model" and not d.loops:
        raise PlanError(f"--prelude-output {measure.prelude_output}: {d.notation} has no loop after it")
    if dataset is None:
        tokenizer = model_tokenizer(source, data.special_tokens)
        dataset = read_dataset(data.data, tokenizer, field=data.field, limit=data.limit)
    if data.special_tokens != "model" and not dataset.is_text:
        raise PlanError(f"--special-tokens {data.special_tokens}: the data are token ids, and no text")
    check_rows(dataset, d.vocab_size, d.max_positions)
    slots = _slots(settings, dataset, keeps_states="state" in quantities)
    device = resolve_device(model.device, is_here=settings.run.engine != "ray")
    _check_kernels(d, device)
    source.check_memory(device, model.dtype)
    return Plan(
        settings=settings,
        source=source,
        dataset=dataset,
        quantities=quantities,
        state_depths=state_depths,
        device=device,
        dtype=source.resolve_dtype(model.dtype),
        slots=slots,
        initial_states=_states_file(measure.initial_state, dataset, d),
    )


def absent_quantities(description: Description) -> dict[str, str]:
    """Returns the quantities that a model does not have, with the reason."""
    absent = {}
    if not description.loops:
        reason = f"{description.notation} has no loop; repeat a window of its layers with --loop"
        absent = dict.fromkeys((*GROUPS["lens"], *GROUPS["exit"], "attention_step", "attention_gap"), reason)
    elif description.only_loop is None:
        reason = f"{description.notation} has several loops, and it reads the state of one"
        absent = dict.fromkeys((*GROUPS["lens"], *GROUPS["exit"]), reason)
    elif not description.exit_gate:
        absent = dict.fromkeys(GROUPS["exit"], "this model has no exit gate")
    return absent


def resolve_device(device: str, is_here: bool = True) -> str:
    """Returns the device that "auto" stands for here.

    Args:
        is_here: the model will run on this machine, so a GPU must be here.
    Raises:
        PlanError: a GPU is asked for and torch sees none of that number.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise PlanError(f"device {device!r} is not known; use cpu, cuda or cuda:NUMBER")
    if is_here and wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device


def _check_kernels(description: Description, device: str) -> None:
    """Refuses, before work begins, what the attention kernels would refuse in every unit."""
    width = description.head_width
    if device.startswith("cuda") and (width % 8 or not 16 <= width <= 256):
        raise PlanError(
            f"heads are {width} wide, and a GPU takes multiples of 8 from 16 to 256; give --device cpu"
        )


def _slots(settings: CaptureSettings, dataset: Dataset, keeps_states: bool) -> Slots:
    rows, measure = dataset.rows, settings.measure
    unit_tokens = _unit_tokens(measure.unit_tokens, dataset)
    units = tuple(pack([len(row) for row in rows], unit_tokens))
    kept = None
    if keeps_states and measure.tokens != "all":
        tokens, seed = measure.tokens, measure.seed
        kept = {row: select_tokens(tokens, seed, row, len(rows[row])) for unit in units for row in unit}
    return Slots(rows, units, unit_tokens, kept)


def _unit_tokens(wanted: int | None, dataset: Dataset) -> int:
    if wanted is None:
        return default_unit_tokens([dataset.longest])
    if (longest := dataset.longest) > wanted:
        row = [len(row) for row in dataset.rows].index(longest)
        raise PlanError(
            f"row {row} has {longest} tokens and a unit of {wanted} slots holds whole sequences only; "
            f"give --unit-tokens {longest} or more"
        )
    return wanted


def _states_file(wanted: str | None, dataset: Dataset, description: Description) -> StatesFile | None:
    if wanted is None or wanted in INITIAL_STATES:
        return None
    return open_states(Path(wanted), [len(row) for row in dataset.rows], description.width)
