"""Training and pruning on a device that is not the CPU: run by test_pretend_gpu.py, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_map_only

import baselines
from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.curvature.tracker import HostCopy
from tests.pretend_gpu import HostWaitsError, MixedDevicesError, OnDevice, PretendGPU, register

DEVICE = register()
CRITERION = nn.CrossEntropyLoss()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """Enter the device, which copies to the host as CUDA does: without waiting, if it is not read in the same step."""
    with PretendGPU() as gpu:
        put, get, peek = HostCopy.put, HostCopy.get, HostCopy.peek

        def put_without_waiting(copy: HostCopy, value: Tensor) -> None:
            before, gpu.waiting_allowed = gpu.waiting_allowed, True
            try:
                put(copy, value)
            finally:
                gpu.waiting_allowed = before
            gpu.on_the_way.add(id(copy))

        def is_on_the_way(copy: HostCopy) -> bool:
            return id(copy) in gpu.on_the_way and not gpu.waiting_allowed

        def get_what_has_arrived(copy: HostCopy) -> Tensor | None:
            if is_on_the_way(copy):
                raise HostWaitsError("what was put in this very step")
            return get(copy)

        monkeypatch.setattr(HostCopy, "put", put_without_waiting)
        monkeypatch.setattr(HostCopy, "get", get_what_has_arrived)
        monkeypatch.setattr(HostCopy, "peek", lambda copy: None if is_on_the_way(copy) else peek(copy))
        yield gpu


def test_pretended_device_refuses_what_a_gpu_does(gpu: PretendGPU) -> None:
    a = torch.randn(3, 4).to(DEVICE)
    assert isinstance(a @ a.T, OnDevice)
    assert a.sum().item() == pytest.approx(float(a.held.sum()))
    with pytest.raises(MixedDevicesError):
        a @ torch.randn(4, 2)
    with pytest.raises(MixedDevicesError):
        torch.stack([a.sum(), torch.tensor(1.0)])
    with pytest.raises(MixedDevicesError):
        torch.tensor(0.0).add_(a.sum())
    with pytest.raises(MixedDevicesError):
        torch.randn(3, device=DEVICE, generator=torch.Generator())
    with gpu.without_waiting():
        assert isinstance(a * torch.tensor(2.0) + 1, OnDevice)
        for waiting in (
            lambda: a.sum().item(), lambda: bool(a.sum() > 0), lambda: a.cpu(), lambda: a.tolist(), lambda: a.nonzero(),
            lambda: a[a > 0], lambda: a.masked_select(a > 0), lambda: torch.randn(3).to(DEVICE), lambda: a.unique(),
            lambda: torch.tensor([1.0], device=DEVICE), lambda: a[0].copy_(torch.randn(4)), lambda: torch.equal(a, a),
            lambda: torch.allclose(a, a), lambda: torch.linalg.eigh(a @ a.T), lambda: f"{a.sum()}",
        ):  # fmt: skip
            with pytest.raises(HostWaitsError):
                waiting()


# ---------------------------------------------------------------- models


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3),
        nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Rows of the image are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(images.transpose(1, 2).flatten(2))).mean(1))


MODELS = {"convolutional": convolutional, "attention": Attention}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every step": {"every": 1, "fisher": "empirical", "criterion": CRITERION, "mu": 0.03},
    "plain": {"penalty": "linear", "clip": None, "rho_max": 0.1, "batch_fraction": 1.0, "every": 2},
    "sum": {"reduction": "sum", "every": 2, "survey_every": 4},
    "scheduled": {"mu": lambda step: 0.01 * (step + 1), "rho_max": lambda step: 0.1, "every": 2},
    "bernoulli": {"likelihood": "bernoulli", "every": 2},
    "by group": {"every": 2},
    "two micro-batches": {"every": 2},
}
STEPS, CUT = 10, 4


def train(
    optimizer_of: Callable[[nn.Module], Optimizer],
    network: Callable[[], nn.Module],
    device: torch.device,
    gpu: PretendGPU | None = None,
    pruner_of: Callable[[nn.Module, Optimizer, Batch], Any] | None = None,
    micro_batches: int = 1,
) -> tuple[dict[str, Tensor], Any]:
    """Train for some steps, in the middle of which a pruner is stepped; return the weights and the pruner's report.

    Where there is a ``gpu``, nothing in between may make the host wait but in the first step, which looks for the
    active layer and whether the copy of the model computes what the model does, and in the next refresh after a cut.
    """
    torch.manual_seed(0)
    model = network().to(device)
    images, labels = torch.randn(16, 3, 8, 8).to(device), (torch.arange(16) % 10).to(device)
    optimizer = optimizer_of(model)
    pruner = pruner_of(model, optimizer, (images, labels)) if pruner_of else None
    report = None
    for step in range(STEPS):
        with gpu.without_waiting() if gpu and step and not (report and step <= CUT + 2) else nullcontext():
            optimizer.zero_grad()
            for part, own in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
                (CRITERION(model(part), own) / micro_batches).backward()
            optimizer.step()
        if pruner and step == CUT:
            report = pruner.step()
    return {name: t.cpu() for name, t in model.state_dict().items()}, report


def sgd(model: nn.Module, **options_of_first: float) -> SGD:
    first, *rest = model.parameters()
    return SGD([{"params": [first], **options_of_first}, {"params": rest}], lr=0.05, momentum=0.9)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("network", MODELS)
def test_steps_are_those_of_the_cpu_and_do_not_make_the_host_wait(gpu: PretendGPU, network: str, options: str) -> None:
    def optimizer_of(model: nn.Module) -> FlatKFAC:
        base = sgd(model, mu=0.1) if options == "by group" else sgd(model)
        return FlatKFAC(base, model, **OPTIONS[options])

    parts = 2 if options == "two micro-batches" else 1
    here, _ = train(optimizer_of, MODELS[network], torch.device("cpu"), micro_batches=parts)
    there, _ = train(optimizer_of, MODELS[network], DEVICE, gpu, micro_batches=parts)
    plain, _ = train(sgd, MODELS[network], DEVICE, micro_batches=parts)
    assert_same(there, here)
    assert any(not torch.equal(plain[name], t) for name, t in here.items())


@pytest.mark.parametrize("kind", [baselines.SAM, baselines.SpectralRadius])
def test_peers_steps_are_those_of_the_cpu(gpu: PretendGPU, kind: Callable[..., Optimizer]) -> None:
    runs = [
        train(lambda model: kind(sgd(model), model, criterion=CRITERION), convolutional, device)[0]
        for device in (torch.device("cpu"), DEVICE)
    ]
    assert_same(*runs)


def test_training_goes_on_from_a_checkpoint_that_was_on_the_cpu(gpu: PretendGPU, tmp_path: Path) -> None:
    weights = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = Attention().to(DEVICE)
        optimizer = FlatKFAC(AdamW(model.parameters(), lr=0.01), model, every=2)
        images, labels = torch.randn(16, 3, 8, 8).to(DEVICE), (torch.arange(16) % 10).to(DEVICE)
        for step in range(6):
            if stops and step == 3:
                states = [tree_map_only(Tensor, Tensor.cpu, o.state_dict()) for o in (model, optimizer)]
                torch.save(states, tmp_path / "checkpoint.pt")
                model = Attention().to(DEVICE)
                optimizer = FlatKFAC(AdamW(model.parameters(), lr=0.01), model, every=2)
                for holder, state in zip((model, optimizer), torch.load(tmp_path / "checkpoint.pt"), strict=True):
                    holder.load_state_dict(state)
            torch.manual_seed(step)  # of dropout
            optimizer.zero_grad()
            CRITERION(model(images), labels).backward()
            # The first refresh of an optimizer looks whether its copy of the model computes what that does.
            with gpu.without_waiting() if step not in (0, 4) else nullcontext():
                optimizer.step()
        weights.append({name: t.cpu() for name, t in model.state_dict().items()})
    assert_same(*weights)


# ---------------------------------------------------------------- pruners

Batch = tuple[Tensor, Tensor]


def on_example(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, optimizer, batch: kind(model, optimizer, batch[0][:1], **AT_ONCE)


def on_data(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, optimizer, batch: kind(model, optimizer, batch[0][:1], [batch], **AT_ONCE)


AT_ONCE = {"target": 0.4, "start": 1, "every": 1, "events": 1}
PRUNERS = {
    "hgnp": on_example(NeuronPruner),
    "hybrid": on_example(
        lambda *args, **options: baselines.HybridPruner(*args, **options, taylor=baselines.TaylorPruner, threshold=0.9)
    ),
    "taylor": on_example(baselines.TaylorPruner),
    "gates": on_example(baselines.GateTaylorPruner),
    "magnitude": on_example(baselines.MagnitudePruner),
    "apoz": on_example(baselines.APoZPruner),
    "data-free": on_example(baselines.DataFreePruner),
    "eigendamage": on_data(baselines.EigenDamagePruner),
    "c-obs": on_data(baselines.ChannelOBSPruner),
    "kron-obs": on_data(baselines.KronOBSPruner),
}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_cuts_are_those_of_the_cpu_and_reading_for_them_does_not_make_the_host_wait(
    gpu: PretendGPU, pruner: str
) -> None:
    def optimizer_of(model: nn.Module) -> Optimizer:
        base = sgd(model)
        return base if pruner == "eigendamage" else FlatKFAC(base, model, every=2)  # which it does not take

    here, expected = train(optimizer_of, convolutional, torch.device("cpu"), pruner_of=PRUNERS[pruner])
    there, report = train(optimizer_of, convolutional, DEVICE, gpu, pruner_of=PRUNERS[pruner])
    assert report
    assert str(report) == str(expected)
    assert_same(there, here)
