"""BatchNorm: batch statistics in the curvature, running ones touched by the training pass alone."""

from __future__ import annotations

import copy

import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from tests.optimizer.loops import (
    penalty,
    plain,
    same,
    times,
)
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving average", "cumulative average"])
@pytest.mark.parametrize("every", [1, 3])
def test_running_statistics_are_touched_exactly_once_a_step(every: int, momentum: float | None) -> None:
    """Against a model that makes the training passes alone."""
    model = seeded(Residual)
    model.bn1.momentum = momentum
    other = copy.deepcopy(model)
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.0), mu=0.3, every=every)
    for number in range(5):
        x, y = batch(6, 2, 5, 5, seed=number)
        penalty(model, optimizer, x, y)
        other(x)
        assert same(statistics(model), statistics(other))
    assert model.bn1.num_batches_tracked == 5


def test_the_penalty_is_that_of_the_statistics_of_its_own_examples() -> None:
    """On half of a batch it is the half's; with the whole batch, the batch's."""
    x, y = batch(8, 2, 5, 5)
    for fraction, examples in ((1.0, 8), (0.5, 4)):
        model = seeded(Residual)
        _, gradient = rho_and_gradient(model, cross_entropy_sum(y[:examples]), x[:examples])
        seen = penalty(model, plain(model, mu=0.3, batch_fraction=fraction), x, y)
        assert_gradients_close(seen, times(0.3, gradient))


def test_in_evaluation_mode_it_is_that_of_the_running_statistics() -> None:
    model = seeded(Residual)
    x, y = batch(8, 2, 5, 5)
    for scale in (1, 2):
        model(scale * x)
    model.eval()
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    before = statistics(model)
    assert_gradients_close(penalty(model, plain(model, mu=0.3), x, y), times(0.3, gradient))
    assert same(statistics(model), before)


def test_a_step_that_fails_leaves_the_statistics_as_they_were() -> None:
    model = seeded(Residual)
    optimizer = plain(model, mu=0.3)
    x, y = batch(8, 2, 5, 5)
    F.cross_entropy(model(x), y).backward()  # and not by the criterion that it was given
    before = statistics(model)
    with pytest.raises(RuntimeError, match="takes the targets from the criterion"):
        optimizer.step()
    assert same(statistics(model), before)
