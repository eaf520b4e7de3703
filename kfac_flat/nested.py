"""Tensors inside nested lists, tuples and dicts, as models take and return them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import zip_longest
from math import inf
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


def lengths(value: Any) -> tuple[int, ...]:
    """Length of the first axis of every tensor that has one, in order."""
    return tuple(len(t) for t in tensors(value) if t.dim())


def holds_packed(value: Any) -> bool:
    """Tell whether there are packed sequences among the tensors."""
    return any(isinstance(t, PackedSequence) for t in tensors(value, packed=True))


def largest_difference(a: Any, b: Any) -> float:
    """Largest norm of a difference between the tensors of ``a`` and of ``b``, relative to that in ``b``.

    Infinite where they do not hold tensors of the same shapes, not a number where values are not.
    """
    pairs = list(zip_longest(tensors(a), tensors(b)))
    if any(x is None or y is None or x.shape != y.shape for x, y in pairs):
        return inf
    differences = [(x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-300) for x, y in pairs]
    return max(map(float, differences), default=0.0)
