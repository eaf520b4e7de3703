"""Networks, images and recipes of the benchmarks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import SGD

from benchmarks import tasks
from benchmarks.execution import PLAIN, Execution
from benchmarks.images import augmented
from benchmarks.networks import cifar_resnet, resnet18, torchvision_net
from benchmarks.tasks import TASKS
from examples.digits import Images, dense_size
from kfac_flat import FlatKFAC, NeuronPruner

SHAPES = {
    "digits": (1, 8, 8),
    **dict.fromkeys(("mnist-mlp", "mnist-lenet5", "mnist-lenet5-few"), (1, 28, 28)),
    **dict.fromkeys((name for name in TASKS if name.startswith("cifar10")), (3, 32, 32)),
    **dict.fromkeys((name for name in TASKS if name.startswith("cifar10") and name.endswith("-small")), (3, 16, 16)),
    **dict.fromkeys((name for name in TASKS if name.startswith("flowers")), (3, 64, 64)),
    **dict.fromkeys((name for name in TASKS if name.startswith("flowers") and name.endswith("-small")), (3, 32, 32)),
}
OPTION_B = (16 + 2) * 32 + (32 + 2) * 64  # the shortcuts' convolutions and BatchNorms of a ResNet of width 16
PARAMETERS = {  # as published for these networks
    "mnist-mlp": 266_610,
    "mnist-lenet5": 431_080,
    "cifar10-resnet18": 11_173_962,
    "cifar10-vgg16bn": 14_728_266 - 4_224,  # without the biases that BatchNorm takes out again
    "cifar10-resnet56": 853_018 + OPTION_B,
    "flowers-resnet18-pretrained": 11_689_512 - 898 * (512 + 1),  # torchvision's, of 1,000 classes
    "flowers-vgg16bn-pretrained": 138_365_992 - 898 * (4096 + 1),
}
MACS = {"cifar10-resnet18": 555_422_720, "cifar10-vgg16bn": 313_201_664}
MODELS: dict[str, nn.Module] = {}


def network(name: str) -> nn.Module:
    """Made once: a large one takes a while."""
    if name not in MODELS:
        MODELS[name] = TASKS[name].network()
    return MODELS[name]


@pytest.mark.parametrize("name", TASKS)
def test_networks_map_images_to_all_classes_and_every_hidden_neuron_can_go(name: str) -> None:
    model, classes = network(name), 102 if name.startswith("flowers") else 10
    x = torch.randn(2, *SHAPES[name])
    assert model.train()(x).shape == (2, classes)
    (size, widths), parameters = dense_size(model, x[:1]), sum(p.numel() for p in model.parameters())
    assert parameters == PARAMETERS.get(name, parameters)
    assert size.macs == MACS.get(name, size.macs)
    assert size.neurons == sum(widths.values()) - classes


@pytest.mark.parametrize("name", [name for name in TASKS if name.endswith("-small")])
def test_a_step_of_hgnp_trains_and_prunes_every_small_network(name: str) -> None:
    torch.manual_seed(0)
    model, x = TASKS[name].network(), torch.randn(4, *SHAPES[name])
    optimizer = FlatKFAC(TASKS[name].optimizer(model), model)
    pruner = NeuronPruner(model, optimizer, x[:1], target=0.5, start=1, events=1, budget="macs")
    optimizer.zero_grad()
    tasks.CRITERION(model(x), torch.arange(4)).backward()
    optimizer.step()
    assert optimizer.rho > 0
    assert not optimizer.skipped_layers
    report = pruner.step()
    assert report.after.macs <= report.before.macs / 2
    assert model(x).isfinite().all()


def test_residual_networks_for_cifar_have_the_published_depths_and_sizes() -> None:
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)):  # He et al., table 6
        model = cifar_resnet(depth, 16)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == depth - 1
        assert [c.out_channels for c in convolutions if c.kernel_size == (1, 1)] == [32, 64]
        parameters = sum(p.numel() for p in model.parameters()) - OPTION_B
        assert parameters == pytest.approx(1e6 * millions, rel=0.02)
    weights = [sum(p.numel() for p in cifar_resnet(32, w).parameters() if p.dim() == 4) for w in (16, 64)]
    assert weights[1] - 9 * 3 * 64 == 16 * (weights[0] - 9 * 3 * 16), "but for what reads the image's three channels"
    with pytest.raises(ValueError, match="depth=18 must be 2 more than a multiple of 6"):
        cifar_resnet(18, 16)


def test_the_network_like_alexnet_has_its_widths() -> None:
    layers = [m for m in network("flowers-alexnet").modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    original = [m for m in torchvision_net("alexnet", 102).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [len(m.weight) for m in layers] == [len(m.weight) for m in original]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", [PLAIN, Execution(amp="bf16", channels_last=True)])
def test_the_host_never_waits_for_a_gpu_in_an_epoch(execution: Execution) -> None:
    device = torch.device("cuda")
    data = Images(torch.rand(256, 3, 32, 32, device=device), torch.arange(256, device=device) % 10)
    task = tasks.Task(lambda _: (data, data), lambda: resnet18(8), 1, 1, batch_size=32, augment=True)
    model, generator = execution.placed(task.network(), device), torch.Generator(device)
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer, 2, data)
    try:
        for mode in ("default", "error"):  # the first epoch chooses kernels
            torch.cuda.set_sync_debug_mode(mode)
            updates = [None for _ in task.epoch(model, optimizer, schedule, data, generator, execution)]
            assert len(updates) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert next(model.parameters()).is_cuda


def test_small_networks_have_the_layers_of_the_large_ones() -> None:
    for name in TASKS:
        if f"{name}-small" in TASKS:
            large, small = (
                [m for m in network(task).modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
                for task in (name, f"{name}-small")
            )
            ratios = {len(a.weight) / len(b.weight) for a, b in zip(large, small, strict=True) if a.weight.dim() == 4}
            assert ratios in ({4.0}, {2.0})


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


def test_an_epoch_on_a_compiled_network_in_bfloat16_makes_about_the_same_updates() -> None:
    torch.manual_seed(0)
    parts = Images(torch.rand(96, 1, 8, 8), torch.arange(96) % 10)
    first, changes = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), []
    seen: list[torch.dtype] = []
    for execution in (PLAIN, Execution(backend="eager"), Execution(amp="bf16", channels_last=True)):
        model = execution.placed(copy.deepcopy(first), torch.device("cpu"))
        model[3].register_forward_hook(lambda _, args, output: seen.append(output.dtype))
        optimizer = SGD(model.parameters(), lr=0.1)
        task = tasks.Task(lambda _: (parts, parts), lambda: first, 1, 1, batch_size=32)
        schedule = task.schedule(optimizer, 2, parts)
        for _ in task.epoch(model, optimizer, schedule, parts, torch.Generator().manual_seed(0), execution):
            pass
        changes.append(
            torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), first.parameters(), strict=True)])
        )
    assert torch.equal(changes[0], changes[1])
    assert not torch.equal(changes[0], changes[2])
    assert (changes[0] - changes[2]).norm() < 0.05 * changes[0].norm()
    assert seen == [torch.float32] * 6 + [torch.bfloat16] * 3


@pytest.mark.parametrize("last", [False, True])
def test_weights_of_convolutions_lie_in_memory_as_asked_for(last: bool) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    placed = Execution(channels_last=last).placed(layers, torch.device("cpu"))
    assert placed[0].weight.is_contiguous(memory_format=torch.channels_last) == last  # type: ignore[index, union-attr]


def test_what_is_compiled_is_what_is_called() -> None:
    compiled: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return module.forward

    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    called = Execution(backend=backend).compiled(model)  # type: ignore[arg-type]
    assert torch.equal(called(x), model(x))
    assert len(compiled) == 1
    assert Execution().compiled(model) is model
    assert Execution(backend="eager").eager == PLAIN
    torch.compiler.reset()


@pytest.mark.parametrize("augment", [False, True])
def test_nothing_in_an_epoch_waits_for_a_number_from_the_device(augment: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # whose values nobody can read
        data = Images(torch.rand(64, 3, 16, 16), torch.zeros(64, dtype=torch.long))
        model = resnet18(4)
        task = tasks.Task(lambda _: (data, data), lambda: model, 1, 1, batch_size=16, augment=augment)
        optimizer = task.optimizer(model)
        schedule = task.schedule(optimizer, 1, data)
        updates = [None for _ in task.epoch(model, optimizer, schedule, data, torch.Generator())]
        assert len(updates) == 4
        with pytest.raises(DataDependentOutputException):
            tasks.accuracy(model, data)


def test_mnist_is_read_as_torchvision_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = {train: torch.full((count, 28, 28), 51, dtype=torch.uint8) for train, count in ((True, 6), (False, 2))}

    def mnist(root: Path, train: bool) -> SimpleNamespace:
        assert root == tmp_path
        return SimpleNamespace(data=parts[train], targets=torch.arange(len(parts[train])))

    monkeypatch.setattr("benchmarks.images.datasets", SimpleNamespace(MNIST=mnist))
    train, test = TASKS["mnist-mlp"].load(tmp_path)
    assert train.images.shape == (6, 1, 28, 28)
    assert test.images.shape == (2, 1, 28, 28)
    assert torch.allclose(train.images, torch.tensor(0.2))
    assert test.labels.tolist() == [0, 1]


def test_cifar_is_read_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    fake = SimpleNamespace(CIFAR10=lambda root, train: SimpleNamespace(data=pixels, targets=[3, 7] * 10))
    monkeypatch.setattr("benchmarks.images.datasets", fake)
    train, _ = TASKS["cifar10-resnet18"].load(tmp_path)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.images[4, 2, 5, 6].item() == pytest.approx(pixels[4, 5, 6, 2] / 255)
    assert train.labels.tolist() == [3, 7] * 10


def test_the_small_cifar_is_the_first_images_of_each_part_with_means_of_four_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {
        train: np.random.default_rng(train).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        for train, count in ((True, 10_050), (False, 2_030))
    }

    def cifar10(root: Path, train: bool) -> SimpleNamespace:
        return SimpleNamespace(data=parts[train], targets=[i % 10 for i in range(len(parts[train]))])

    monkeypatch.setattr("benchmarks.images.datasets", SimpleNamespace(CIFAR10=cifar10))
    small, large = (TASKS[name].load(tmp_path) for name in ("cifar10-resnet18-small", "cifar10-resnet18"))
    assert [len(part.labels) for part in large] == [10_050, 2_030]
    for part, is_train, count in zip(small, (True, False), (10_000, 2_000), strict=True):
        assert part.images.shape == (count, 3, 2, 2)
        assert part.labels.tolist() == [i % 10 for i in range(count)]
        four = parts[is_train][7, 2:4, 0:2, 1]
        assert part.images[7, 1, 1, 0].item() == pytest.approx(four.mean() / 255)


def test_few_images_of_mnist_are_the_first_1024_and_all_test_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def mnist(root: Path, train: bool) -> SimpleNamespace:
        count = 1030 if train else 1500
        return SimpleNamespace(data=torch.arange(count)[:, None, None].expand(-1, 28, 28), targets=torch.arange(count))

    monkeypatch.setattr("benchmarks.images.datasets", SimpleNamespace(MNIST=mnist))
    train, test = TASKS["mnist-lenet5-few"].load(tmp_path)
    assert train.labels.tolist() == list(range(1024))
    assert test.labels.tolist() == list(range(1500))
    assert train.images[:, 0, 5, 6].mul(255).round().tolist() == train.labels.tolist()


def test_flowers_are_read_from_folders_and_from_torchvisions_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for split, classes in (("train", (1, 2)), ("val", (1, 2)), ("test", (1, 2, 2, 2))):
        for i, label in enumerate(classes):
            folder = tmp_path / "flowers102" / split / f"{label:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (51 * label, 102, 255)).save(folder / f"{i}.png")
    train, test = TASKS["flowers-resnet18"].load(tmp_path)
    assert train.images.shape == (4, 3, 64, 64)
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert test.labels.tolist() == [0, 1, 1, 1]
    assert train.images[1, :, 5, 6].tolist() == pytest.approx([0.4, 0.4, 1.0])
    small_train, small_test = TASKS["flowers-resnet18-small"].load(tmp_path)
    assert (small_train.images.shape, small_test.images.shape) == ((4, 3, 32, 32), (2, 3, 32, 32))
    scaled, _ = TASKS["flowers-resnet18-pretrained"].load(tmp_path)
    assert scaled.images[0, 0, 0, 0].item() == pytest.approx((0.2 - 0.485) / 0.229)
    assert scaled.images[0, 2, 0, 0].item() == pytest.approx((1.0 - 0.406) / 0.225)

    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 255, 255), (100, 0, 200, 100))  # the square in the middle
    asked = []

    def flowers(root: Path, split: str) -> list[tuple[Image.Image, int]]:
        asked.append((root, split))
        return [(wide, 101)]

    monkeypatch.setattr("benchmarks.images.datasets", SimpleNamespace(Flowers102=flowers))
    (tmp_path / "flowers-102").mkdir()
    train, test = TASKS["flowers-resnet18"].load(tmp_path)
    assert asked == [(tmp_path, "train"), (tmp_path, "val"), (tmp_path, "test")]
    assert train.labels.tolist() == [101, 101]
    assert torch.equal(test.images, torch.ones(1, 3, 64, 64))
