"""Shares of prediction and suppression neurons in every block, from the plan of a store.

A neuron's effect on the logits is taken from the model's weights when the store is made
(`capture.probes.neurons` has the definition and its sources); nothing of it depends on the data, and reading
it takes no model.
"""

from pathlib import Path

import numpy as np
import xarray as xr

from ...capture.store.plan import plan_of
from ...errors import CannotTellError, NoNeuronsError
from ..depth_axis import Depths
from ..streaming import Arrays
from ..walk import Analysis, answer

KINDS = ("prediction", "suppression")


class _Recorded:
    """An answer that is read from the plan, so that no sequence adds to it."""

    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        try:
            self._found = plan_of(dataset).recorded_neurons()
        except NoNeuronsError as error:
            raise CannotTellError(str(error)) from error

    def add(self, arrays: Arrays) -> None:
        raise AssertionError("it needs no quantity")

    def result(self) -> xr.Dataset:
        blocks, levels = self._found["blocks"], self._found["quantiles"]
        share_KB = [[block[kind] for block in blocks] for kind in KINDS]
        kurtosis_QB = np.array([block["kurtosis"] for block in blocks], np.float64).T
        return xr.Dataset(
            {
                "share": (("kind", "block"), share_KB, {"units": "share of neurons"}),
                "kurtosis": (("quantile", "block"), kurtosis_QB, {"units": "3 for a normal distribution"}),
                "num_neurons": ("block", [block["num_neurons"] for block in blocks], {"units": "neurons"}),
            },
            {
                "kind": list(KINDS),
                "quantile": levels,
                "block": np.arange(len(blocks)),
                "stage": ("block", [block["stage"] for block in blocks]),
                "layer": ("block", [block["layer"] for block in blocks]),
            },
            {"threshold": self._found["threshold"]},
        )


_NEURONS = Analysis(
    "neurons",
    "Prediction and suppression neurons",
    (),
    "share of a block's MLP neurons whose effect on the logits, W_U w_out, has a kurtosis over all tokens "
    "above the threshold and a positive (prediction) or negative skew (suppression), from the weights alone "
    "(arXiv 2401.12181, section 5; 2406.19384, section 5.3)",
    _Recorded,
)
ANALYSES = [_NEURONS]


def neurons(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Shares of prediction and suppression neurons of every block.

    Returns:
        Dataset: `share` [kind, block], `kurtosis` [quantile, block] of the neurons' logit effects (3 for a
        normal distribution; NaN where no neuron writes anything), `num_neurons` [block], with coordinates
        stage and layer on block, which counts blocks in the order they first run; attribute `threshold`, of
        the kurtosis.
    Raises:
        CannotTellError: none were recorded, and the message says why.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _NEURONS)
