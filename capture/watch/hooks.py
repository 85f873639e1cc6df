"""The hooks of one watch. Copies of a module take hooks along, so each looks whether it is still meant."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .record import Recorder


class Link:
    """Leads hooks to the recorder; a copy of a link, deep or pickled, leads nowhere."""

    def __init__(self, recorder: Recorder | None = None, *modules: nn.Module) -> None:
        self._recorder, self._modules = recorder, modules

    def __reduce__(self) -> tuple[type["Link"], tuple[()]]:
        return Link, ()

    def close(self) -> None:
        """Cuts the link: hooks that are left somewhere do nothing from now on."""
        self._recorder, self._modules = None, ()

    def recorder_of(self, module: nn.Module, index: int) -> Recorder | None:
        """Returns the recorder; None for a module that is not the one that was watched."""
        is_own = self._recorder is not None and self._modules[index] is module
        return self._recorder if is_own else None


def register(link: Link, module: nn.Module, blocks: list[nn.Module]) -> Iterator[RemovableHandle]:
    """Registers hooks one by one: the module's own around those of its blocks, in case it is one of them.

    Args:
        link: over the module and then its blocks.
    """
    yield module.register_forward_pre_hook(partial(_begin, link), with_kwargs=True)
    for index, block in enumerate(blocks):
        yield block.register_forward_pre_hook(partial(_enter, link, index), with_kwargs=True)
        yield block.register_forward_hook(partial(_leave, link, index), always_call=True)
    yield module.register_forward_hook(partial(_end, link), always_call=True)


def _begin(link: Link, module: nn.Module, args: Any, kwargs: Any) -> None:
    if recorder := link.recorder_of(module, 0):
        recorder.begin(module, args, kwargs)


def _enter(link: Link, block: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    if recorder := link.recorder_of(module, block + 1):
        recorder.enter(block, args, kwargs)


def _leave(link: Link, block: int, module: nn.Module, args: Any, output: Any) -> None:
    if recorder := link.recorder_of(module, block + 1):
        recorder.leave(block, output)


def _end(link: Link, module: nn.Module, args: Any, output: Any) -> None:
    if recorder := link.recorder_of(module, 0):
        recorder.end()
