"""Networks of the benchmarks; the widths given are those of their first layers."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from examples.digits import ResidualBlock
from examples.torchvision_models import models

# ---------------------------------------------------------------- residual networks


class CifarNet(nn.Module):
    """A residual network: a stem as wide as the first block's input, then blocks from each width to the next.

    Args:
        widths: Channels before the first block and after each; where they change, the image gets half as high and wide.
        stride: Of the stem.
        classes: Number of logits.
    """

    def __init__(self, widths: tuple[int, ...], stride: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, stride=1 if i == o else 2) for i, o in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, H, W]`` to logits ``[N, classes]``."""
        x = self.relu(self.norm(self.stem(x)))
        return self.head(self.pool(self.blocks(x)).flatten(1))


def resnet18(width: int, stride: int = 1, classes: int = 10) -> CifarNet:
    """ResNet-18 for small images: 17 convolutions beside the shortcuts; the paper's width is 64."""
    widths = (width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width)
    return CifarNet(widths, stride, classes)


def cifar_resnet(depth: int, width: int) -> CifarNet:
    """ResNet of three stages [He et al., arXiv 1512.03385, section 4.2], with shortcuts of option B.

    The paper's width is 16; wide ones [Zagoruyko & Komodakis, arXiv 1605.07146] have a multiple, in the stem as well.

    Args:
        depth: Convolutions in a row and the classifier: 2 more than a multiple of 6.
        width: Channels of the stem and of the first stage; the others have two and four times as many.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest:
        raise ValueError(f"depth={depth} must be 2 more than a multiple of 6")
    return CifarNet((width, *(factor * width for factor in (1, 2, 4) for _ in range(blocks))))


# ---------------------------------------------------------------- plain convolutions


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


def alexnet(width: int, hidden: int, size: int, classes: int) -> nn.Module:
    """AlexNet for small images: its five convolutions and three Linears, smaller strides and kernels at the front.

    With BatchNorm behind the convolutions: without, it does not learn from images as few as those of Flowers-102.

    Args:
        width: Channels of the first convolution, 64 in Krizhevsky's network for one device [arXiv 1404.5997].
        hidden: Neurons of the two hidden Linears, 4096 there.
        size: Height and width of the images, a multiple of 16.
        classes: Number of logits.
    """
    layers: list[nn.Module] = []
    channels = 3
    for factor, kernel, stride, pools in (
        (1, 5, 2, True),
        (3, 5, 1, True),
        (6, 3, 1, False),
        (4, 3, 1, False),
        (4, 3, 1, True),
    ):
        layers.append(nn.Conv2d(channels, channels := factor * width, kernel, stride, kernel // 2, bias=False))
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if pools:
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for inputs in (channels * (size // 16) ** 2, hidden):
        layers += [nn.Dropout(), nn.Linear(inputs, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def lenet5() -> nn.Module:
    """LeNet-5 as it is used in work on pruning, 431,080 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def lenet_300_100() -> nn.Module:
    """A multi-layer perceptron with hidden layers of 300 and 100 neurons."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


# ---------------------------------------------------------------- torchvision's


def torchvision_net(name: str, classes: int) -> nn.Module:
    """One of torchvision's classifiers with random weights."""
    return models.get_model(name, weights=None, num_classes=classes)
