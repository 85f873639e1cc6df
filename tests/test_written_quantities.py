"""Every quantity that a capture or a watch takes on is written by it: no name is accepted and then forgotten.

An array that nothing fills reads as undefined everywhere, and would pass for a model that is not finite.
"""

from functools import cache

import numpy as np
import pytest
import torch

import looptap
from looptap.capture.store.quantities import GROUPS, QUANTITIES, Quantity
from looptap.errors import WatchError
from looptap.tests.golden_files import GOLDEN, stored
from looptap.tests.watched_modules import golden_ouro

IDS_ST = stored("ouro", "inputs")["input_ids"].long()


def wanted(name: str) -> dict[str, tuple[str, ...]]:
    return (
        {"quantities": ("residual_norm",), "states": ("all",)} if name == "state" else {"quantities": (name,)}
    )


@cache
def captured(name: str):
    """Ouro has all that there is to capture: a loop, a head, an exit gate."""
    return looptap.capture(str(GOLDEN / "ouro"), IDS_ST.tolist(), **wanted(name))


@cache
def watched(name: str):
    """None where watching refuses the quantity by name."""
    module = golden_ouro()
    try:
        with looptap.watch(module, "core.*", **wanted(name)) as found, torch.no_grad():
            module(IDS_ST)
    except WatchError as error:
        assert f"{name} cannot be captured" in str(error)
        return None
    return found.dataset()


def missing(dataset, name: str) -> int:
    """How many numbers of the quantity are undefined where one is due."""
    quantity, array = QUANTITIES[name], dataset[name]
    filled = dataset["token_sequence" if quantity.axes[0] == "token" else "sequence_id"].values >= 0
    array = array.isel({quantity.axes[0]: filled})
    if "depth" in array.dims:
        array = array.isel(depth=dataset["recurrence"].values >= quantity.first_recurrence)
    assert array.size
    values = array.values
    return int((values == -1).sum() if quantity.dtype == "int32" else (~np.isfinite(values)).sum())


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.slow
def test_a_quantity_that_is_accepted_is_written(name):
    dataset = captured(name)
    assert missing(dataset, name) == 0
    by_watching = watched(name)
    if by_watching is not None:
        assert missing(by_watching, name) == 0
        np.testing.assert_allclose(by_watching[name].values, dataset[name].values, atol=5e-5, rtol=5e-5)


def test_watching_takes_on_what_blocks_show():
    """Quantities that watching refuses read the head or compare whole sequences."""
    refused = [name for name in QUANTITIES if watched(name) is None]
    assert {QUANTITIES[name].group for name in refused} == {"lens", "exit", "distances"}


@pytest.mark.parametrize("group", ["residual", "attention"])
def test_a_forgotten_quantity_would_be_seen(group, monkeypatch):
    axes = ("token", "depth", "head") if group == "attention" else ("token", "depth")
    name = f"{group}_kurtosis"
    monkeypatch.setitem(QUANTITIES, name, Quantity(name, axes, group, "", "what nobody measures"))
    monkeypatch.setitem(GROUPS, group, (*GROUPS[group], name))
    assert missing(captured(name), name) > 0
    assert missing(watched(name), name) > 0
