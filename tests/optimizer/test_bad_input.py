from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from kfac_flat import FlatKFAC
from tests.optimizer.loops import same, snapshot, train
from tests.reference import batch, mlp


def ready() -> tuple[nn.Module, SGD]:
    """A model with gradients and a base optimizer that has stepped."""
    model = mlp()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, base, 2)
    return model, base


# -------------------------------------------------------------------------------------------------- at construction

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mu": -0.1}, r"mu=-0.1 must be a number >= 0, or a function of the step"),
    ({"mu": float("nan")}, r"mu=nan must be a number >= 0"),
    ({"mu": float("inf")}, r"mu=inf must be a number >= 0"),
    ({"rho_max": -1.0}, r"rho_max=-1.0 must be a number >= 0, or a function of the step"),
    ({"every": 0}, r"every=0 must be a whole number of steps, at least 1"),
    ({"every": 2.5}, r"every=2.5 must be a whole number of steps, at least 1"),
    ({"batch_fraction": 0.0}, r"batch_fraction=0.0 must lie in \(0, 1\]"),
    ({"batch_fraction": 1.5}, r"batch_fraction=1.5 must lie in \(0, 1\]"),
    ({"seed": 1.5}, r"seed=1.5 must be a whole number"),
    ({"clip": 0.0}, r"clip=0.0 must be positive, or None"),
    ({"clip": -1.0}, r"clip=-1.0 must be positive, or None"),
    ({"fisher": "exact"}, r"fisher='exact' is unknown: choose 'sampled' or 'empirical'"),
    ({"reduction": "mean"}, r"reduction='mean' is unknown: choose 'max' or 'sum'"),
    ({"eigenpairs": "all"}, r"eigenpairs='all' is unknown: choose 'streaming' or 'exact'"),
    ({"likelihood": "softmax"}, r"likelihood 'softmax' is unknown: choose one of .*'categorical'"),
    ({"fisher": "empirical"}, r'fisher="empirical" needs criterion='),
    ({"fisher": "empirical", "criterion": F.cross_entropy}, r'fisher="empirical" needs criterion=.*module'),
    ({"layers": ["blocks.*"]}, r"layers='blocks.\*' matches no Linear or Conv2d; there are 0, 2, 4"),
    ({"layers": ["0", nn.Conv2d]}, r"layers=.*Conv2d.* matches no Linear or Conv2d; there are 0, 2, 4"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_are_named_and_nothing_changes(options: dict[str, Any], message: str) -> None:
    model, base = ready()
    before, hooks = snapshot(model, base), len(model._forward_pre_hooks)
    with pytest.raises(ValueError, match=message):
        FlatKFAC(base, model, **options)
    assert same(snapshot(model, base), before)
    assert len(model._forward_pre_hooks) == hooks


def test_an_optimizer_over_another_models_parameters_is_refused() -> None:
    model, base = ready()
    before = snapshot(model, base)
    with pytest.raises(
        ValueError, match=r"none of the optimizer's parameters belongs to the model: build the optimizer"
    ):
        FlatKFAC(base, copy.deepcopy(model))
    assert same(snapshot(model, base), before)


def test_an_optimizer_class_is_refused_with_the_call_to_make() -> None:
    with pytest.raises(TypeError, match=r"not the class: FlatKFAC\(Adam\(model.parameters\(\), \.\.\.\), model\)"):
        FlatKFAC(Adam, mlp())  # type: ignore[arg-type]


def test_what_is_no_optimizer_or_no_module_is_refused() -> None:
    model, base = ready()
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, not list"):
        FlatKFAC(list(model.parameters()), model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not function"):
        FlatKFAC(base, lambda x: x)  # type: ignore[arg-type]


def test_a_model_without_linear_or_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"Sequential has no Linear or Conv2d layer"):
        FlatKFAC(SGD(model.parameters(), lr=0.1), model)


# -------------------------------------------------------------------------------------------------- at step()


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(x)}


class Summed(nn.Module):
    """A loss without ``reduction``."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="sum")


class Failure(NamedTuple):
    """How a step can fail: what leads there, and what is said."""

    error: type[Exception]
    message: str
    use: Callable[[nn.Module, nn.Module, Tensor, Tensor], None]
    options: Callable[[], dict[str, Any]] = dict
    model: Callable[[], nn.Module] = mlp


def empirical(criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss) -> Callable[[], dict[str, Any]]:
    return lambda: {"fisher": "empirical", "criterion": criterion()}


def by_function(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    output = model(x)
    F.cross_entropy(output["scores"] if isinstance(output, dict) else output, y).backward()


def by_criterion(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(model(x), y).backward()


def nothing(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    pass


def by_a_part(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model[1:](model[0](x)), y).backward()


def without_gradients(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def on_another_batch(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    criterion(model(x)[:5], y[:5]).backward()


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


FAILURES = {
    "no forward": Failure(RuntimeError, r"has seen no forward pass of the model.*call that model", nothing),
    "forward of a part": Failure(RuntimeError, r"call that model \(not a copy or a part of it\)", by_a_part),
    "evaluation only": Failure(RuntimeError, r"with gradients enabled before step\(\)", without_gradients),
    "criterion not called": Failure(
        RuntimeError, r"call the very module given as criterion=.*criterion\(model\(x\), y\)", by_function, empirical()
    ),
    "criterion on another batch": Failure(
        RuntimeError, r"last called on 5 examples and the model on 8.*on the same batch", on_another_batch, empirical()
    ),
    "criterion without reduction": Failure(
        ValueError, r'Summed does not say how it reduces.*"mean", "sum" or "none"', by_criterion, empirical(Summed)
    ),
    "output has no logits": Failure(
        TypeError, r"returns a dict without logits.*give likelihood= a callable", by_function, model=Dictionary
    ),
    "likelihood returns a scalar": Failure(
        ValueError,
        r"likelihood must return one loss per example, \[N\], not \[\]",
        by_function,
        lambda: {"likelihood": lambda output, generator: output.sum()},
    ),
    "only frozen layers": Failure(
        RuntimeError,
        r"depends on none of the layers.*\(0\).*are they frozen",
        by_function,
        lambda: {"layers": ["0"]},
        frozen,
    ),
}


@pytest.mark.parametrize("later", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_step_that_fails_says_what_to_do_and_changes_nothing(name: str, later: bool) -> None:
    error, message, use, options, make = FAILURES[name]
    model, given = make(), options()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    mu = (lambda step: 0.0 if step == 0 else 0.1) if later else 0.1
    optimizer = FlatKFAC(base, model, mu=mu, every=1, **given)
    x, y = batch(8, 4)
    if later:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
        optimizer.step()
    use(model, given.get("criterion", nn.CrossEntropyLoss()), x, y)
    before = snapshot(model, optimizer)
    random = torch.get_rng_state()
    for _ in range(2):  # and says it again
        with pytest.raises(error, match=message):
            optimizer.step()
        assert same(snapshot(model, optimizer), before)
        assert torch.equal(torch.get_rng_state(), random)


def test_after_a_failure_the_next_proper_step_is_as_if_nothing_had_happened() -> None:
    model, other = mlp(), mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9), model, every=2)
    calm = FlatKFAC(SGD(other.parameters(), lr=0.1, momentum=0.9), other, every=2)
    for start in (0, 2):
        with pytest.raises(RuntimeError, match="no forward pass"):
            optimizer.step()
        train(model, optimizer, 2, start=start)
        train(other, calm, 2, start=start)
    assert same(snapshot(model, optimizer), snapshot(other, calm))


def test_a_forward_in_eval_mode_with_gradients_is_training_too() -> None:
    """Fine-tuning with everything frozen in its evaluation behaviour."""
    model = mlp().eval()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.1)
    train(model, optimizer, 1)
    assert optimizer.rho > 0


# -------------------------------------------------------------------------------------------------- not finite
