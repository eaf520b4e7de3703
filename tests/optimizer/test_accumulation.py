"""Gradients accumulated over micro-batches get the penalty of one batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
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


class Scaled(nn.Module):
    """Takes the batch and something that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return self.net(x * torch.as_tensor(scale))


def test_arrays_are_settings_which_have_to_be_equal() -> None:
    """Where they differ, it is the last micro-batch that is read."""
    (x, y), scale = batch(8, 4), np.linspace(0.5, 2, 4)
    for second, examples in ((scale.copy(), slice(0, 8)), (2 * scale, slice(4, 8)), (2 * scale[:1], slice(4, 8))):
        model = Scaled()
        whole = x * torch.stack([torch.as_tensor(scale)] * 4 + [torch.as_tensor(second).expand(4)] * 4)
        _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y[examples]), whole[examples])
        optimizer = plain(model, mu=0.3)
        for part, target, array in ((x[:4], y[:4], scale), (x[4:], y[4:], second)):
            criterion_of(optimizer)(model(part, array), target).backward()
        assert_gradients_close(added(model, optimizer), times(0.3, gradient))


class Pair(NamedTuple):
    left: Tensor
    right: Any


class Indifferent(nn.Module):
    """Takes anything along with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.net(x)


FOUR, THREE = torch.ones(4), torch.ones(3)
UNLIKE: dict[str, tuple[Any, Any]] = {
    "numbers": (1, 2),
    "words": ("a", "b"),
    "types": (1, None),
    "a tensor and none": (FOUR, None),
    "lists of other lengths": ([1], [1, 1]),
    "dicts with other keys": ({"a": 1}, {"b": 1}),
    "named tuples with other items": (Pair(FOUR, 1), Pair(FOUR, 2)),
    "precisions": (FOUR, FOUR.double()),
    "shapes": (torch.ones(4, 2), torch.ones(4, 3)),
    "layouts": (FOUR, FOUR.to_sparse()),
    "shared tensors": (THREE, 2 * THREE),
}
ALIKE: dict[str, tuple[Any, Any]] = {
    "named tuples": (Pair(FOUR, 1), Pair(FOUR, 1)),
    "tuples": ((FOUR, None), (FOUR, None)),
    "shared tensors": (THREE, THREE.clone()),
}


@pytest.mark.parametrize(
    ("first", "second", "examples"),
    [(*pair, 4) for pair in UNLIKE.values()] + [(*pair, 8) for pair in ALIKE.values()],
    ids=[f"unlike {name}" for name in UNLIKE] + [f"alike {name}" for name in ALIKE],
)
def test_micro_batches_are_joined_where_all_else_is_equal(first: Any, second: Any, examples: int) -> None:
    model, (x, y) = Indifferent(), batch(8, 4)
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y[-examples:]), x[-examples:])
    optimizer = plain(model, mu=0.3)
    for part, target, other in ((x[:4], y[:4], first), (x[4:], y[4:], second)):
        criterion_of(optimizer)(model(part, other), target).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


@pytest.mark.parametrize("difference", ["mode", "autocast"])
def test_micro_batches_under_other_conditions_leave_the_last_one(difference: str) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y[4:]), x[4:])
    optimizer = plain(model, mu=0.3)
    for part, target, first in ((x[:4], y[:4], True), (x[4:], y[4:], False)):
        model.train(not (first and difference == "mode"))
        with torch.autocast("cpu", enabled=first and difference == "autocast"):  # leaves double precision alone
            loss = criterion_of(optimizer)(model(part), target)
        loss.backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_dropout_falls_on_micro_batches_as_on_one_batch_at_the_first_of_them() -> None:
    seen = []
    for sizes in ([8], [3, 5]):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)))
        optimizer, (x, y) = plain(model, mu=0.3), batch(8, 4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            accumulate(model, criterion_of(optimizer), x, y, sizes)
        seen.append(added(model, optimizer))
    assert_gradients_close(list(seen[1]), seen[0])


def test_a_shared_tensor_as_long_as_a_micro_batch_leaves_the_last_one() -> None:
    """Nothing tells it from a part of the batch, and the model does not run on all of them joined."""
    model, (x, y), scale = Scaled(), batch(8, 4), torch.linspace(0.5, 2, 4, dtype=torch.float64)
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y[4:]), x[4:] * scale)
    optimizer = plain(model, mu=0.3)
    for part, target in zip(x.split(4), y.split(4), strict=True):
        criterion_of(optimizer)(model(part, scale), target).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


class TimeFirst(nn.Module):
    """Attention over the first axis of ``[T, N, d]``; a prediction for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        q, k = self.q(x), self.k(x)
        return self.head(((q @ k.transpose(1, 2)).softmax(-1) @ torch.tanh(k)).mean(1))


def most_probable(output: Tensor, generator: torch.Generator) -> Tensor:
    return cross_entropy_each(output, output.detach().argmax(1))


def cross_entropy_each(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y, reduction="none")


@pytest.mark.parametrize("length", [5, 4])
def test_sequences_are_not_strung_together_where_time_comes_first(length: int) -> None:
    """Also where they are as long as there are examples."""
    model, (x, y) = seeded(TimeFirst), batch(8, length, 4)
    parts = x.transpose(0, 1).split(4, dim=1)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(model(parts[1]).argmax(1)), parts[1], reduction="sum")
    options: dict[str, Any] = {"fisher": "sampled", "likelihood": most_probable, "reduction": "sum"}
    optimizer = plain(model, mu=0.3, **options)
    for part, target in zip(parts, y.split(4), strict=True):
        nn.functional.cross_entropy(model(part), target).backward()
    assert_gradients_close(added(model, optimizer), times(0.3, gradient))


def test_sequences_are_not_cut_short_where_time_comes_first() -> None:
    model, (x, y) = seeded(TimeFirst), batch(4, 6, 4)
    x = x.transpose(0, 1)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(model(x).argmax(1)), x, reduction="sum")
    options: dict[str, Any] = {"fisher": "sampled", "likelihood": most_probable, "reduction": "sum"}
    optimizer = plain(model, mu=0.3, batch_fraction=0.5, **options)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="its output does not grow with .*batch_fraction=1") as caught:
        seen = added(model, optimizer)
    assert_gradients_close(seen, times(0.3, gradient))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5]], ids=str)
def test_labels_stay_with_their_examples_in_whatever_order_the_criterion_is_called(sizes: list[int]) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    criterion = criterion_of(optimizer)
    outputs = [model(part) for part in x.split(sizes)]
    losses = [criterion(o, target) for o, target in zip(reversed(outputs), reversed(y.split(sizes)), strict=True)]
    torch.stack(losses).sum().backward()
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
