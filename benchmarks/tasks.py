"""What the benchmarks train: networks, images and recipes.

``digits`` takes seconds and needs no files. The others read what torchvision's own classes do, from ``--data-root``:
``mnist-mlp`` (LeNet-300-100), ``mnist-lenet5``, and ``mnist-lenet5-few`` on 1,024 images, which it overfits; CIFAR-10
with ResNet-18, VGG-16-BN, ResNet-56 and a wide ResNet-32; Flowers-102 at 64 x 64 pixels with a network like AlexNet and
with ResNet-18. Those named ``-small`` are for a CPU: a quarter of the pixels, narrower networks and, of CIFAR-10,
10,000 training and 2,000 test images. Those named ``-pretrained`` are torchvision's networks, and start from weights
that are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from benchmarks.execution import PLAIN, Execution
from benchmarks.images import (
    augmented,
    load_cifar,
    load_few_mnist,
    load_flowers,
    load_mnist,
    load_small_cifar,
    load_small_flowers,
    normalized,
)
from benchmarks.networks import alexnet, cifar_resnet, lenet5, lenet_300_100, resnet18, torchvision_net, vgg16_bn
from examples import digits
from examples.digits import DigitsNet, Images

# ---------------------------------------------------------------- recipes

# The loss of every task, for optimizers that watch it.
CRITERION = nn.CrossEntropyLoss()

READ = 1024  # training images that methods read which go by statistics of the data


@dataclass(frozen=True)
class Task:
    """What is trained and how: SGD with momentum 0.9 and weight decay 5e-4 under one cycle of the learning rate.

    Attributes:
        load: Reads training and test images from a folder.
        network: Makes a network with random weights.
        epochs: Of training, unless told otherwise.
        last: The one at whose end the last removal comes.
        lr: Peak of the learning rate.
        seen: Share of the images in an epoch.
        augment: Whether images are shifted and mirrored.
        pretrained: Whether the network starts from given weights, but for its last Linear.
    """

    load: Callable[[Path | None], tuple[Images, Images]]
    network: Callable[[], nn.Module]
    epochs: int
    last: int
    batch_size: int
    lr: float = 0.1
    seen: float = 1.0
    augment: bool = False
    pretrained: bool = False

    def last_removal(self, epochs: int) -> int:
        """Return the epoch of the last removal in a training of another length."""
        return max(1, round(epochs * self.last / self.epochs))

    def removals(self, epochs: int, events: int = 10, every: int = 1) -> dict[str, int]:
        """Place removals such that the last comes when it should, as many as fit before it."""
        last = self.last_removal(epochs)
        fitting = min(events, (last - 1) // every + 1)
        return {"start": last - (fitting - 1) * every, "every": every, "events": fitting}

    def updates(self, train_set: Images) -> int:
        """Return how many there are in an epoch."""
        return int(self.seen * len(train_set.labels)) // self.batch_size

    def sample(self, train_set: Images) -> list[tuple[Tensor, Tensor]]:
        """Return the first training images with their labels, in batches, for methods that read some."""
        parts = (part[:READ].split(self.batch_size) for part in (train_set.images, train_set.labels))
        return list(zip(*parts, strict=True))

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Make the optimizer that methods wrap."""
        return SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)

    def schedule(self, optimizer: Optimizer, epochs: int, train_set: Images) -> LRScheduler:
        """Make the schedule of the learning rate."""
        return OneCycleLR(optimizer, self.lr, epochs=epochs, steps_per_epoch=self.updates(train_set))

    def epoch(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        train_set: Images,
        generator: torch.Generator,
        execution: Execution = PLAIN,
    ) -> Iterator[None]:
        """Train for an epoch; whoever runs it gets a turn after each update."""
        called = execution.compiled(model.train())
        for images, labels in islice(train_set.batches(self.batch_size, generator), self.updates(train_set)):
            optimizer.zero_grad()
            with execution.autocast(images.device):
                loss = CRITERION(called(augmented(images, generator) if self.augment else images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images, batch: int = 1000) -> float:
    """Return the share of images (%) that are recognised."""
    model.eval()
    parts = zip(data.images.split(batch), data.labels.split(batch), strict=True)
    right = torch.stack([(model(images).argmax(1) == labels).sum() for images, labels in parts])
    return 100 * int(right.sum()) / len(data.labels)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of what torchvision's weights expect


def load_normalized_flowers(root: Path | None) -> tuple[Images, Images]:
    """Return what :func:`load_flowers` does, as torchvision's weights expect images."""
    return normalized(load_flowers(root), *IMAGENET)


cifar, small_cifar, flowers, small_flowers, trained = (
    partial(Task, load, batch_size=batch_size, epochs=epochs, last=last, augment=True)
    for load, batch_size, epochs, last in (
        (load_cifar, 128, 60, 36),
        (load_small_cifar, 128, 30, 18),
        (load_flowers, 64, 100, 60),
        (load_small_flowers, 64, 40, 24),
        (load_normalized_flowers, 64, 40, 24),
    )
)

TASKS = {
    "digits": Task(lambda _: digits.load_data("cpu"), partial(DigitsNet, 32), epochs=24, last=13, batch_size=64),
    "mnist-mlp": Task(load_mnist, lenet_300_100, epochs=12, last=7, batch_size=128, lr=0.2),
    "mnist-lenet5": Task(load_mnist, lenet5, epochs=8, last=5, batch_size=128, lr=0.05),
    "mnist-lenet5-few": Task(load_few_mnist, lenet5, epochs=40, last=24, batch_size=128, lr=0.2),
    "cifar10-resnet18-small": small_cifar(partial(resnet18, 16)),
    "cifar10-vgg16bn-small": small_cifar(partial(vgg16_bn, 16, pools=4)),
    "cifar10-resnet56-small": small_cifar(partial(cifar_resnet, 56, 8)),
    "cifar10-wrn32-small": small_cifar(partial(cifar_resnet, 32, 16)),
    "cifar10-resnet18": cifar(partial(resnet18, 64)),
    "cifar10-vgg16bn": cifar(partial(vgg16_bn, 64, pools=5)),
    "cifar10-resnet56": cifar(partial(cifar_resnet, 56, 16)),
    "cifar10-wrn32": cifar(partial(cifar_resnet, 32, 64)),  # four times as wide, as in arXiv 1905.05934
    "flowers-resnet18-small": small_flowers(partial(resnet18, 16, stride=2, classes=102)),
    "flowers-alexnet-small": small_flowers(partial(alexnet, 16, 256, size=32, classes=102), lr=0.05),
    "flowers-resnet18": flowers(partial(resnet18, 64, stride=2, classes=102)),
    "flowers-alexnet": flowers(partial(alexnet, 64, 4096, size=64, classes=102), lr=0.05),
    "flowers-resnet18-pretrained": trained(partial(torchvision_net, "resnet18", 102), lr=0.02, pretrained=True),
    "flowers-vgg16bn-pretrained": trained(partial(torchvision_net, "vgg16_bn", 102), lr=0.01, pretrained=True),
}
