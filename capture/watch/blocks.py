"""Finds the blocks of a module: by names, as modules that are given, or without being told."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from ...errors import WatchError

Blocks = str | nn.Module | Iterable[str | nn.Module] | None
_SHOWN = 8  # how many names an error lists


def find_blocks(module: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """Returns the blocks to watch by their name in the module, each once.

    Args:
        blocks: names or patterns such as `model.layers.*` (a star stands for one part of a name), modules, a
            ModuleList, ModuleDict or Sequential for all that it holds, or several of these. None: the lists
            of blocks that the module itself has, if they stand side by side and hold all blocks of one class.
    Raises:
        WatchError: nothing is found, or more than one kind; a block is not in the module, or inside another
            block; something is compiled or scripted, so that no hook or function call would be seen.
    """
    _refuse_compiled(module)
    chosen = _by_themselves(module) if blocks is None else [*_given(module, blocks)]
    if not chosen:
        raise WatchError(f"blocks is empty: name the blocks of {type(module).__name__}, {_advice(module)}")
    names = {id(part): name or type(module).__name__ for name, part in module.named_modules()}
    found = {names[id(block)]: block for block in chosen}
    for name, block in found.items():
        inner = {id(part) for part in block.modules()} - {id(block)}
        if nested := [other for other, part in found.items() if id(part) in inner]:
            raise WatchError(f"{nested[0]} is inside {name}, and both are named as blocks: name one of them")
    return found


def _given(module: nn.Module, blocks: Blocks) -> Iterator[nn.Module]:
    inside = {id(part) for part in module.modules()}
    for item in [blocks] if isinstance(blocks, (str, nn.Module)) else blocks or ():
        if isinstance(item, str):
            # a module that stands in several places has several names, and any of them will do
            named = module.named_modules(remove_duplicate=False)
            matched = [part for name, part in named if name and _matches(name, item)]
            if not matched:
                raise WatchError(
                    f"blocks={item!r} is no module of {type(module).__name__}: {_advice(module)}"
                )
        elif isinstance(item, nn.Module):
            matched = [*item] if isinstance(item, nn.Sequential) else [item]
        else:
            raise WatchError(f"blocks holds a {type(item).__name__}: give names, patterns or modules")
        for block in (block for part in matched for block in _leaves(part)):
            if id(block) not in inside:
                raise WatchError(
                    f"a {type(block).__name__} given as block is not part of the {type(module).__name__} "
                    "that is watched: give the module that holds it"
                )
            yield block


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _leaves(part: nn.Module) -> list[nn.Module]:
    """Returns the modules inside containers that are never called themselves."""
    if isinstance(part, nn.ModuleDict):
        part = nn.ModuleList(part.values())
    return [leaf for inner in part for leaf in _leaves(inner)] if isinstance(part, nn.ModuleList) else [part]


def _by_themselves(module: nn.Module) -> list[nn.Module]:
    lists = _lists(module)
    title = type(module).__name__
    chosen = [block for blocks in lists.values() for block in blocks]
    kinds = {type(block) for block in chosen}
    parents = {name.rpartition(".")[0] for name in lists}
    if len(kinds) != 1 or len(parents) != 1:
        what = "no list of blocks" if not chosen else "several lists of blocks"
        raise WatchError(f"{title} has {what}: {_advice(module)}")
    (kind,) = kinds
    inside = {id(part) for block in chosen for part in block.modules()}
    strays = [
        name for name, part in module.named_modules() if isinstance(part, kind) and id(part) not in inside
    ]
    strays = [name for name in strays if name not in lists]  # a Sequential of Sequentials
    if strays:
        raise WatchError(
            f"{title} has {kind.__name__} outside of its lists of them, {_listed(strays)}: "
            f"{_advice(module)}, or several of these in one list"
        )
    return chosen


def _lists(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns what looks like blocks: outermost lists of equal modules with parts of their own, by name."""
    found: dict[str, list[nn.Module]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, (nn.ModuleList, nn.Sequential)) or not len(part):
            continue
        if any(not outer or name.startswith(f"{outer}.") for outer in found):
            continue
        blocks = [leaf for inner in part for leaf in _leaves(inner)]
        if len({type(block) for block in blocks}) == 1 and all(any(block.children()) for block in blocks):
            found[name] = blocks
    return found


def _advice(module: nn.Module) -> str:
    if lists := _lists(module):
        named = [
            f"{name + '.' if name else ''}* ({len(part)} {type(part[0]).__name__})"
            for name, part in lists.items()
        ]
        return f"give blocks=, for example one of {_listed(named)}"
    names = [name for name, _ in module.named_modules() if name]
    return f"give blocks=, a list of names of its modules, which are {_listed(names)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        is_compiled = type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None
        if is_compiled or hasattr(part.forward, "_torchdynamo_orig_callable"):
            what = "is compiled (torch.compile), and its parts run where no hook sees them"
        elif isinstance(part, torch.jit.ScriptModule):
            what = "is a TorchScript module, and its parts run where no hook sees them"
        else:
            continue
        raise WatchError(f"{name or type(module).__name__} {what}: watch the module it was made from")
