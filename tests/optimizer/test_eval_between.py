"""Looking at the model between steps changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    criterion_of,
    gradients,
    plain,
    same,
    snapshot,
    times,
    train,
)
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_looking_at_validation_data_between_forward_and_step_changes_nothing() -> None:
    model, (x, y) = seeded(Residual), batch(8, 2, 5, 5)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    other, _ = batch(8, 2, 5, 5, seed=9)
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(model(x), y).backward()
    own = gradients(model)
    model.eval()
    model(other)
    with torch.no_grad():
        model(other)
    model.train()
    with torch.no_grad():
        model(other)
    optimizer.step()
    added = [g - o for g, o in zip(gradients(model), own, strict=True)]
    assert_gradients_close(added, times(0.3, gradient))


@dataclasses.dataclass
class Prediction:
    """Tensors that nobody finds who does not know this class."""

    logits: Tensor


class Predicting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Prediction:
        return Prediction(self.net(x))


def most_probable(output: Prediction, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(output.logits, output.logits.detach().argmax(1), reduction="none")


def test_where_outputs_do_not_tell_it_is_the_last_pass_in_train_mode_that_counts() -> None:
    model, (x, y) = Predicting(), batch(8, 4)
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(model.net(x).argmax(1)), x)
    optimizer = plain(model, mu=0.3, fisher="sampled", likelihood=most_probable)
    model(5 * x)
    F.cross_entropy(model(x).logits, y).backward()
    own = gradients(model)
    model.eval()
    for _ in range(2):
        model(3 * x)
    model.train()
    assert len(optimizer._calls.graphs) == 2, "they pile up"
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


@pytest.mark.parametrize("gradients_on", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_validation_between_steps_leaves_the_trajectory_as_it_is(every: int, gradients_on: bool) -> None:
    def run(validate: bool) -> Any:
        model = seeded(Residual)
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.05, momentum=0.9), model, mu=0.3, every=every)
        for number in range(5):
            train(model, optimizer, 1, start=number, shape=(6, 2, 5, 5))
            if validate:
                model.eval()
                with torch.set_grad_enabled(gradients_on):
                    for other in range(3):
                        model(batch(9, 2, 5, 5, seed=100 + other)[0])
                model.train()
        return snapshot(model, optimizer)

    assert same(run(True), run(False))


def test_inference_mode_between_steps_is_no_training() -> None:
    model = seeded(Residual)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.05), model, mu=0.3, every=1)
    train(model, optimizer, 1, shape=(6, 2, 5, 5))
    model.eval()
    with torch.inference_mode():
        model(batch(9, 2, 5, 5)[0])
    model.train()
    train(model, optimizer, 1, start=1, shape=(6, 2, 5, 5))
    assert optimizer.rho > 0


def test_a_model_is_exported_for_batches_of_any_size_when_a_refresh_is_due() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.1), model, every=1)
    x = torch.randn(6, 4)
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=dynamic, strict=False)
    assert torch.allclose(program.module()(x), model(x))
    nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
    optimizer.step()
    assert optimizer.rho > 0
