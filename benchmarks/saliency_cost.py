"""What it costs to read Theta at some of the optimizer's steps, relative to a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from examples.torchvision_models import models
from kfac_flat import NeuronPruner
from kfac_flat.pruning.readings import Readings

IMAGES = 50_000  # of an epoch, as many as CIFAR-10 has; MNIST has a few more


def resnet18_cifar() -> tuple[nn.Module, tuple[int, ...]]:
    """ResNet-18 for images of 32 x 32 pixels: a 3 x 3 stem of stride 1 and no pooling behind it."""
    model = models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model, (3, 32, 32)


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """Two hidden layers of 512 on 784 inputs."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), (784,)


NETWORKS = {"ResNet-18 (CIFAR)": resnet18_cifar, "MLP 784-512-512-10": mlp}


def measure(
    make: Callable[[], tuple[nn.Module, tuple[int, ...]]],
    batch: int,
    repetitions: int,
    on_step: Callable[[], None],
) -> dict[str, float]:
    """Time training steps of two optimizers on one model in turns, one of them watched by a pruner.

    Args:
        make: Gives a model and the shape of an example.
        batch: Examples in a batch.
        repetitions: Timed steps of each; one of each comes before, for warming up.
        on_step: Is called after each pair.

    Returns:
        ``share`` of an epoch's steps at which Theta is read. Medians in seconds of the processor, which other work on
        the machine disturbs least: ``step``, ``watched`` (a step with the pruner at which it is read), ``reading``
        (what the pruner does in it), ``passing`` (what it does in any other), ``summing`` (summing up weights and
        gradients of all layers, for comparison).
    """
    torch.manual_seed(0)
    model, shape = make()
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    plain, watched = (SGD(model.parameters(), lr=1e-3, momentum=0.9) for _ in range(2))
    pruner = NeuronPruner(model, watched, x[:1], target=0.5)
    steps = IMAGES // batch
    of_an_epoch = Readings(pruner._readings.per_epoch, before=steps)
    share = sum(of_an_epoch.next() for _ in range(steps)) / steps
    seen: dict[str, list[float]] = {"step": [], "watched": [], "reading": [], "passing": [], "summing": []}
    for repetition in range(repetitions + 1):
        pruner._readings = Readings(None)
        times = {
            "step": seconds(lambda: train_step(model, plain, x, y)),
            "watched": seconds(lambda: train_step(model, watched, x, y)),
            "reading": seconds(lambda: pruner._record(watched)),
            "summing": seconds(lambda: sum_up(model)),
        }
        pruner._readings = Readings(1, before=steps, seen=1)
        times["passing"] = seconds(lambda: pruner._record(watched))
        for what, took in times.items():
            if repetition:
                seen[what].append(took)
        on_step()
    return {"share": share} | {what: median(times) for what, times in seen.items()}


@torch.no_grad()
def sum_up(model: nn.Module) -> None:
    """Go through every weight that neurons are read by, and its gradient, once."""
    for p in model.parameters():
        if p.dim() > 1 and p.grad is not None:
            p.sum(), p.grad.sum()


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """Make one step as a training loop does."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def seconds(action: Callable[[], object]) -> float:
    """Time one call."""
    start = time.process_time()
    action()
    return time.process_time() - start
