"""Neuron ids: who goes with whom.

Every output channel of a layer gets an integer id, and an activation is described by a tensor of ids of the very shape
it has: entry by entry, the neuron that the number belongs to. Channel ids repeat over examples and pixels by expansion
(stride 0), so these tensors cost no memory until something really mixes the axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The id of numbers that belong to no neuron: the model's inputs, constants, whatever must not be cut.
FIXED = 0


def fixed(shape: torch.Size) -> Tensor:
    """Return ids of that shape which all say: no neuron."""
    return torch.tensor(FIXED).expand(shape)


def along(ids: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Lay a vector of ids out along axis ``dim`` of ``shape``, the same everywhere else."""
    view = [1] * len(shape)
    view[dim] = -1
    return ids.reshape(view).expand(shape)


def narrowed(*tensors: Tensor) -> list[Tensor]:
    """Cut tensors of equal dimension to length one along the axes in which none of them varies by construction."""
    layouts = [(t.shape, t.stride()) for t in tensors]
    sizes = [
        min(1, tensors[0].shape[d]) if all(strides[d] == 0 or shape[d] == 1 for shape, strides in layouts) else None
        for d in range(tensors[0].dim())
    ]
    return [
        t.as_strided([n if size is None else size for n, size in zip(shape, sizes, strict=True)], strides)
        for t, (shape, strides) in zip(tensors, layouts, strict=True)
    ]


def varying_dims(ids: Tensor) -> list[int]:
    """Axes along which the ids differ."""
    if not any(ids.stride()):
        return []  # as those of what is no neuron are most often
    (small,) = narrowed(ids)
    varying = []
    for d in (d for d, size in enumerate(small.shape) if size > 1):
        first = small.narrow(d, 0, 1)
        if bool((small != first).any()):
            varying.append(d)
        else:
            small = first  # along other axes, ids differ there as they do elsewhere
    return varying


def compact(ids: Tensor) -> Tensor:
    """Return equal ids that take no memory, and no time to look at, along axes in which they do not differ."""
    for d in set(range(ids.dim())) - set(varying_dims(ids)):
        ids = ids.narrow(d, 0, min(1, ids.shape[d])).expand(ids.shape)
    return ids


def read_along(ids: Tensor, dim: int) -> Tensor | None:
    """Return the vector of ids along an axis, or None if they differ along any other axis."""
    dim %= ids.dim()
    if any(d != dim for d in varying_dims(ids)):
        return None
    index = [slice(None) if d == dim else 0 for d in range(ids.dim())]
    return ids[tuple(index)].contiguous()


def membership(ids: Tensor, size: int) -> Tensor:
    """Return for each of ``0 .. size - 1`` whether it is among the ids."""
    members = torch.zeros(size, dtype=torch.bool)
    members[ids] = True
    return members


def components(size: int, pairs: Tensor) -> Tensor:
    """Connected components of the graph on ``0 .. size - 1`` with edges ``pairs`` ``[2, edges]``.

    Returns:
        For each node the smallest node of its component.
    """
    labels = torch.arange(size)
    while True:
        a, b = labels[pairs[0]], labels[pairs[1]]
        low = torch.minimum(a, b)
        joined = labels.scatter_reduce(0, torch.cat([a, b]), torch.cat([low, low]), "amin")
        joined = joined[joined]
        if torch.equal(joined, labels):
            return labels
        labels = joined
