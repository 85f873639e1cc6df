"""Inspection of one short prompt: a capture in memory, full attention maps, and the logit lens.

Its maps are the one place where T×T attention is written down, and only within a stated bound of memory.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor

from ..errors import PlanError
from .data import make_dataset
from .models.load import find_model
from .models.model import LoopedModel
from .models.starts import initial_state
from .models.tap import Packed
from .plan import Plan, make_plan
from .probes.contraction import Contraction, contraction
from .run import prepare_store
from .settings import CaptureSettings, DataSettings, InspectSettings, MeasureSettings, RunSettings
from .store.reading.reader import open_store
from .taps.maps import Maps
from .tokenizer import model_tokenizer
from .worker import Worker

LENS_TOKENS = 3  # how many of the likeliest next tokens are shown

Lens = list[tuple[str, float]]  # tokens and their probability, likeliest first


@dataclass(frozen=True)
class LensRow:
    """The last token of the prompt after one recurrence; of a feedforward model, after all of it."""

    recurrence: int | None
    relative_step: float | None
    """‖x_t − x_{t−1}‖ / ‖x_t‖ of the last core layer."""
    relative_gap: float | None
    """‖x_t − x_last‖ / ‖x_last‖ of the last core layer."""
    entropy: float
    """Entropy of attention rows, nats, mean over the heads of the core, or of all layers without a core."""
    lens: Lens
    """Likeliest next tokens, read through the model's own final norm and head."""
    exit_probability: float | None = None
    """Chance that the exit gate leaves after this recurrence, of a model that has one."""


@dataclass(frozen=True)
class Inspection:
    """The result of running one prompt."""

    dataset: xr.Dataset
    """A capture of the prompt alone with every state, and `attention` (depth, head, query, key), float32."""
    tokens: list[str]
    lens: list[Lens]
    """Likeliest next tokens after the last token, by recurrence; one entry for a feedforward model."""
    contraction: Contraction | None = None
    """Contraction factors of every token of the prompt; None for a feedforward model, or if not asked for."""

    def rows(self) -> Iterator[LensRow]:
        """Yields what happens to the last token, a row a recurrence."""
        last = self.dataset.isel(token=-1)
        core = last.isel(depth=last.stage.values == 1)
        if not core.sizes["depth"]:
            yield LensRow(None, None, None, float(last.attention_entropy.mean()), self.lens[0])
            return
        end = core.isel(depth=-1)
        for recurrence, lens in enumerate(self.lens):
            here = core.isel(depth=core.recurrence.values == recurrence)
            block = here.isel(depth=-1)
            step = float(block.step_norm / block.residual_norm) if recurrence else None
            gap = float(block.gap_norm / end.residual_norm)
            leaves = float(last.exit_probability[recurrence]) if "exit_probability" in last else None
            yield LensRow(recurrence, step, gap, float(here.attention_entropy.mean()), lens, leaves)


def inspect_prompt(settings: InspectSettings) -> Inspection:
    """Runs one prompt, once as a capture and once more for its maps.

    Raises:
        ModelError, DataError: as for a capture.
        PlanError: maps over `map_memory_gib`, or `contraction_recurrences` below 0.
    """
    with tempfile.TemporaryDirectory() as directory:
        plan = _plan(settings, Path(directory) / "prompt.zarr")
        _check_maps(plan, settings.map_memory_gib)
        model = plan.load_model()
        worker = Worker(model, prepare_store(plan))
        worker.run(0)
        dataset = open_store(plan.store).load()
        tap = Maps(plan.description, plan.dataset.num_tokens, model.device)
        head_input_ND = worker.forward(0, tap)
    tokenizer = plan.dataset.tokenizer
    assert tokenizer is not None
    with torch.inference_mode():
        read = [model.read_out(state_ND) for state_ND in tap.loop_states] or [head_input_ND[-1:]]
    maps = (("depth", "head", "query", "key"), tap.maps_LHTT.cpu().numpy())
    return Inspection(
        dataset=dataset.assign(attention=maps),
        tokens=[tokenizer.decode([int(i)]) for i in plan.dataset.rows[0]],
        lens=[_likeliest(model, state_ND, tokenizer.decode) for state_ND in read],
        contraction=_contraction(model, plan, settings.contraction_recurrences),
    )


def _contraction(model: LoopedModel, plan: Plan, recurrences: int) -> Contraction | None:
    d, (row,), seed = plan.description, plan.dataset.rows, plan.settings.measure.seed
    if not (d.only_loop and recurrences):
        return None
    batch = Packed(torch.from_numpy(row.astype("int64")).to(model.device), (len(row),))
    state_ND = initial_state(None, d, seed, [0], batch.lengths, None)
    state_ND = None if state_ND is None else state_ND.to(model.device)
    return contraction(model, batch, state_ND, recurrences=recurrences)


def _plan(settings: InspectSettings, store: Path) -> Plan:
    if settings.contraction_recurrences < 0:
        given = settings.contraction_recurrences
        raise PlanError(f"contraction_recurrences must be at least 1, or 0 to leave it out, got {given}")
    if not settings.prompt:
        raise PlanError("the prompt is empty; give some text with --prompt")
    model = settings.model
    source = find_model(model.model, model.loop, model.recurrences)
    if (tokenizer := model_tokenizer(source)) is None:
        raise PlanError(f"{model.model} has no tokenizer.json, so it cannot read a prompt")
    dataset = make_dataset([settings.prompt], tokenizer)
    wanted = CaptureSettings(
        model=model,
        data=DataSettings(data=Path("prompt")),
        measure=MeasureSettings(
            states=("all",),
            seed=settings.seed,
            unit_tokens=dataset.num_tokens,  # no empty slots
        ),
        run=RunSettings(store=store),
    )
    return make_plan(wanted, source, dataset)


def _check_maps(plan: Plan, bound_gib: float) -> None:
    d, T = plan.description, plan.dataset.num_tokens
    row_bytes = d.depth * d.num_heads * 4
    if not row_bytes * T * T <= bound_gib * 2**30:  # a bound that is no number holds nothing
        raise PlanError(
            f"attention maps of {T} tokens at {d.depth} depths take {row_bytes * T * T / 2**30:.2g} GiB, "
            f"and the bound is {bound_gib:g}: {int((bound_gib * 2**30 / row_bytes) ** 0.5)} tokens fit; "
            "shorten the prompt or raise --map-memory-gib"
        )


@torch.inference_mode()
def _likeliest(model: LoopedModel, head_input_ND: Tensor, decode: Callable[[list[int]], str]) -> Lens:
    share, token = model.logits(head_input_ND)[-1].float().softmax(-1).topk(LENS_TOKENS)
    return [(decode([int(t)]), float(p)) for t, p in zip(token, share, strict=True)]
