"""Tensors inside nested lists, tuples and dicts, as models take and return them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors(value: Any, packed: bool = False) -> Iterator[Any]:
    """Yield every tensor in ``value``, in order; packed sequences as such, if asked for, or what they consist of."""
    if isinstance(value, Tensor) or (packed and isinstance(value, PackedSequence)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item, packed)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, packed)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in ``value``; what is no list, tuple or dict stays the same object."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # of the same class, which may offer its items as attributes
        for key, item in value.items():
            changed[key] = map_tensors(function, item)
        return changed
    return value


def batch_size(value: Any) -> int:
    """Length of the first axis of the first tensor that has one; 0 if there is none.

    Of a :class:`~torch.nn.utils.rnn.PackedSequence` it is the number of sequences.
    """
    for t in tensors(value, packed=True):
        if isinstance(t, PackedSequence):
            return int(t.batch_sizes[0])
        if t.dim():
            return len(t)
    return 0


def holds_packed(value: Any) -> bool:
    """Tell whether there are packed sequences among the tensors."""
    return any(isinstance(t, PackedSequence) for t in tensors(value, packed=True))
