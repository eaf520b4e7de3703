"""Networks, images and recipes of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import tasks
from benchmarks.tasks import TASKS, augmented
from examples.digits import Images, dense_size

SHAPES = {
    "digits": (1, 8, 8),
    **dict.fromkeys(("mnist-mlp", "mnist-lenet5"), (1, 28, 28)),
    **dict.fromkeys(("cifar10-resnet18-small", "cifar10-vgg16bn-small"), (3, 16, 16)),
    **dict.fromkeys(("cifar10-resnet18", "cifar10-vgg16bn"), (3, 32, 32)),
}
PARAMETERS = {  # as published for these networks
    "mnist-mlp": 266_610,
    "mnist-lenet5": 431_080,
    "cifar10-resnet18": 11_173_962,
    "cifar10-vgg16bn": 14_728_266 - 4_224,  # without the biases that BatchNorm takes out again
}
MACS = {"cifar10-resnet18": 555_422_720, "cifar10-vgg16bn": 313_201_664}


@pytest.mark.parametrize("name", TASKS)
def test_networks_map_images_to_ten_classes_and_every_hidden_neuron_can_go(name: str) -> None:
    model = TASKS[name].network()
    x = torch.randn(2, *SHAPES[name])
    assert model(x).shape == (2, 10)
    (size, widths), parameters = dense_size(model, x[:1]), sum(p.numel() for p in model.parameters())
    assert parameters == PARAMETERS.get(name, parameters)
    assert size.macs == MACS.get(name, size.macs)
    assert size.neurons == sum(widths.values()) - 10


def test_small_networks_have_the_layers_of_the_large_ones() -> None:
    for name in ("cifar10-resnet18", "cifar10-vgg16bn"):
        large, small = (
            [m for m in TASKS[task].network().modules() if isinstance(m, nn.Conv2d)] for task in (name, f"{name}-small")
        )
        assert [m.out_channels for m in large] == [4 * m.out_channels for m in small]


def test_the_last_removal_keeps_its_place_in_trainings_of_other_lengths() -> None:
    for task in TASKS.values():
        for epochs in (1, 2, 5, task.epochs, 100):
            places = task.removals(epochs)
            assert places["start"] >= 1
            last = places["start"] + (places["events"] - 1) * places["every"]
            assert last == task.last_removal(epochs) <= epochs


def shifted(image: Tensor, pad: int, down: int, right: int, mirrored: bool) -> Tensor:
    """What is seen of an image with a border of zeros through a window at this place, one number at a time."""
    size = image.shape[-1]
    seen = torch.zeros_like(image)
    for c in range(len(image)):
        for i in range(size):
            for j in range(size):
                column = size - 1 - j if mirrored else j
                row, column = i + down - pad, column + right - pad
                if 0 <= row < size and 0 <= column < size:
                    seen[c, i, j] = image[c, row, column]
    return seen


def test_augmented_images_are_shifted_and_mirrored_each_in_its_own_way() -> None:
    torch.manual_seed(0)
    images = torch.rand(12, 2, 8, 8) + 0.1
    found = augmented(images, torch.Generator().manual_seed(3))
    ways = []
    for image, changed in zip(images, found, strict=True):
        ways += [
            (down, right, mirrored)
            for down in range(3)
            for right in range(3)
            for mirrored in (False, True)
            if torch.equal(shifted(image, 1, down, right, mirrored), changed)
        ]
    assert len(ways) == len(images)
    assert {mirrored for *_, mirrored in ways} == {False, True}
    assert {down for down, *_ in ways} == {right for _, right, _ in ways} == {0, 1, 2}
    assert torch.equal(found, augmented(images, torch.Generator().manual_seed(3)))


def test_an_epoch_sees_the_share_of_the_images_that_it_should() -> None:
    images = Images(torch.rand(100, 1, 8, 8), torch.arange(100) % 10)
    task = tasks.Task(lambda _: (images, images), TASKS["digits"].network, 2, 1, batch_size=10, seen=0.5)
    model = task.network()
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer, 2, images)
    generator, group = torch.Generator(), optimizer.param_groups[0]
    rates = [group["lr"] for _ in range(2) for _ in task.epoch(model, optimizer, schedule, images, generator)]
    assert len(rates) == 2 * task.updates(images) == 10
    assert rates[-2] < 1e-4 * task.lr, "the last update comes at the end of the learning rate's cycle"


def test_accuracy_counts_over_all_batches() -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x[:, 0].long(), 10).float()

    images = Images(torch.arange(25)[:, None] % 10, torch.arange(25) % 10)
    images.labels[3] = 9
    images.labels[24] = 1
    assert tasks.accuracy(Told(), images, batch=10) == pytest.approx(92)


def test_mnist_is_read_as_torchvision_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = {train: torch.full((count, 28, 28), 51, dtype=torch.uint8) for train, count in ((True, 6), (False, 2))}

    def mnist(root: Path, train: bool) -> SimpleNamespace:
        assert root == tmp_path
        return SimpleNamespace(data=parts[train], targets=torch.arange(len(parts[train])))

    monkeypatch.setattr(tasks, "datasets", SimpleNamespace(MNIST=mnist))
    train, test = TASKS["mnist-mlp"].load(tmp_path)
    assert train.images.shape == (6, 1, 28, 28)
    assert test.images.shape == (2, 1, 28, 28)
    assert torch.allclose(train.images, torch.tensor(0.2))
    assert test.labels.tolist() == [0, 1]


def test_cifar_is_read_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    fake = SimpleNamespace(CIFAR10=lambda root, train: SimpleNamespace(data=pixels, targets=[3, 7] * 10))
    monkeypatch.setattr(tasks, "datasets", fake)
    train, _ = TASKS["cifar10-resnet18"].load(tmp_path)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.images[4, 2, 5, 6].item() == pytest.approx(pixels[4, 5, 6, 2] / 255)
