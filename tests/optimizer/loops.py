"""Training loops as a user writes them, and snapshots of everything a step may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from kfac_flat import FlatKFAC
from tests.reference import batch

MakeBase = Callable[[nn.Module], Optimizer]


def plain(
    model: nn.Module, criterion: nn.Module | None = None, base: Optimizer | None = None, **options: Any
) -> FlatKFAC:
    """The paper's penalty as it stands, at the batch's labels; by default on an optimizer that does not move."""
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    base = SGD(model.parameters(), lr=0.0) if base is None else base
    exactly: dict[str, Any] = {
        "penalty": "linear", "every": 1, "survey_every": 1, "clip": None, "batch_fraction": 1.0, "eigenpairs": "exact",
    }  # fmt: skip
    return FlatKFAC(base, model, **{**exactly, "fisher": "empirical", "criterion": criterion, **options})


def criterion_of(optimizer: FlatKFAC) -> nn.Module:
    """Whatever loss module the optimizer was given, or cross-entropy."""
    return optimizer._options.criterion or nn.CrossEntropyLoss()


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, shape: tuple[int, ...] = (8, 4)) -> None:
    """Ordinary steps on batches that depend on the step's number alone, dropout included."""
    criterion = criterion_of(optimizer) if isinstance(optimizer, FlatKFAC) else nn.CrossEntropyLoss()
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng():
        for step in range(start, start + steps):
            torch.manual_seed(step)
            x, y = batch(*shape, seed=step, dtype=dtype)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


def small_net() -> nn.Sequential:
    """In float32, as networks usually are."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def step(model: nn.Module, optimizer: Optimizer, x: Tensor | None = None) -> None:
    """A step on a batch of small_net's, or another one."""
    x = torch.randn(12, 4) if x is None else x
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()


def penalty(
    model: nn.Module, optimizer: FlatKFAC, x: Tensor, y: Tensor, criterion: nn.Module | None = None
) -> list[Tensor]:
    """What one step adds to the gradients that the base optimizer gets to see."""
    criterion = criterion_of(optimizer) if criterion is None else criterion
    optimizer.zero_grad()
    criterion(model(x), y).sum().backward()
    own = gradients(model)
    seen: list[list[Tensor]] = []
    handle = optimizer.base.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    optimizer.step()
    handle.remove()
    (given,) = seen
    return [g - o for g, o in zip(given, own, strict=True)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def times(factor: float, tensors: list[Tensor]) -> list[Tensor]:
    return [factor * t for t in tensors]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states; NaNs of the same bits are equal."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and bool(
                torch.equal(
                    a.detach().contiguous().view(-1).view(torch.uint8),
                    b.detach().contiguous().view(-1).view(torch.uint8),
                )
            )
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


def snapshot(model: nn.Module, optimizer: Optimizer) -> Any:
    """A copy of parameters, buffers, gradients and optimizer state."""
    grads = [None if p.grad is None else p.grad for p in model.parameters()]
    return copy.deepcopy([model.state_dict(), grads, optimizer.state_dict()])
