"""One batch in several processes: means of what each of them has found on its part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Numbers that are sent at once: as many as DistributedDataParallel sends in single precision, 25 MiB.
_BUCKET = 25 * 2**18


def processes(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the group of a DistributedDataParallel, also of a compiled one; None, the default group, otherwise."""
    inner = getattr(model, "_orig_mod", model)
    return inner.process_group if isinstance(inner, DistributedDataParallel) else None


def rank() -> int:
    """Return this process's rank in the default group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes in a group, None for the default one; 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(
    tensors: Sequence[Tensor], examples: int, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Average over processes, each of which weighs as much as it has examples. All of them must call this.

    Args:
        tensors: Floating point, of the same shapes in the same order in every process.
        examples: How many examples this process has seen.
        group: The processes; None for the default group. A process on its own gets back what it gave.

    Example:
        >>> mean_over_processes([torch.tensor([1.0, 2.0])], examples=16)
        [tensor([1., 2.])]
    """
    if world_size(group) == 1:
        return list(tensors)
    averaged: list[Tensor] = []
    for bucket in _buckets(tensors):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)  # sums over examples do not fit in half precision
        weight = torch.full((1,), float(examples), dtype=dtype, device=bucket[0].device)
        flat = torch.cat([*(t.reshape(-1) * weight for t in bucket), weight])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat[:-1] / flat[-1], [t.numel() for t in bucket])
        averaged += [part.view(t.shape).to(t.dtype) for part, t in zip(parts, bucket, strict=True)]
    return averaged


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a sequence into runs of one dtype and device which are not too long to be sent at once."""
    bucket: list[Tensor] = []
    for t in tensors:
        alike = not bucket or (t.dtype, t.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(b.numel() for b in bucket) + t.numel() <= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket
