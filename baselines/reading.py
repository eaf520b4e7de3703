"""Pruners that go by feature maps: what layers read, after all activations, while the model is being trained."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_flat import NeuronPruner
from kfac_flat.nested import batch_size
from kfac_flat.pruning import layers
from kfac_flat.pruning.saliency import Saliency


class FeatureMaps(Saliency):
    """Statistics of the neurons' feature maps, where layers read them."""

    every_step = True  # what the passes before a step have left is added up there

    def begin(self, examples: int) -> None:
        """Take note of a forward pass that is about to start."""

    def reads(self, name: str, x: Tensor) -> Tensor | None:
        """Take note of what a layer is about to read, if neurons are among it; returns what to replace it by, if so."""
        slots = self._slots[name]
        axis = layers.channel_axis(self._consumers[name], x)
        # A layer of another width was changed by somebody else, as the pruner will say when it is stepped.
        if not len(self._readers[name]) or x.shape[axis] != len(slots):
            return None
        self._move_to(x.device)
        return self.look(name, x, axis)

    @abstractmethod
    def look(self, name: str, x: Tensor, axis: int) -> Tensor | None:
        """Take note of what a layer is about to read.

        Args:
            name: The layer.
            x: Its input; neurons are among the channels.
            axis: Where these lie.

        Returns:
            What it shall read instead; None for ``x`` itself.
        """


class FeatureMapPruner(NeuronPruner):
    """A NeuronPruner that is shown what layers read in each forward pass with gradients enabled.

    Neurons that are read by attention, or by layers whose weights are used but that are not called, stay. In a compiled
    model the graph is broken where it is watched.
    """

    _criterion: type[FeatureMaps]
    _saliency: FeatureMaps

    def _attach(self) -> None:
        super()._attach()
        _hook(self, self._model, _begin)
        for name in self._graph.consumers:
            module = self._model.get_submodule(name)
            if not layers.is_attention(module):
                _hook(self, module, _reads(name))


Watcher = Callable[[FeatureMaps, tuple[Any, ...], dict[str, Any]], Any]


def _begin(maps: FeatureMaps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    maps.begin(batch_size((args, kwargs)))


def _reads(name: str) -> Watcher:
    def watch(maps: FeatureMaps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others = args or kwargs.values()  # layers call it by different names
        replaced = maps.reads(name, x)
        return None if replaced is None else ((replaced, *others), kwargs if args else {})

    return watch


def _hook(pruner: FeatureMapPruner, module: nn.Module, watch: Watcher) -> None:
    handle = module.register_forward_pre_hook(_Hook(pruner, watch), with_kwargs=True)
    weakref.finalize(pruner, handle.remove)


class _Hook:
    """A forward pre-hook; copies of the module carry one that does nothing, since their calls are not its own."""

    keeps_channels = True  # what it returns has the same entries

    def __init__(self, pruner: FeatureMapPruner | None = None, watch: Watcher | None = None) -> None:
        self._pruner = None if pruner is None else weakref.ref(pruner)
        self._watch = watch

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pruner = None if self._pruner is None else self._pruner()
        if pruner is None or self._watch is None or not torch.is_grad_enabled():
            return None
        return self._watch(pruner._saliency, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, ())
