"""From a model to the graph of its operations, with torch.fx, on a copy without data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_flat.structure import structural_copy


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the model's structure with tensors that have a shape and no data: runs of it cost next to nothing."""

    def without_data(t: Tensor) -> Tensor:
        empty = torch.empty_like(t, device="meta")
        return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty

    return structural_copy(model, without_data)


def trace(model: nn.Module, is_known: Callable[[nn.Module], bool]) -> fx.Graph:
    """Trace the model symbolically; a submodule that cannot be traced becomes one opaque operation, with a warning.

    Args:
        model: The model, or a skeleton of it.
        is_known: Tells modules that have a rule of their own and are not looked into.

    Raises:
        ValueError: if the model's own forward cannot be traced, saying what to do instead.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(is_known, frozenset(opaque))
        try:
            graph = tracer.trace(model)
        except (
            fx.proxy.TraceError,
            TypeError,
            RuntimeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
        ) as error:
            if tracer.failed is None:
                raise ValueError(
                    f"{type(model).__name__}.forward cannot be traced by torch.fx ({error}). Its control flow depends "
                    "on the data or it calls code that needs real tensors: move that part into a submodule of its own "
                    "(which is then left uncut as a whole), or make the branch depend on attributes and shapes only"
                ) from error
            opaque[tracer.failed] = str(error)
        else:
            break
    if opaque:
        warnings.warn(
            "these submodules cannot be traced, so neurons that enter or leave them are not cut: "
            + "; ".join(f"{name} ({reason})" for name, reason in opaque.items()),
            stacklevel=4,
        )
    return graph


class _Tracer(fx.Tracer):
    """Symbolic tracing that remembers the innermost submodule in which it failed."""

    def __init__(self, is_known: Callable[[nn.Module], bool], opaque: frozenset[str]) -> None:
        super().__init__()
        self._is_known = is_known
        self._opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not look into known modules, torch's own, and those that failed before."""
        if module_qualified_name in self._opaque or self._is_known(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a submodule; the innermost one that fails is remembered."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise
