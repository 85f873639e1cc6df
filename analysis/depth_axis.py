"""The depth axis of a store: which block invocation each depth is, and which of them are loops.

A loop is a stage whose blocks run more than one recurrence, as a rectangle of recurrences and layers. A store
has none (a feedforward model), one, or several: two that run one after the other, or two stacks of which one
runs inside the other's recurrences. What is about one loop alone refuses several, and is asked of one after
the other with `of_loop`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from ..errors import CannotTellError

STAGES = ("prelude", "core", "coda")  # stages of a Dataset that does not name them
Places = slice | np.ndarray


@dataclass(frozen=True)
class Depths:
    """The depth axis of a store, int [depth] each, and the names of its stages by number."""

    stage: np.ndarray
    layer: np.ndarray
    recurrence: np.ndarray
    stages: tuple[str, ...] = STAGES

    @cached_property
    def loops(self) -> list[np.ndarray]:
        """Depths of each loop's blocks, int [recurrences, layers], in the order in which loops begin."""
        loops = []
        for stage in dict.fromkeys(self.stage[self.recurrence >= 0].tolist()):
            depth_C = np.flatnonzero((self.stage == stage) & (self.recurrence >= 0))
            loop_RL = depth_C.reshape(int(self.recurrence[depth_C].max()) + 1, -1)
            loops.append(loop_RL[:, np.argsort(self.layer[loop_RL[0]])])
        return loops

    @property
    def loop_names(self) -> list[str]:
        """The stage of each loop."""
        return [self.stages[self.stage[loop_RL[0, 0]]] for loop_RL in self.loops]

    @property
    def core_RL(self) -> np.ndarray:
        """Depths of the one loop's blocks, int [recurrences, layers]; empty where there is no loop.

        Raises:
            CannotTellError: there are several.
        """
        if len(self.loops) > 1:
            raise CannotTellError(
                f"the model has {len(self.loops)} loops, {', '.join(self.loop_names)}: this is asked of one "
                "alone, which looptap.analysis.depth_axis.of_loop gives"
            )
        return self.loops[0] if self.loops else np.empty((0, 0), np.int64)

    @cached_property
    def steps(self) -> list[tuple[Places, Places]]:
        """Depths of each loop from its second recurrence on, and the same layers' one recurrence earlier."""
        pairs = []
        for loop_RL in self.loops:
            later_C, earlier_C = loop_RL[1:].ravel(), loop_RL[:-1].ravel()
            order = later_C.argsort()
            pairs.append((_places(later_C[order]), _places(earlier_C[order])))
        return pairs

    def __len__(self) -> int:
        return len(self.stage)


def depths_of(dataset: xr.Dataset) -> Depths:
    """Reads the depth axis of a Dataset laid out like a store."""
    axis = (dataset[name].values.astype(np.int64) for name in ("stage", "layer", "recurrence"))
    return Depths(*axis, stages=stages_of(dataset))


def stages_of(dataset: xr.Dataset) -> tuple[str, ...]:
    """Returns the names of the stages by the number that stands in the coordinate `stage`."""
    names = dataset["stage"].attrs.get("flag_meanings")
    return tuple(names.split()) if names else STAGES


def of_loop(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """Returns the Dataset of a store with the loop of one stage; all other blocks count as outside of it.

    Returns:
        the same but for the coordinate `recurrence`, -1 at other loops, and the attribute `loop`, the name.
    Raises:
        CannotTellError: no loop is of that stage.
    """
    depths = depths_of(dataset)
    if name not in depths.loop_names:
        raise CannotTellError(
            f"no loop is called {name!r}: choose from {', '.join(depths.loop_names) or 'none'}"
        )
    recurrence = dataset["recurrence"].copy(
        data=np.where(depths.stage == depths.stages.index(name), depths.recurrence, -1)
    )
    return dataset.assign_coords(recurrence=recurrence).assign_attrs(loop=name)


def loops_apart(dataset: xr.Dataset) -> list[xr.Dataset]:
    """Returns the Dataset itself, or if it has several loops the Dataset of each."""
    names = depths_of(dataset).loop_names
    return [of_loop(dataset, name) for name in names] if len(names) > 1 else [dataset]


def _places(depth_C: np.ndarray) -> Places:
    """Returns depths as a slice if they follow one another, since that is read without a copy."""
    if len(depth_C) and (np.diff(depth_C) == 1).all():
        return slice(int(depth_C[0]), int(depth_C[-1]) + 1)
    return depth_C
