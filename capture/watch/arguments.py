"""Arguments of a forward pass: token ids, which tokens are real, how many are in a cache."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import WatchError

_NO_IDS = ("mask", "position", "label", "type")  # arguments that may be whole numbers too
_MASKS = ("mask", "pad")  # in the name of what may say which tokens are real
_MAX_ID = 2**31 - 1


class Arguments(NamedTuple):
    token_id_BT: Tensor | None
    """Token ids [B, T]; None where the module was given none."""
    mask_BT: Tensor | None
    """Mask, 1 where a token is real; it covers the tokens of a cache too if it is longer than the pass."""
    past: int | None
    """Number of tokens in the cache that was handed in; None without one, or if it does not say."""
    cache: Any
    """The cache that was handed in."""
    other_masks: Mapping[str, Tensor]
    """Further arguments that may say which tokens are real, but are not understood."""


def read_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Reads the arguments by name: `input_ids` or the first tensor of whole numbers, `attention_mask`,
    `past_key_values`.

    Raises:
        WatchError: ids and mask would be those of an encoder where blocks may be the decoder's; ids are not
            32 bit numbers.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = list(_named(parameters, args, kwargs))
    by_name = {name: value for name, value in named if name is not None}
    _refuse_two_stacks(module, {parameter.name for parameter in parameters}, by_name)
    cache: Any = by_name.get("past_key_values")
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None
    ids, mask = _token_ids(named), read_mask(by_name.get("attention_mask"))
    others = {} if mask is not None else dict(_other_masks(named, ids))
    return Arguments(ids, mask, past, cache if past is not None else None, others)


def read_mask(mask: Any) -> Tensor | None:
    """Reads an attention mask [rows, tokens]; None for one that tells nothing of padding, such as [B, H, T,
    T].

    Raises:
        WatchError: it is [rows, tokens] and holds something else than 0 and 1.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
        return None
    mask_BT = _as_rows(mask)
    if not ((mask_BT == 0) | (mask_BT == 1)).all():
        raise WatchError(
            f"attention_mask {list(mask.shape)} holds other values than 0 and 1: give one number a token, 1 "
            "for real ones and 0 for padding"
        )
    return mask_BT != 0


def refuse_other_masks(arguments: Arguments, B: int, T: int) -> None:
    """Refuses arguments that look like a mask of B rows and T tokens where no mask is understood.

    Raises:
        WatchError: there is one, and neither attention_mask nor `set_mask`.
    """
    for name, mask in arguments.other_masks.items():
        if arguments.mask_BT is None and tuple(mask.shape) == (B, T):
            raise WatchError(
                f"the module was given {name} {list(mask.shape)}, which may say which tokens are padding, "
                "and no attention_mask: say which are real with watched.set_mask(mask) before the call, 1 "
                "for real tokens (all ones if none is padding)"
            )


def _named(
    parameters: list[inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str | None, Any]]:
    """Yields every argument with its parameter's name, in the order of parameters; None for one of *args."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [parameter.name for parameter in parameters if parameter.kind in by_place]
    for index, value in enumerate(args):
        yield places[index] if index < len(places) else None, value
    order = {parameter.name: index for index, parameter in enumerate(parameters)}
    yield from sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order)))


def _token_ids(named: list[tuple[str | None, Any]]) -> Tensor | None:
    first = [value for name, value in named if name == "input_ids"]
    others = [value for name, value in named if not any(word in (name or "") for word in _NO_IDS)]
    if any(name == "inputs_embeds" and value is not None for name, value in named):
        others = []
    for value in (*first, *others):
        if isinstance(value, Tensor) and value.ndim in (1, 2) and _is_whole(value.dtype):
            ids = _as_rows(value)
            if ids.numel() and not -_MAX_ID <= int(ids.long().min()) <= int(ids.long().max()) <= _MAX_ID:
                raise WatchError(
                    f"token ids reach from {int(ids.long().min())} to {int(ids.long().max())}, and a store "
                    "keeps 32 bits: give ids below 2**31"
                )
            return ids
    return None


def _other_masks(named: list[tuple[str | None, Any]], ids: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Tensors [rows, tokens] of two values, as masks are, that are not an encoder's; also inside mappings."""
    for name, value in named:
        if isinstance(value, Mapping):
            yield from _other_masks([(str(key), inner) for key, inner in value.items()], ids)
        is_named = name is None or (any(word in name for word in _MASKS) and "encoder" not in name)
        if not is_named or not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.numel():
            continue
        mask_BT = _as_rows(value)
        is_ids = name is None and ids is not None and mask_BT.data_ptr() == ids.data_ptr()
        is_two = bool(((mask_BT == 0) | (mask_BT == 1) | (mask_BT == -torch.inf)).all())
        if not is_ids and is_two and bool((mask_BT != mask_BT[0, 0]).any()):
            yield name or "an argument", mask_BT


def _refuse_two_stacks(module: nn.Module, parameters: set[str], by_name: Mapping[str, Any]) -> None:
    given = {name for name, value in by_name.items() if value is not None}
    names = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask"}
    if names & given or "decoder_input_ids" in parameters:
        title = type(module).__name__
        raise WatchError(
            f"{title} is an encoder and a decoder, and which tokens its ids and mask are of depends on the "
            "block: watch the submodule that holds the blocks by itself, for example "
            f"looptap.watch(model.decoder, …) or model.encoder, and call {title} as before"
        )


def _as_rows(x: Tensor) -> Tensor:
    return x.detach() if x.ndim == 2 else x.detach().unsqueeze(0)


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
