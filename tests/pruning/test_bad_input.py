"""Bad input gets an error that says what to do, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from kfac_flat import FlatKFAC, NeuronPruner
from tests.pruning.masking import prune_at_random, pruner_for, random_gradients
from tests.pruning.nets import CASES, Net, conv


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def build(model: Any = None, optimizer: Any = None, inputs: Any = None, **options: Any) -> NeuronPruner:
    model = mlp() if model is None else model
    optimizer = optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return NeuronPruner(model, optimizer, torch.randn(2, 4) if inputs is None else inputs, **{"target": 0.5, **options})


@pytest.mark.parametrize("target", [0, 1, 0.0, 1.0, 1.5, -0.1, float("nan"), 75])
def test_a_target_outside_zero_and_one_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"target=.* must lie in \(0, 1\): it is the share of the budget to remove"):
        build(target=target)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
@pytest.mark.parametrize("name", ["start", "every", "events"])
def test_schedule_numbers_that_are_not_positive_and_whole_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* must be a whole number, at least 1"):
        build(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("name", ["min_neurons", "round_to"])
def test_width_numbers_that_are_not_positive_and_whole_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* must be a whole number, at least 1"):
        build(**{name: value})


@pytest.mark.parametrize("target", ["0.5", None])
def test_a_target_that_is_no_number_is_refused_by_name(target: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="target="):
        build(target=target)


def test_what_is_no_model_or_no_optimizer_is_refused() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not function"):
        build(lambda x: x, optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer instance, not type"):
        build(model, optim.SGD)
    with pytest.raises(TypeError, match=r"prune the model inside the wrapper, model\.module"):
        build(nn.DataParallel(model), optim.SGD(model.parameters(), lr=0.1))


def test_a_flat_kfac_of_another_module_is_refused_whose_names_would_not_fit() -> None:
    model = mlp()
    optimizer = FlatKFAC(optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=r"was given another module than this pruner.*give both the same one"):
        build(nn.Sequential(model), optimizer)


@pytest.mark.parametrize("kfac", [False, True])
def test_an_optimizer_over_another_models_parameters_is_refused_with_advice(kfac: bool) -> None:
    other = mlp()
    optimizer: optim.Optimizer = optim.SGD(other.parameters(), lr=0.1)
    if kfac:
        optimizer = FlatKFAC(optimizer, other)
    with pytest.raises(ValueError, match="build it from the parameters of this very model"):
        build(mlp(), optimizer)
    assert len(getattr(optimizer, "base", optimizer)._optimizer_step_pre_hooks) == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5), r"does not run on example_inputs: 0 \(Linear\).*Give what the model is called with"),
        (torch.randn(2, 3, 4, 5), r"does not run on example_inputs"),
        ("text", r"does not run on example_inputs"),
        ((), r"^example_inputs do not fit the model's arguments .*missing a required argument"),
        ({"x": torch.randn(2, 4)}, r"^example_inputs do not fit the model's arguments .*missing a required argument"),
        ((torch.randn(2, 4), torch.randn(2, 4)), r"example_inputs"),
        ({"input": torch.randn(2, 4), "mask": torch.randn(2, 4)}, r"example_inputs.*mask"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused_with_advice(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(inputs=inputs)


@pytest.mark.parametrize("name", ["residual", "batchnorm1d", "tokens"])
def test_a_single_example_will_do(name: str) -> None:
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs[:1])
    prune_at_random(pruner, model)
    model.train()(inputs)


class Transposed(nn.Module):
    """A layer of its own class, with its weight the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_model_without_neurons_is_refused_with_the_layers_that_have_no_rule() -> None:
    model = nn.Sequential(Transposed(), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"no neurons to remove.*\n  2: forms .*\n  0: Transposed has no rule"):
        build(model)


def test_a_target_that_cannot_be_reached_is_refused_with_the_layers_that_stand_in_its_way() -> None:
    with pytest.raises(ValueError, match=r"target=0\.9 cannot be reached: 4 of .*'s 8.*\n  2: forms the model's"):
        build(target=0.9, min_neurons=4)
    with pytest.raises(ValueError, match=r"0 of the model's 8 neurons.*\n  0: ignored on request"):
        build(ignore=["0"])


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten()), nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(4, 3))]
)
def test_a_model_without_hidden_layers_is_refused(model: nn.Module) -> None:
    optimizer = optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"no .*(Linear|neurons)|none of the optimizer's parameters"):
        build(model, optimizer)


def test_ignore_must_name_something_and_be_a_collection() -> None:
    with pytest.raises(ValueError, match=r"ignore='nothing' matches no module"):
        build(ignore=["nothing"])
    with pytest.raises(ValueError, match=r"ignore=<class 'torch.nn.modules.conv.Conv2d'> matches no module"):
        build(ignore=[nn.Conv2d])
    for single in ("0", nn.Linear):
        with pytest.raises(ValueError, match=r"must be a collection of names and classes"):
            build(ignore=single)


def test_a_model_whose_parameters_are_all_frozen_loses_nothing_and_says_why() -> None:
    model = mlp().requires_grad_(False)
    pruner = build(model, optim.SGD(model.parameters(), lr=0.1), start=1, every=1, events=1)
    pruner._optimizer.step()
    report = pruner.step()
    assert not report
    assert "gradient" in report.reason
    assert model[0].weight.shape == (8, 4)


def test_no_gradient_ever_seen_removes_nothing_and_says_why() -> None:
    pruner = build(start=1, every=1, events=2)
    for _ in range(3):
        report = pruner.step()
        assert not report
        assert "no optimizer step with finite gradients" in report.reason
    assert not pruner.plan()
    assert not pruner.finished
    random_gradients(pruner._model, pruner._optimizer)
    assert pruner.step()


def test_an_untraceable_model_is_refused_with_advice_and_left_alone() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(x) if x.mean() > 0 else net.fc(-x)

    model = Net(forward, fc=nn.Linear(4, 3))
    keys, hooks = set(vars(model)), len(model._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"cannot be traced by torch\.fx.*move that part into a submodule of its own"):
        build(model)
    assert set(vars(model)) == keys
    assert len(model._forward_pre_hooks) == hooks
    assert not hasattr(torch.Tensor, "__fx__")


def test_a_refused_pruner_leaves_no_hook_behind() -> None:
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for options in ({"target": 2}, {"start": 0}, {"ignore": ["x"]}, {"inputs": torch.randn(2, 5)}, {"target": 0.99}):
        with pytest.raises(ValueError, match=r"."):
            build(model, optimizer, **options)
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_wrong_options_are_refused_before_a_slow_trace_of_an_untraceable_model() -> None:
    model = Net(lambda net, x: net.fc(x) if x.sum() > 0 else x, fc=conv(2, 3))
    with pytest.raises(ValueError, match="target=2"):
        build(model, inputs=torch.randn(1, 2, 4, 4), target=2)
