"""What the benchmarks train: networks, images and recipes.

``digits`` takes seconds and needs no files. The others read what torchvision's own classes do, from ``--data-root``:
``mnist-mlp`` (LeNet-300-100) and ``mnist-lenet5``, and CIFAR-10 with ResNet-18 and VGG-16-BN. ``cifar`` and those named
``-small`` are for a CPU: 16 x 16 pixels, 10,000 training and 2,000 test images, narrower networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from examples import digits
from examples.digits import DigitsNet, Images, ResidualBlock
from examples.torchvision_models import datasets

# ---------------------------------------------------------------- networks


class CifarNet(nn.Module):
    """A residual network: a stem as wide as the first block's input, then blocks from each width to the next.

    Args:
        widths: Channels before the first block and after each; where they change, the image gets half as high and wide.
        stride: Of the stem.
    """

    def __init__(self, widths: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, stride=1 if i == o else 2) for i, o in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, H, W]`` to logits ``[N, 10]``."""
        x = self.relu(self.norm(self.stem(x)))
        return self.head(self.pool(self.blocks(x)).flatten(1))


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for small images: 17 convolutions beside the shortcuts; the paper's width is 64."""
    return CifarNet((width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width))


def vgg16_bn(width: int, pools: int) -> nn.Module:
    """VGG-16 with BatchNorm and one Linear behind its 13 convolutions; the paper's width is 64."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (factor, convolutions) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))):
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, channels := factor * width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if stage < pools:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def lenet_300_100() -> nn.Module:
    """A multi-layer perceptron with hidden layers of 300 and 100 neurons."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5() -> nn.Module:
    """LeNet-5 as it is used in work on pruning, 431,080 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


# ---------------------------------------------------------------- images


def load_mnist(root: Path | None) -> tuple[Images, Images]:
    """Return the 60,000 training and 10,000 test images of MNIST, values in [0, 1]."""
    parts = (datasets.MNIST(_folder(root, "MNIST/"), train=train) for train in (True, False))
    train, test = (Images(part.data[:, None].float() / 255, part.targets) for part in parts)
    return train, test


def load_cifar(root: Path | None) -> tuple[Images, Images]:
    """Return all 50,000 training and 10,000 test images of CIFAR-10, values in [0, 1]."""
    return _cifar_part(root, True), _cifar_part(root, False)


def load_small_cifar(root: Path | None) -> tuple[Images, Images]:
    """Return the first 10,000 training and 2,000 test images of CIFAR-10, each pixel the mean of four."""
    train, test = _cifar_part(root, True, 10_000), _cifar_part(root, False, 2_000)
    return _halved(train), _halved(test)


def _cifar_part(root: Path | None, train: bool, count: int | None = None) -> Images:
    data = datasets.CIFAR10(_folder(root, "cifar-10-batches-py/"), train=train)
    images = torch.from_numpy(data.data[:count]).movedim(3, 1).float() / 255
    return Images(images.contiguous(memory_format=torch.channels_last), torch.tensor(data.targets[:count]))


def _halved(part: Images) -> Images:
    small = F.avg_pool2d(part.images, 2)
    return Images(small.contiguous(memory_format=torch.channels_last), part.labels)  # a little faster


def _folder(root: Path | None, holds: str) -> Path:
    if root is None:
        raise SystemExit(f"this task needs --data-root, the folder with {holds}")
    return root


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, zeros coming in, and mirror every other one at random."""
    size = images.shape[-1]
    pad = size // 8
    shifts = torch.randint(2 * pad + 1, (2, len(images), 1), generator=generator)
    mirrored = torch.rand(len(images), 1, generator=generator) < 0.5
    rows, columns = shifts + torch.arange(size)
    columns = torch.where(mirrored, columns.flip(1), columns)
    example, channel = torch.arange(len(images))[:, None, None, None], torch.arange(images.shape[1])[:, None, None]
    places = (example, channel, rows[:, None, :, None], columns[:, None, None, :])
    return F.pad(images, [pad] * 4)[tuple(index.to(images.device) for index in places)]


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
    """

    load: Callable[[Path | None], tuple[Images, Images]]
    network: Callable[[], nn.Module]
    epochs: int
    last: int
    batch_size: int
    lr: float = 0.1
    seen: float = 1.0
    augment: bool = False

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
    ) -> Iterator[None]:
        """Train for an epoch; whoever runs it gets a turn after each update."""
        model.train()
        for images, labels in islice(train_set.batches(self.batch_size, generator), self.updates(train_set)):
            optimizer.zero_grad()
            CRITERION(model(augmented(images, generator) if self.augment else images), labels).backward()
            optimizer.step()
            schedule.step()
            yield


def accuracy(model: nn.Module, data: Images, batch: int = 1000) -> float:
    """Return the share of images (%) that are recognised."""
    model.eval()
    with torch.inference_mode():
        parts = zip(data.images.split(batch), data.labels.split(batch), strict=True)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
    return 100 * right / len(data.labels)


TASKS = {
    "digits": Task(lambda _: digits.load_data("cpu"), partial(DigitsNet, 32), epochs=24, last=13, batch_size=64),
    "mnist-mlp": Task(load_mnist, lenet_300_100, epochs=12, last=7, batch_size=128, lr=0.05),
    "mnist-lenet5": Task(load_mnist, lenet5, epochs=8, last=5, batch_size=128, lr=0.05),
    "cifar10-resnet18-small": Task(
        *(load_small_cifar, partial(resnet18, 16)), epochs=30, last=18, batch_size=128, augment=True
    ),
    "cifar10-vgg16bn-small": Task(
        *(load_small_cifar, partial(vgg16_bn, 16, pools=4)), epochs=30, last=18, batch_size=128, augment=True
    ),
    "cifar10-resnet18": Task(load_cifar, partial(resnet18, 64), epochs=60, last=36, batch_size=128, augment=True),
    "cifar10-vgg16bn": Task(
        *(load_cifar, partial(vgg16_bn, 64, pools=5)), epochs=60, last=36, batch_size=128, augment=True
    ),
}
