"""The spectral radius of the Hessian, against Hessians written out row by row and decomposed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from baselines import SpectralRadius
from kfac_flat import NeuronPruner
from tests.optimizer.loops import criterion_of, norm, penalty, same, snapshot
from tests.pruning.nets import CASES
from tests.reference import Residual, assert_gradients_close, batch, mlp, seeded

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8, 4)),
    "convolutions": (
        lambda: seeded(
            lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        ),
        (6, 2, 4, 4),
    ),
}


def regularised(model: nn.Module, base: Any = None, **options: Any) -> SpectralRadius:
    base = SGD(model.parameters(), lr=0.0) if base is None else base
    return SpectralRadius(base, model, nn.CrossEntropyLoss(), **{"clip": None, "iterations": 300, **options})


def hessian(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Row by row, differentiable."""
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for i in range(len(g)):
        row = torch.autograd.grad(g[i], parameters, create_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


def radius_and_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    values = torch.linalg.eigvalsh(hessian(F.cross_entropy(model(x), y), parameters))
    radius = values[values.abs().argmax()].abs()
    return radius.detach(), list(torch.autograd.grad(radius, parameters, materialize_grads=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_penalty_is_mu_times_the_gradient_of_the_hessians_radius(name: str) -> None:
    make, shape = NETWORKS[name]
    model, (x, y) = make(), batch(*shape)
    optimizer = regularised(model, mu=0.3)
    added = penalty(model, optimizer, x, y)
    rho, gradient = radius_and_gradient(model, x, y)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert optimizer.radii() == {"": optimizer.rho}
    assert_gradients_close(added, [0.3 * g for g in gradient], tolerance=1e-5)


def test_a_negative_eigenvalue_of_largest_size_counts_with_its_size() -> None:
    """Of y w^4 / 12 the Hessian is y w^2; where y = -2 on average, its radius is 2 w^2, with gradient 4 w."""

    class Power(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (target * output**4 / 12).mean()

        reduction = "mean"

    model, criterion = nn.Linear(1, 1, bias=False).double(), Power()
    w = model.weight.detach().clone()
    optimizer = SpectralRadius(SGD(model.parameters(), lr=0.0), model, criterion, mu=0.5, clip=None)
    (added,) = penalty(model, optimizer, torch.ones(2, 1).double(), torch.tensor([[-1.0], [-3.0]]).double())
    assert optimizer.rho == pytest.approx(float(2 * w**2))
    assert torch.allclose(added, 0.5 * 4 * w)


def test_below_the_bound_there_is_no_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    rho, _ = radius_and_gradient(model, x, y)
    for factor, there in ((0.99, True), (1.01, False)):
        optimizer = regularised(model, rho_max=factor * float(rho))
        assert bool(norm(penalty(model, optimizer, x, y)) > 0) == there


def test_with_mu_zero_it_is_the_wrapped_optimizer_bit_for_bit() -> None:
    model, other = mlp(), mlp()
    optimizer = regularised(model, Adam(model.parameters(), lr=0.01), mu=0.0)
    train(model, optimizer, range(3))
    bare = Adam(other.parameters(), lr=0.01)
    for step in range(3):
        bare.zero_grad()
        x, y = batch(8, 4, seed=step)
        F.cross_entropy(other(x), y).backward()
        bare.step()
    assert same(model.state_dict(), other.state_dict())


def train(model: nn.Module, optimizer: SpectralRadius, steps: range, shape: tuple[int, ...] = (8, 4)) -> None:
    criterion = criterion_of(optimizer)
    for step in steps:
        x, y = batch(*shape, seed=step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def test_few_power_steps_from_where_the_last_ended_follow_the_radius() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = regularised(model, SGD(model.parameters(), lr=0.02), mu=0.01, iterations=2)
    for _ in range(30):
        rho, _ = radius_and_gradient(model, x, y)
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-3)


def test_descending_on_the_penalty_alone_lowers_the_radius() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    before, _ = radius_and_gradient(model, x, y)
    optimizer = regularised(model, SGD(model.parameters(), lr=0.01), mu=2.0, iterations=20)
    for _ in range(20):
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x), y).backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
    after, _ = radius_and_gradient(model, x, y)
    assert after < 0.7 * before


def test_running_statistics_and_random_generators_are_the_loops_own() -> None:
    def make() -> nn.Module:
        return seeded(lambda: nn.Sequential(Residual(), nn.Dropout(0.5)))

    states = []
    for wrap in (True, False):
        model = make()
        optimizer = regularised(model, iterations=2) if wrap else SGD(model.parameters(), lr=0.0)
        torch.manual_seed(0)
        criterion = criterion_of(optimizer) if isinstance(optimizer, SpectralRadius) else nn.CrossEntropyLoss()
        for step in range(2):
            x, y = batch(6, 2, 5, 5, seed=step)
            criterion(model(x), y).backward()
            optimizer.step()
        states.append([model.state_dict(), torch.get_rng_state()])
    assert same(states[0], states[1])


# -------------------------------------------------------------------------------------------------- pruning


def test_scores_include_what_a_mask_does_to_the_radius_directly() -> None:
    """Against the radius of a masked network's Hessian, differentiated at the masks."""
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = regularised(model, mu=0.3)
    added = penalty(model, optimizer, x, y)
    direct = optimizer.input_mask_gradients()
    masked = copy.deepcopy(model)
    masks = [torch.ones(n).double().requires_grad_() for n in (4, 6, 5)]
    h = x
    for mask, layer, act in zip(masks, (masked[0], masked[2], masked[4]), (torch.tanh, torch.tanh, None), strict=True):
        h = layer(h * mask)
        h = h if act is None else act(h)
    values = torch.linalg.eigvalsh(hessian(F.cross_entropy(h, y), list(masked.parameters())))
    expected = torch.autograd.grad(values[values.abs().argmax()].abs(), masks)
    for e, layer, g in zip(expected, (model[0], model[2], model[4]), added[::2], strict=True):
        total = direct[layer.weight] + (layer.weight.detach() * g).sum(0)
        assert torch.allclose(total, 0.3 * e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn_flatten", "residual", "grouped"])
def test_a_cut_keeps_of_the_eigenvector_what_it_keeps_of_the_parameters_and_undo_gives_it_back(name: str) -> None:
    model, x = CASES[name].build()
    y = torch.arange(len(x)) % 3
    optimizer = regularised(model, SGD(model.parameters(), lr=0.01), mu=0.1, iterations=2)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1, keep_removed=True)
    criterion = criterion_of(optimizer)
    criterion(model(x), y).backward()
    optimizer.step()
    vectors = copy.deepcopy(optimizer.state_dict()["kfac_flat"])
    with torch.no_grad():  # so that what is kept of it can be told from the weights
        for p, v in optimizer._tracker.eigenvectors.items():
            p.copy_(v)
    assert pruner.step()
    after = optimizer.state_dict()["kfac_flat"]["eigenvectors"]
    for parameter, p in model.named_parameters():
        assert torch.equal(after[parameter], p)
    pruner.undo()
    assert same(optimizer.state_dict()["kfac_flat"]["eigenvectors"], vectors["eigenvectors"])
    pruner.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert optimizer.rho > 0


# -------------------------------------------------------------------------------------------------- checkpoints


def test_resuming_from_a_checkpoint_is_bit_exact() -> None:
    def fresh() -> tuple[nn.Module, SpectralRadius]:
        model = seeded(Residual)
        return model, regularised(model, SGD(model.parameters(), lr=0.05, momentum=0.9), mu=0.1, every=2, iterations=2)

    shape = (6, 2, 5, 5)
    model, optimizer = fresh()
    train(model, optimizer, range(3), shape)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, range(3, 6), shape)
    resumed, other = fresh()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 6), shape)
    assert same(snapshot(model, optimizer), snapshot(resumed, other))


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    model, other = mlp(), nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = regularised(model, iterations=2)
    train(model, optimizer, range(1))
    state = {**optimizer.state_dict()}
    state["kfac_flat"] = {**state["kfac_flat"], "penalty": None}
    with pytest.raises(ValueError, match="eigenvector does not fit"):
        regularised(other).load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_goes_on_alike(duplicate: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = regularised(model, SGD(model.parameters(), lr=0.05, momentum=0.9), mu=0.1, iterations=2)
    train(model, optimizer, range(2))
    other, wrapper = duplicate((model, optimizer))
    train(other, wrapper, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert same(snapshot(model, optimizer), snapshot(other, wrapper))
    assert wrapper.rho == optimizer.rho


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0 must be a whole number"):
        regularised(mlp(), iterations=0)
    with pytest.raises(ValueError, match="mu=-1 must be a number"):
        regularised(mlp(), mu=-1)
