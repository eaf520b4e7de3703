"""Torch-Pruning as a peer: it removes what it is asked to when others do, and is run as well as it can be."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks import accuracy
from benchmarks.methods import METHODS
from benchmarks.peers import SparseTorchPruning, TaylorTorchPruning, TorchPruning
from benchmarks.tasks import TASKS
from benchmarks.training import Training
from examples.digits import DigitsNet, Images
from kfac_flat.pruning.budget import Schedule

pytest.importorskip("torch_pruning", reason='torch-pruning is not installed: pip install -e ".[benchmark]"')

KINDS = [TorchPruning, TaylorTorchPruning, SparseTorchPruning]
SCHEDULE: dict[str, Any] = {"target": 0.6, "start": 1, "every": 1, "events": 3}


def made(kind: Any, model: nn.Module, **options: Any) -> tuple[SGD, Any, list[tuple[Tensor, Tensor]]]:
    """An optimizer that has made a step, a peer, and the batches it is given."""
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    peer = kind(model, optimizer, batches[0][0][:1], batches, **{**SCHEDULE, **options})
    train(model, optimizer, batches)
    return optimizer, peer, batches


def train(model: nn.Module, optimizer: SGD, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("tp-")])
def test_every_one_of_them_trains_and_removes_the_neurons_it_is_asked_to(name: str) -> None:
    train_set, test_set = TASKS["digits"].load(None)
    task = replace(TASKS["digits"], network=partial(DigitsNet, 8))
    data = Images(train_set.images[:192], train_set.labels[:192]), Images(test_set.images[:50], test_set.labels[:50])
    found = accuracy.run(Training(task, METHODS[name], 0.5, 0, 3), data)
    assert found["neurons"] == pytest.approx(36, abs=2)
    assert found["neurons"] <= 36
    assert found["missed"] == 0
    again = accuracy.run(Training(task, METHODS[name], 0.5, 0, 3), data)
    assert (again["widths"], again["accuracy"]) == (found["widths"], found["accuracy"])


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("tp-")])
def test_every_one_of_them_gets_to_the_multiply_accumulates_it_is_asked_for(name: str) -> None:
    train_set, test_set = TASKS["digits"].load(None)
    task = replace(TASKS["digits"], network=partial(DigitsNet, 8))
    data = Images(train_set.images[:192], train_set.labels[:192]), Images(test_set.images[:50], test_set.labels[:50])
    found = accuracy.run(Training(task, METHODS[name], 0.6, 0, 3, budget="macs"), data)
    dense = accuracy.measured(DigitsNet(8), data[0].images[:1])[0].macs
    assert 0.35 * dense < found["macs"] <= 0.4 * dense
    assert found["missed"] == 0


def test_its_multiply_accumulates_are_those_of_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = DigitsNet(8)
    optimizer, peer, batches = made(TorchPruning, model, budget="macs")
    for _ in range(3):
        assert peer.macs == accuracy.measured(model, batches[0][0][:1])[0].macs
        peer.step()
        train(model, optimizer, batches)


@pytest.mark.parametrize("kind", KINDS)
def test_it_removes_in_the_epochs_and_at_the_pace_of_the_others(kind: Any) -> None:
    torch.manual_seed(0)
    model = DigitsNet(8).train()
    optimizer, peer, batches = made(kind, model, start=2)
    assert all(module.training for module in model.modules())
    schedule, shares = Schedule(2, 1, 3, "cubic"), []
    for epoch in range(1, 6):
        peer.step()
        assert all(module.training for module in model.modules())
        event = min(3, epoch - 1)
        due = SCHEDULE["target"] * schedule.share(event) if event else 0.0
        assert due - 1e-9 <= peer.progress < due + 4 / 72
        assert peer.finished == (epoch >= 4)
        shares.append(peer.progress)
        train(model, optimizer, batches)
    assert shares[0] == 0 < shares[1] < shares[2] < shares[3] == shares[4]
    assert 1 - accuracy.measured(model, batches[0][0][:1])[0].neurons / 72 == peer.progress


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_trains_what_is_left(kind: Any) -> None:
    torch.manual_seed(0)
    model = DigitsNet(8)
    optimizer, peer, batches = made(kind, model)
    optimizer.param_groups[0]["lr"] = 0.05  # of a schedule
    peer.step()
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert not optimizer.state
    assert (group["lr"], group["momentum"]) == (0.05, 0.9)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_magnitude_is_that_of_incoming_and_outgoing_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    _, peer, _ = made(TorchPruning, model, events=1, target=0.5)
    first, second = (model[i].weight.detach().clone() for i in (1, 3))  # type: ignore[union-attr]
    importance = first.square().sum(1) + second.square().sum(0)
    peer.step()
    kept = importance.argsort()[10:].sort().values
    assert torch.equal(model[1].weight, first[kept])
    assert torch.equal(model[3].weight, second[:, kept])


def test_taylor_goes_by_the_gradients_of_all_images_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    _, peer, batches = made(TaylorTorchPruning, model, events=1, target=0.5)
    statistics = model[2].running_mean.clone()  # type: ignore[union-attr, operator]
    model.eval()
    loss = sum(F.cross_entropy(model(x), y) for x, y in batches)
    first, second = model[1].weight, model[4].weight
    gradients = torch.autograd.grad(loss, [first, second])  # type: ignore[arg-type]
    importance = (first * gradients[0]).abs().sum(1) + (second * gradients[1]).abs().sum(0)  # BatchNorm is left out
    expected = first.detach()[importance.argsort()[10:].sort().values].clone()
    model.train()
    peer.step()
    assert torch.equal(model[1].weight, expected)
    assert model[2].running_mean.shape == (10,)
    assert all(value in statistics for value in model[2].running_mean)
    assert model.training


def test_sparse_training_lasts_until_the_last_removal() -> None:
    torch.manual_seed(0)
    model = DigitsNet(8)
    optimizer, peer, batches = made(SparseTorchPruning, model, events=2)
    for removed in range(3):
        assert optimizer.param_groups[0]["weight_decay"] == (0.0 if removed < 2 else 5e-4)
        optimizer.zero_grad()
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        plain = [(p, p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        added = [((p.grad - gradient) * weight).flatten() for p, weight, gradient in plain if p.grad is not None]
        assert bool(torch.cat(added).any()) == (removed < 2)
        assert bool((torch.cat(added) >= 0).all())  # toward zero
        peer.step()


def test_a_layer_of_one_channel_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer, _, batches = made(SparseTorchPruning, model)
    optimizer.zero_grad()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    single, before = model[1].weight, model[1].weight.grad.clone()  # type: ignore[union-attr, operator]
    optimizer.step()
    assert torch.equal(single.grad, before)  # type: ignore[arg-type]
    assert all(p.isfinite().all() for p in model.parameters())
