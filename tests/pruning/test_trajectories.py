"""After a cut, training goes on bit for bit as that of a model that had been built small from the start."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

from kfac_flat import ChainedOptimizer, FlatKFAC
from tests.pruning.by_hand import (
    WIDTHS,
    Before,
    Make,
    Remaining,
    assert_same_state,
    assert_same_tensors,
    batch,
    network,
    pruner_of,
    train,
)
from tests.pruning.nets import conv

# Options that fill every entry of an optimizer's state. A name that this torch lacks is left out, a class that is not
# named here makes a test fail.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}],
    "AdamW": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}],
    "RMSprop": [{"lr": 0.001}, {"lr": 0.001, "centered": True, "momentum": 0.9}],
    "Adagrad": [{"lr": 0.01}],
    "Adadelta": [{}],
    "NAdam": [{"lr": 0.01}],
    "RAdam": [{"lr": 0.01}],
    "Adamax": [{"lr": 0.01}],
    "ASGD": [{"lr": 0.01, "t0": 1}],
    "Adafactor": [{"lr": 0.01}],
    "Rprop": [{"lr": 0.001}],
    "Muon": [{"lr": 0.01}],
}
# LBFGS keeps one flat vector for all parameters: refused, see test_surgery.py. SparseAdam: see below.
WITHOUT = {"LBFGS", "SparseAdam"}


def optimizer_classes() -> set[str]:
    found = {name for name, kind in vars(optim).items() if inspect.isclass(kind) and issubclass(kind, optim.Optimizer)}
    return found - {"Optimizer"}


def variants(name: str) -> list[dict[str, Any]]:
    """Implementations of an optimizer that run on the CPU."""
    options = inspect.signature(getattr(optim, name)).parameters
    return [{}] + [{flag: True} for flag in ("foreach", "fused") if flag in options]


OPTIMIZERS = [
    pytest.param(getattr(optim, name), {**options, **variant}, id=" ".join(map(str, [name, *options, *variant])))
    for name in sorted(optimizer_classes() - WITHOUT)
    for options in RECIPES.get(name, [])
    for variant in variants(name)
]


def test_no_optimizer_of_torch_is_forgotten() -> None:
    assert optimizer_classes() <= RECIPES.keys() | WITHOUT


def test_sparse_adam_cannot_train_what_can_be_cut() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(model, optim.SparseAdam(model.parameters()), *batch(), steps=1)


def freeze_all_but_matrices(model: nn.Module) -> None:
    """Freeze what Muon does not train."""
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def compare(
    make: Make,
    *,
    prepare: Callable[[nn.Module], object] = lambda model: None,
    wrap: Callable[[optim.Optimizer, nn.Module], optim.Optimizer] = lambda optimizer, _: optimizer,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    steps: int = 3,
    uncut: Iterable[str] = (),
) -> int:
    """Train, cut, train on, beside a small model that is made by hand; returns how many tensors of state agreed."""

    def build(widths: dict[str, int]) -> tuple[nn.Module, optim.Optimizer]:
        model = network(widths).to(dtype, memory_format=memory_format)
        prepare(model)
        return model, wrap(make(trained(model)), model)

    torch.manual_seed(0)
    x, y = batch(dtype=dtype)
    x = x.contiguous(memory_format=memory_format)
    model, optimizer = build(WIDTHS)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, steps)
    before = Before.of(model, optimizer)
    assert pruner.step()
    left = Remaining.after(pruner)
    assert {name for name, width in left.widths.items() if width == WIDTHS[name]} == set(uncut)

    small, other = build(left.widths)
    small.load_state_dict(left.of_all(before.model))
    other.load_state_dict(before.optimizer_state(left))
    assert_same_state(optimizer, other)
    found, expected = (train(m, o, x, y, 6) for m, o in ((model, optimizer), (small, other)))
    assert found == expected
    assert len(set(found)) > 3
    assert_same_tensors(model, small)
    return assert_same_state(optimizer, other)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_training_goes_on_as_that_of_a_model_built_small(kind: type[optim.Optimizer], options: dict[str, Any]) -> None:
    muon = kind.__name__ == "Muon"
    compared = compare(
        lambda p: kind(p, **options),  # type: ignore[call-arg]
        prepare=freeze_all_but_matrices if muon else lambda model: None,
        uncut={"0"} if muon else (),  # what the frozen convolution reads has no gradient
    )
    assert compared > 1 or (kind is optim.SGD and not options.get("momentum"))


def chained(parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """Matrices by Muon, where torch has it, and all else by AdamW."""
    matrices, others = [], []
    for p in parameters:
        (matrices if p.dim() == 2 else others).append(p)
    return ChainedOptimizer([getattr(optim, "Muon", optim.SGD)(matrices, lr=0.01), optim.AdamW(others, lr=0.01)])


def test_training_by_several_optimizers_goes_on_as_that_of_a_model_built_small() -> None:
    assert compare(chained) > 10


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize(
    "make",
    [lambda p: optim.SGD(p, lr=0.05, momentum=0.9), lambda p: optim.AdamW(p, lr=0.01, fused=True), chained],
    ids=["SGD", "fused AdamW", "chained"],
)
def test_training_with_a_penalty_goes_on_as_that_of_a_model_built_small(make: Make, every: int) -> None:
    compare(make, wrap=lambda optimizer, model: FlatKFAC(optimizer, model, mu=0.1, every=every))


def test_the_penalty_matters_to_that_comparison() -> None:
    x, y = batch()
    losses = []
    for mu in (0.0, 0.1):
        torch.manual_seed(0)
        model = network()
        optimizer = FlatKFAC(optim.SGD(model.parameters(), lr=0.05), model, mu=mu)
        losses.append(train(model, optimizer, x, y, 3))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_every_precision_and_memory_format(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    compare(lambda p: optim.SGD(p, lr=0.05, momentum=0.9), dtype=dtype, memory_format=memory_format)


def test_gradients_that_accumulate_over_a_cut_do_so_as_in_a_model_built_small() -> None:
    x, y = batch()
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 2)
    before = Before.of(model, optimizer)
    assert pruner.step()
    left = Remaining.after(pruner)
    small = network(left.widths)
    small.load_state_dict(left.of_all(before.model))
    for name, p in small.named_parameters():
        p.grad = left.of(name, before.gradients[name])
    for m in (model, small):
        nn.functional.cross_entropy(m(x), y).backward()
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not torch.equal(p.grad, left.of(name, before.gradients[name]))


def test_a_learning_rate_scheduler_goes_on_with_several_groups() -> None:
    torch.manual_seed(0)
    x, y = batch()

    def build(widths: dict[str, int]) -> tuple[nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler]:
        model = network(widths)
        layers = list(model.children())
        groups = [{"params": [*layers[7].parameters(), *layers[9].parameters()], "lr": 0.02}]
        groups.append({"params": [p for m in layers[:7] for p in m.parameters()], "weight_decay": 1e-3})
        optimizer = optim.SGD(groups, lr=0.05, momentum=0.9)
        return model, optimizer, optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=9)

    model, optimizer, scheduler = build(WIDTHS)
    pruner = pruner_of(model, optimizer, x)
    for _ in range(3):
        train(model, optimizer, x, y, 1)
        scheduler.step()
    before, at = Before.of(model, optimizer), scheduler.state_dict()
    assert pruner.step()
    assert scheduler.state_dict() == at
    left = Remaining.after(pruner)
    small, other, its_scheduler = build(left.widths)
    small.load_state_dict(left.of_all(before.model))
    other.load_state_dict(before.optimizer_state(left))
    its_scheduler.load_state_dict(at)
    rates = []
    for _ in range(5):
        assert train(model, optimizer, x, y, 1) == train(small, other, x, y, 1)
        scheduler.step()
        its_scheduler.step()
        assert scheduler.get_last_lr() == its_scheduler.get_last_lr()
        rates.append(scheduler.get_last_lr())
    assert len({tuple(r) for r in rates}) == 5
    assert_same_tensors(model, small)
    assert_same_state(optimizer, other)


# ---------------------------------------------------------------- what hangs on tensors and modules


def cut(prepare: Callable[[nn.Module], object]) -> tuple[nn.Module, optim.Optimizer, Tensor, Tensor]:
    """Train a model, prepare something, cut every layer; returns model, optimizer and batch."""
    torch.manual_seed(0)
    model, (x, y) = network(), batch()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 2)
    prepare(model)
    assert pruner.step()
    assert all(model[int(name)].weight.shape[0] < width for name, width in WIDTHS.items())
    return model, optimizer, x, y


def test_every_kind_of_module_hook_goes_on_firing() -> None:
    calls: list[tuple[str, int]] = []

    def prepare(model: nn.Module) -> None:
        layer = model[3]

        def pre_hook(m: nn.Module, args: tuple[Tensor]) -> None:
            calls.append(("pre", args[0].shape[1]))

        def hook(m: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            calls.append(("forward", out.shape[1]))

        layer.register_forward_pre_hook(pre_hook)
        layer.register_forward_hook(hook)
        layer.register_full_backward_pre_hook(lambda m, grad: calls.append(("backward pre", grad[0].shape[1])))
        layer.register_full_backward_hook(lambda m, grad, out: calls.append(("backward", grad[0].shape[1])))
        layer.register_state_dict_post_hook(lambda *_: calls.append(("state", 0)))

    model, optimizer, x, y = cut(prepare)
    calls.clear()
    train(model, optimizer, x, y, 1)
    inputs, outputs = model[3].in_channels, model[3].out_channels
    assert calls == [("pre", inputs), ("forward", outputs), ("backward pre", outputs), ("backward", inputs)]
    model.state_dict()
    assert calls[4:] == [("state", 0)]


def test_tensor_hooks_change_gradients_in_their_order_and_new_ones_can_be_added() -> None:
    def prepare(model: nn.Module) -> None:
        model[0].weight.register_hook(lambda g: g + 1)
        model[0].weight.register_hook(lambda g: g * 0)

    model, optimizer, x, y = cut(prepare)
    p = model[0].weight
    train(model, optimizer, x, y, 1)
    assert not p.grad.any()
    p.register_hook(lambda g: g + 3)
    train(model, optimizer, x, y, 1)
    assert torch.equal(p.grad, torch.full_like(p, 3))


def test_a_step_taken_inside_the_backward_pass_goes_on_after_a_cut() -> None:
    model = network()
    x, y = batch()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 1)
    own = {p: optim.SGD([p], lr=0.05) for p in model.parameters()}

    def step(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in own:
        p.register_post_accumulate_grad_hook(step)
    assert pruner.step()
    optimizer.zero_grad()
    small = network(Remaining.after(pruner).widths)
    small.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    train(small, optim.SGD(small.parameters(), lr=0.05), x, y, 1)
    assert_same_tensors(model, small)


def test_flags_of_parameters_and_modules_stay() -> None:
    def prepare(model: nn.Module) -> None:
        model[0].eval()
        model[1].eval()
        model[3].bias.requires_grad_(False).grad = None

    model, optimizer, x, y = cut(prepare)
    assert [m.training for m in model] == [False, False, *[True] * 8]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["3.bias"]
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["3.bias"]
    still = [t.clone() for t in (model[3].bias, model[1].running_mean)]
    train(model, optimizer, x, y, 2)
    assert all(map(torch.equal, still, (model[3].bias, model[1].running_mean)))


class Marked(nn.Parameter):
    """A parameter of a class of the user's own."""


def test_parameters_of_the_users_own_class_stay_so() -> None:
    torch.manual_seed(0)
    model, (x, y) = network(), batch()
    for module in (model[0], model[9]):
        module.weight = Marked(module.weight.detach())
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 1)
    assert pruner.step()
    assert len(model[0].weight) < WIDTHS["0"]
    assert [n for n, p in model.named_parameters() if type(p) is Marked] == ["0.weight", "9.weight"]
    train(model, optimizer, x, y, 1)


def test_the_precision_in_which_gradients_are_kept_stays() -> None:
    torch.manual_seed(0)
    model, (x, y) = network().to(torch.bfloat16), batch(dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32  # older versions of torch take it for an attribute like any other
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 1)
    before = [p.grad.dtype for p in model.parameters()]
    assert pruner.step()
    assert [p.grad.dtype for p in model.parameters()] == before
    train(model, optimizer, x, y, 1)
    assert [p.grad.dtype for p in model.parameters()] == before
    assert {p.grad_dtype for p in model.parameters()} == {torch.float32}


def test_a_depthwise_convolution_stays_laid_out_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(2, 6), conv(6, 6, groups=6), nn.ReLU(), conv(6, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 3)
    ).to(memory_format=torch.channels_last)
    x, y = batch()
    x = x.to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = pruner_of(model, optimizer, x)
    train(model, optimizer, x, y, 1)
    assert pruner.step()
    assert 1 < len(model[1].weight) < 6
    for i in (0, 1, 3):
        p = model[i].weight
        expected = torch.empty(p.shape, memory_format=torch.channels_last).stride()
        assert p.stride() == p.grad.stride() == optimizer.state[p]["momentum_buffer"].stride() == expected
    train(model, optimizer, x, y, 1)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrizations_elsewhere_stay_and_train_on() -> None:
    compare(
        lambda p: optim.SGD(p, lr=0.02, momentum=0.9),
        prepare=lambda model: parametrize.register_parametrization(model[9], "weight", Doubled()),
        uncut={"7"},
    )
