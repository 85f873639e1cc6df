"""Registers operations under `looptap::` with torch.library, so that torch.compile and CUDA graphs take them
whole: CPU tensors reach PyTorch code, CUDA tensors the Triton launcher of the same name, fake tensors a
function that knows shapes.

`define` and `impl` per device instead of the custom_op decorator, whose calls cost twice as much.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

_LIBRARY = torch.library.Library("looptap", "DEF")


def register(
    schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any], gpu: str
) -> Callable[..., Any]:
    """Defines an operation and returns it.

    Args:
        schema: name, arguments and results as torch.library writes them.
        cpu: what runs on CPU tensors. fake: makes results of the right shape, dtype and device, unfilled.
        gpu: file of `kernels/gpu` whose function of the operation's name runs on CUDA tensors; loaded at the
            first such call, since Triton is not there on a machine without a GPU.
    """
    name = schema.partition("(")[0]

    @cache
    def launcher() -> Callable[..., Any]:
        return getattr(import_module(f".gpu.{gpu}", __package__), name)

    def launch(*arguments: Any) -> Any:
        given = arguments[0]
        with torch.cuda.device_of(given if isinstance(given, torch.Tensor) else given[0]):
            return launcher()(*arguments)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"looptap::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.looptap, name).default
