"""looptap: activation capture for looped (depth-recurrent) language models.

model = looptap.load_model("random:(0,12x32,0)I,norm=pre")
dataset = looptap.capture("random:(0,12x32,0)I", ["Once upon a time"])  # in memory, an xarray Dataset
with looptap.watch(module, "layers.*") as watched:  # any torch.nn.Module, as it is
    module(token_ids)
dataset = looptap.open("run.zarr")  # what `looptap capture` wrote, lazily
for rows in looptap.batches("run.zarr", depths=[12], seed=0): ...  # its states in random order, for training
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["UserError", "WatchError", "batches", "capture", "load_model", "open", "watch"]

if TYPE_CHECKING:
    from .capture.memory import capture
    from .capture.models.load import load_model
    from .capture.store.reading.batches import make_batches as batches
    from .capture.store.reading.reader import open_store as open
    from .capture.watch.context import watch
    from .errors import UserError, WatchError


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that looptap alone loads neither torch nor zarr."""
    if name == "load_model":
        from .capture.models.load import load_model

        return load_model
    if name == "open":
        from .capture.store.reading.reader import open_store

        return open_store
    if name == "batches":
        from .capture.store.reading.batches import make_batches

        return make_batches
    if name == "watch":
        from .capture.watch.context import watch

        return watch
    if name == "WatchError":
        from .errors import WatchError

        return WatchError
    if name == "UserError":
        from .errors import UserError

        return UserError
    if name == "capture":  # a package that can be called, see there
        from importlib import import_module

        return import_module(".capture", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
