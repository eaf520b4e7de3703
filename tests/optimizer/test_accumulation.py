"""Gradients accumulated over micro-batches get the penalty of one batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, plain, same, snapshot, times, train
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def added(model: nn.Module, optimizer: FlatKFAC) -> list[Tensor]:
    """What a step adds to the gradients that have been accumulated."""
    own = gradients(model)
    optimizer.step()
    return [g - o for g, o in zip(gradients(model), own, strict=True)]


def accumulate(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, sizes: list[int]) -> None:
    """Add up the gradients of micro-batches, as loops do, so that their sum is that of the whole batch."""
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        (criterion(model(part_x), part_y) * len(part_x) / len(x)).backward()


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [3, 5], [1] * 8], ids=str)
def test_micro_batches_train_like_one_batch(sizes: list[int], fraction: float, fisher: str) -> None:
    """Over several steps, refreshes at every second one, against steps on the whole batches."""

    def run(sizes: list[int]) -> tuple[Any, float]:
        model, options = mlp(), {"batch_fraction": fraction, "fisher": fisher, "every": 2, "clip": 1.0}
        optimizer = plain(model, base=SGD(model.parameters(), lr=0.1, momentum=0.9), mu=0.3, **options)
        for number in range(5):
            x, y = batch(8, 4, seed=number)
            optimizer.zero_grad()
            accumulate(model, criterion_of(optimizer), x, y, sizes)
            optimizer.step()
        return model.state_dict(), optimizer.rho

    (seen, rho), (expected, whole_rho) = run(sizes), run([8])
    assert rho == pytest.approx(whole_rho, rel=1e-9)
    for name, value in expected.items():
        assert torch.allclose(seen[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5]], ids=str)
def test_what_is_added_is_the_penalty_of_all_examples(sizes: list[int]) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    accumulate(model, criterion_of(optimizer), x, y, sizes)
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_losses_that_are_added_up_before_one_backward_are_one_batch_too() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    criterion = criterion_of(optimizer)
    (criterion(model(x[:4]), y[:4]) + criterion(model(x[4:]), y[4:])).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


CLEAR: dict[str, Callable[[FlatKFAC, nn.Module], Any]] = {
    "optimizer.zero_grad()": lambda optimizer, model: optimizer.zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda optimizer, model: model.zero_grad(),
}


@pytest.mark.parametrize("clear", CLEAR)
def test_a_batch_whose_gradient_was_thrown_away_is_no_part(clear: str) -> None:
    """As after a step that a GradScaler has skipped."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(model(10 * x), y).backward()
    CLEAR[clear](optimizer, model)
    criterion_of(optimizer)(model(x), y).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


@pytest.mark.parametrize("clear", CLEAR)
def test_gradients_may_be_cleared_between_forward_and_backward(clear: str) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, reduction="sum")
    for scale in (3, 2, 1):
        loss = criterion_of(optimizer)(model(scale * x), y)
        CLEAR[clear](optimizer, model)
        loss.backward()
        if scale > 1:
            optimizer.step()
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_a_forward_without_backward_is_no_part() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    looked_at = model(5 * x)
    criterion_of(optimizer)(model(x), y).backward()
    model(7 * x)
    assert looked_at.requires_grad
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_forwards_without_backward_do_not_pile_up() -> None:
    model = mlp()
    optimizer = plain(model, mu=0.3)

    def batches() -> int:
        gc.collect()
        return sum(issubclass(type(item), Tensor) and item.shape == (53, 4) for item in gc.get_objects())

    for _ in range(10):
        model(batch(53, 4)[0])
    assert batches() <= 1
    criterion_of(optimizer)(model(batch(8, 4)[0]), batch(8, 4)[1]).backward()
    optimizer.step()
    assert batches() == 0


def test_micro_batches_that_do_not_fit_together_leave_the_last_one() -> None:
    """Images of different sizes."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    (large, y), (small, z) = batch(6, 2, 7, 7), batch(4, 2, 5, 5)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(z), small)
    optimizer = plain(model, mu=0.3)
    for x, target in ((large, y), (small, z)):
        criterion_of(optimizer)(model(x), target).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


class Masked(nn.Module):
    """Takes a dict, a tensor for the whole batch, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, inputs: dict[str, Tensor], weights: Tensor, *, doubled: bool) -> Tensor:
        return self.net(inputs["x"] * weights * (2 if doubled else 1))


def test_nested_arguments_are_joined_and_shared_ones_kept() -> None:
    model, (x, y) = Masked(), batch(8, 4)
    weights = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y), 2 * weights * x)
    optimizer = plain(model, mu=0.3)
    for part, target in zip(x.split([3, 5]), y.split([3, 5]), strict=True):
        criterion_of(optimizer)(model({"x": part}, weights, doubled=True), target).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_accumulation_over_steps_without_a_refresh_keeps_no_batch() -> None:
    model = mlp()
    optimizer = plain(model, mu=0.3, every=3)
    train(model, optimizer, 1)
    criterion_of(optimizer)(model(batch(8, 4)[0]), batch(8, 4)[1]).backward()
    assert optimizer._calls.graphs == []


def test_with_mu_zero_accumulation_is_the_bases() -> None:
    ends = []
    for wrap in (True, False):
        model = mlp()
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = FlatKFAC(base, model, mu=0.0) if wrap else base
        for number in range(3):
            x, y = batch(8, 4, seed=number)
            optimizer.zero_grad()
            accumulate(model, nn.CrossEntropyLoss(), x, y, [4, 4])
            optimizer.step()
        ends.append(snapshot(model, base))
    assert same(*ends)
