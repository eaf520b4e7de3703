"""What happens around a training loop that is not as it should be, and must not matter."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import small_net, step


def test_a_model_that_changes_its_dtype_is_followed() -> None:
    model = small_net()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
    step(model, optimizer)
    model.double()
    step(model, optimizer, torch.randn(12, 4, dtype=torch.float64))
    assert optimizer.rho > 0


def test_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
        try:
            for _ in range(10):
                step(model, optimizer)
        except RuntimeError as error:
            failures.append(error)
        except AttributeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_batch_of_one_example_and_a_schedule_out_of_range() -> None:
    model = small_net()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
    step(model, optimizer, torch.randn(1, 4))
    assert optimizer.rho > 0
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"must be numbers >= 0 at every step, but mu is -1\.0"):
        step(model, optimizer)


def test_a_criterion_called_on_another_shape_than_the_models_output_is_refused() -> None:
    model, criterion = nn.Linear(4, 1), nn.MSELoss()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, fisher="empirical", criterion=criterion)
    criterion(model(torch.randn(6, 4)).squeeze(1), torch.randn(6)).backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="put what lies between into the model or into the criterion"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_single_output_is_no_categorical_distribution() -> None:
    model = nn.Linear(4, 1)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    model(torch.randn(6, 4)).square().mean().backward()
    with pytest.raises(ValueError, match=r'likelihood="bernoulli".*likelihood="gaussian"'):
        optimizer.step()
