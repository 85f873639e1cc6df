"""looptap: activation capture for looped (depth-recurrent) language models.

model = looptap.load_model("random:(0,12x32,0)I,norm=pre")
dataset = looptap.capture("random:(0,12x32,0)I", ["Once upon a time"])  # in memory, an xarray Dataset
with looptap.watch(module, "layers.*") as watched:  # any torch.nn.Module, as it is
    module(token_ids)
dataset = looptap.open("run.zarr")  # what `looptap capture` wrote, lazily
for rows in looptap.batches("run.zarr", depths=[12], seed=0): ...  # its states in random order, for training
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name: the module that has it, and its name there; imported when it is first used, so that looptap
# alone loads neither torch nor zarr
_PUBLIC = {
    "UserError": ("errors", "UserError"),
    "WatchError": ("errors", "WatchError"),
    "batches": ("capture.store.reading.batches", "make_batches"),
    "load_model": ("capture.models.load", "load_model"),
    "open": ("capture.store.reading.reader", "open_store"),
    "watch": ("capture.watch.context", "watch"),
}
__all__ = ["UserError", "WatchError", "batches", "capture", "load_model", "open", "watch"]

if TYPE_CHECKING:
    from .capture.memory import capture
    from .capture.models.load import load_model
    from .capture.store.reading.batches import make_batches as batches
    from .capture.store.reading.reader import open_store as open
    from .capture.watch.context import watch
    from .errors import UserError, WatchError


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "capture":  # a package that can be called, see there
        return import_module(".capture", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _PUBLIC[name]
    return getattr(import_module(f".{module}", __name__), there)


def __dir__() -> list[str]:
    """Public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
