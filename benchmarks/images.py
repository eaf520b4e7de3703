"""Images of the benchmarks, read by torchvision's own classes from a folder and kept in memory, and their augmentation.

Those named small are for a CPU: pixels are means of four, and there are fewer images where there are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from examples.digits import Images
from examples.torchvision_models import datasets

FLOWERS_SIZE = 64  # pixels, each way

# ---------------------------------------------------------------- data sets


def load_mnist(root: Path | None) -> tuple[Images, Images]:
    """Return the 60,000 training and 10,000 test images of MNIST, values in [0, 1]."""
    parts = (datasets.MNIST(_folder(root, "MNIST/"), train=train) for train in (True, False))
    train, test = (Images(part.data[:, None].float() / 255, part.targets) for part in parts)
    return train, test


def load_few_mnist(root: Path | None) -> tuple[Images, Images]:
    """Return the first 1,024 training images of MNIST, so few that networks overfit them, and all test images."""
    train, test = load_mnist(root)
    return Images(train.images[:1024], train.labels[:1024]), test


def load_cifar(root: Path | None) -> tuple[Images, Images]:
    """Return all 50,000 training and 10,000 test images of CIFAR-10, values in [0, 1]."""
    return _cifar_part(root, True), _cifar_part(root, False)


def load_small_cifar(root: Path | None) -> tuple[Images, Images]:
    """Return the first 10,000 training and 2,000 test images of CIFAR-10, each pixel the mean of four."""
    train, test = _cifar_part(root, True, 10_000), _cifar_part(root, False, 2_000)
    return _halved(train), _halved(test)


def _cifar_part(root: Path | None, train: bool, count: int | None = None) -> Images:
    data = datasets.CIFAR10(_folder(root, "cifar-10-batches-py/"), train=train)
    return Images(_as_floats(data.data[:count]), torch.tensor(data.targets[:count]))


def load_flowers(root: Path | None) -> tuple[Images, Images]:
    """Return the 2,040 training (its validation images among them) and 6,149 test images of Flowers-102 at 64 x 64.

    The folder has either ``flowers-102/``, as :class:`torchvision.datasets.Flowers102` reads it (that takes SciPy), or
    ``flowers102/`` with a folder for each of train, val and test that :class:`torchvision.datasets.ImageFolder` reads.
    """
    train, validation, test = (_flowers_part(root, split) for split in ("train", "val", "test"))
    both = ((train.images, validation.images), (train.labels, validation.labels))
    return Images(*(torch.cat(parts) for parts in both)), test


def load_small_flowers(root: Path | None) -> tuple[Images, Images]:
    """Return the same at 32 x 32, each pixel the mean of four, and every third of the test images."""
    train, test = load_flowers(root)
    return _halved(train), _halved(Images(test.images[::3], test.labels[::3]))


def _flowers_part(root: Path | None, split: str) -> Images:
    folder = _folder(root, "flowers-102/ or flowers102/")
    original = (folder / "flowers-102").is_dir()
    data = datasets.Flowers102(folder, split) if original else datasets.ImageFolder(folder / "flowers102" / split)
    images, labels = zip(*((_small_pixels(image), label) for image, label in data), strict=True)
    return Images(_as_floats(np.stack(images)), torch.tensor(labels))


def _small_pixels(image: Image.Image) -> np.ndarray:
    """Cut a square out of the middle and scale it to the size that all have."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((FLOWERS_SIZE, FLOWERS_SIZE), Image.Resampling.BILINEAR))


def _as_floats(pixels: np.ndarray) -> Tensor:
    """Bring ``[N, H, W, 3]`` in 0 to 255 to ``[N, 3, H, W]`` in [0, 1], channels last in memory."""
    images = torch.from_numpy(pixels).movedim(3, 1).float() / 255
    return images.contiguous(memory_format=torch.channels_last)


def _halved(part: Images) -> Images:
    small = F.avg_pool2d(part.images, 2)
    return Images(small.contiguous(memory_format=torch.channels_last), part.labels)  # a little faster


def _folder(root: Path | None, holds: str) -> Path:
    if root is None:
        raise SystemExit(f"this task needs --data-root, the folder with {holds}")
    return root


# ---------------------------------------------------------------- what is made of them


def normalized(parts: tuple[Images, Images], mean: Sequence[float], std: Sequence[float]) -> tuple[Images, Images]:
    """Subtract each channel's mean and divide by its standard deviation."""
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    train, test = (Images((part.images - shift) / scale, part.labels) for part in parts)
    return train, test


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, zeros coming in, and mirror every other one at random.

    What is drawn is drawn where the generator is; with one on the device of the images, nothing waits for the other.
    """
    size = images.shape[-1]
    pad = size // 8
    on = generator.device
    shifts = torch.randint(2 * pad + 1, (2, len(images), 1), generator=generator, device=on)
    mirrored = torch.rand(len(images), 1, generator=generator, device=on) < 0.5
    rows, columns = shifts + torch.arange(size, device=on)
    columns = torch.where(mirrored, columns.flip(1), columns)
    example = torch.arange(len(images), device=on)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=on)[:, None, None]
    places = (example, channel, rows[:, None, :, None], columns[:, None, None, :])
    return F.pad(images, [pad] * 4)[tuple(index.to(images.device) for index in places)]
