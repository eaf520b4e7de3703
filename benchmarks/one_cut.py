"""One model, one library, one cut, timed; :mod:`benchmarks.pruner_speed` runs it in a process of its own.

``python -m benchmarks.one_cut LIBRARY MODEL IMAGE_SIZE THREADS FILE`` appends a line of JSON to FILE as soon as
something is known, so that what took too long or failed leaves behind what it had found out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from examples.torchvision_models import models
from kfac_flat import NeuronPruner

CLASSES = 1000
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
Tell = Callable[..., None]


class EvenPruner(NeuronPruner):
    """Takes neurons at random, so about the same share of every layer: what is measured is reach, not choice."""

    def _scores(self) -> list[float]:
        sizes = self._groups.neurons.double()
        return (sizes * torch.rand(len(sizes), generator=torch.Generator().manual_seed(0))).tolist()

    @property
    def reach(self) -> float:
        """Share of the neurons that can go."""
        return int(self._groups.neurons.sum()) / self.size.neurons


class LargestFirst(NeuronPruner):
    """Takes the neurons first that hold the most parameters, were they all as useful: where counting by cost leads."""

    def _scores(self) -> list[float]:
        return [1.0] * len(self._groups.ids)


def cut_by_us(model: nn.Module, x: Tensor, tell: Tell) -> None:
    """Cut half of the neurons that can go with kfac-flat, the momentum of the optimizer included.

    Besides, tell what would be left if the half with the most parameters went, of no layer more than nine tenths.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with timed("build", tell):
        pruner = EvenPruner(model, optimizer, x, target=1e-9, start=1, every=1, events=1)
    options = {"target": pruner.reach / 2, "start": 1, "every": 1, "events": 1}
    planned = LargestFirst(model, optimizer, x, per="parameter", max_share=0.9, **options).plan()
    tell(largest=planned.before.parameters / planned.after.parameters)
    half = EvenPruner(model, optimizer, x, **options)
    with timed("cut", tell):
        half.step()


def cut_by_torch_pruning(model: nn.Module, x: Tensor, tell: Tell) -> None:
    """Cut half of each layer that can be cut with torch-pruning, as its documentation shows."""
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    with timed("build", tell):
        pruner = torch_pruning.pruner.MetaPruner(
            model, x, importance=importance, pruning_ratio=0.5, ignored_layers=heads(model)
        )
    with timed("cut", tell):
        pruner.step()


LIBRARIES = {"kfac-flat": cut_by_us, "torch-pruning": cut_by_torch_pruning}


@contextmanager
def timed(what: str, tell: Tell) -> Iterator[None]:
    """Tell how many seconds something took, and how many of them the processor was at it."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    tell(**{what: time.perf_counter() - start, f"{what}_cpu": time.process_time() - start_cpu})


def build(name: str) -> nn.Module:
    """Build one of torchvision's classifiers with random weights, in eval mode."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(models, name)(num_classes=CLASSES, **options).eval()


def heads(model: nn.Module) -> list[nn.Module]:
    """Layers that give the classes, those of auxiliary classifiers included."""
    return [m for m in model.modules() if isinstance(m, LAYERS) and len(m.weight) == CLASSES]


def halved(model: nn.Module) -> float:
    """How many times fewer parameters a model would have if every layer but the heads had exactly half of its neurons.

    That is arithmetic: a weight between two halved layers is quartered, that of a head, of a layer that reads the image
    or of a depthwise convolution is halved, and so is everything that has one number for a neuron.
    """
    total, left, at_the_end = 0, 0.0, heads(model)
    for module in model.modules():
        writes = 1.0 if module in at_the_end else 0.5
        for p in module.parameters(recurse=False):
            weight = isinstance(module, (*LAYERS, nn.MultiheadAttention)) and p.dim() > 1
            once = weight and p.shape[1] == (1 if getattr(module, "groups", 1) > 1 else 3)
            total += p.numel()
            left += p.numel() * writes * (0.5 if weight and not once else 1.0)
    return total / left


def neurons(model: nn.Module) -> int:
    """Output channels of all Linear and convolution layers but the heads."""
    at_the_end = heads(model)
    return sum(len(m.weight) for m in model.modules() if isinstance(m, LAYERS) and m not in at_the_end)


def touch_memory(model: nn.Module) -> None:
    """Write to as much memory as weights, gradients and momentum take, and hand it back.

    A virtual machine may take seconds to hand out a gigabyte for the first time, which is no part of a cut.
    """
    torch.ones(3 * sum(p.numel() for p in model.parameters()))


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates by torch's counter, of a forward pass that really runs."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)  # with gradients: attention's fast path without them is not counted
    return counter.get_total_flops() // 2


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of every parameter, by name."""
    return {name: p.shape for name, p in model.named_parameters()}


def measure(library: str, name: str, image_size: int, tell: Tell) -> None:
    """Cut a model and tell what is known, step by step.

    Args:
        library: One of :data:`LIBRARIES`.
        name: A classifier of torchvision.
        image_size: Height and width of the images.
        tell: Is called with ``half`` (factor, see :func:`halved`); by kfac-flat with ``largest`` (factor); ``build``
            and ``cut`` (seconds), ``build_cpu`` and ``cut_cpu`` (seconds of the processor); ``neurons`` (share
            removed), ``reach`` (share of the parameters in tensors that got smaller), ``parameters`` and ``macs``
            (factors); ``trains`` (True).
    """
    model, x = build(name), torch.randn(1, 3, image_size, image_size)
    before, neurons_before, macs_before = shapes(model), neurons(model), macs(model, x)
    tell(half=halved(model))
    touch_memory(model)
    LIBRARIES[library](model, x, tell)
    after = shapes(model)
    total = sum(shape.numel() for shape in before.values())
    smaller = sum(shape.numel() for parameter, shape in before.items() if after[parameter] != shape)
    tell(
        neurons=1 - neurons(model) / neurons_before,
        reach=smaller / total,
        parameters=total / sum(shape.numel() for shape in after.values()),
        macs=macs_before / macs(model, x),
    )
    outputs = model.train()(torch.cat([x, -x]))
    sum(t.square().mean() for t in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    tell(trains=True)


def main(library: str, name: str, image_size: str, threads: str, file: str) -> None:
    """Run the command line."""
    torch.set_num_threads(int(threads))

    def tell(**known: float) -> None:
        with Path(file).open("a") as stream:
            stream.write(json.dumps(known) + "\n")

    measure(library, name, int(image_size), tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
