"""An operation of one's own is followed once it has a registered rule, and a wrong use of that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kfac_flat import NeuronPruner, register_rule
from kfac_flat.pruning.rules import Operation
from tests.pruning.masking import assert_exact, prune_at_random, pruner_for
from tests.pruning.nets import conv

OUTPUT = {"head": "forms the model's output"}


class Gate(nn.Module):
    """Cannot be traced: what it does depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid() if bool(x.abs().max() > 0) else x


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if bool(x.abs().max() > 0) else x


@torch.library.custom_op("kfac_flat_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@swish.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@fx.wrap  # type: ignore[untyped-decorator]
def pooled_by_hand(x: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(x, size) + F.max_pool2d(x, size)


@fx.wrap  # type: ignore[untyped-decorator]
def heads_of(x: Tensor, n: int, heads: int) -> Tensor:
    return x.reshape(n, heads, -1)


@fx.wrap  # type: ignore[untyped-decorator]
def mirrored(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(1)], 1)


class Net(nn.Module):
    """Two convolutions and a head, with one operation in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], times: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8 * times, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


def net(between: Callable[[Tensor], Tensor], times: int = 1) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(between, times).double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)


def mirrored_ids(op: Operation) -> Any:
    ids = op.subject
    return torch.cat([ids, ids.flip(1)], 1)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register_rule(Gate, like=nn.ReLU)
    register_rule(torch.ops.kfac_flat_tests.swish, like=torch.relu)
    register_rule(torch.special.erfcx, like=torch.relu)
    register_rule(pooled_by_hand, like=F.max_pool2d)
    register_rule("sinc", like="sin")
    register_rule(mirrored, rule=mirrored_ids)


@pytest.mark.parametrize(
    ("between", "times"),
    [
        (Gate(), 1),
        (lambda x: swish(x), 1),
        (torch.ops.kfac_flat_tests.swish, 1),
        (torch.ops.kfac_flat_tests.swish.default, 1),
        (torch.special.erfcx, 1),
        (lambda x: pooled_by_hand(x, 2), 1),
        (lambda x: x.sinc(), 1),
        (lambda x: mirrored(x), 2),
    ],
)
def test_neurons_that_pass_through_a_registered_operation_are_cut_as_if_masked(
    between: Callable[[Tensor], Tensor], times: int
) -> None:
    model, x = net(between, times)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x, target=0.5)
    assert pruner.frozen == OUTPUT
    prune_at_random(pruner, model)
    assert pruner.widths["a"] < 8
    assert_exact(dense, model, pruner.state_dict(), x)


def test_without_a_rule_the_neurons_stay_and_the_reason_names_the_operation() -> None:
    model, x = net(torch.special.i0e)
    assert pruner_for(model, x).frozen == {"a": "special_i0e() has no rule"} | OUTPUT


def test_sizes_that_are_written_into_a_registered_operation_do_not_follow_a_cut() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(heads_of(F.relu(self.a(x)), x.shape[0], 2).flatten(1))

    register_rule(heads_of, like=torch.reshape)
    model, x = Heads().double(), torch.randn(4, 4, dtype=torch.float64)
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, x)
    prune_at_random(pruner, model)
    assert_exact(dense, model, pruner.state_dict(), x)
    assert pruner.widths["a"] % 2 == 0  # both rows lose the same neurons


class ScaledByBuffer(Scaled):
    scale: Any

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.scale
        self.register_buffer("scale", torch.ones(width, 1, 1))


@pytest.mark.parametrize("kind", [Scaled, ScaledByBuffer])
def test_a_module_with_numbers_for_single_neurons_is_followed_as_if_it_had_no_rule(kind: type[Scaled]) -> None:
    register_rule(kind, like=nn.ReLU)
    model, x = net(kind(8))
    with pytest.warns(UserWarning, match="cannot be traced"):
        assert pruner_for(model, x).frozen["a"] == f"between ({kind.__name__}) has no rule"


def test_a_registered_module_may_hold_a_scalar() -> None:
    class Sloped(Gate):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.slope

    model, x = net(Sloped())
    with pytest.warns(UserWarning, match="cannot be traced"):
        assert "a" in pruner_for(model, x).frozen  # a subclass needs an entry of its own
    register_rule(Sloped, like=Gate)
    assert pruner_for(model, x).frozen == OUTPUT


def test_the_same_rule_may_be_registered_again_and_another_may_not() -> None:
    register_rule(Gate, like=nn.ReLU)
    with pytest.raises(ValueError, match="Gate has another rule already"):
        register_rule(Gate, like=nn.MaxPool2d)
    with pytest.raises(ValueError, match="relu has another rule already"):
        register_rule(torch.relu, like=torch.sum)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((torch.special.i1e,), {}, ValueError, "either like=, an operation that has a rule, or rule="),
        ((torch.special.i1e, torch.relu), {"rule": mirrored_ids}, ValueError, "either like="),
        ((torch.special.i1e, torch.cumsum), {}, ValueError, "like=cumsum has no rule itself"),
        ((torch.special.i1e, nn.LSTM), {}, ValueError, "like=LSTM has no rule itself"),
        ((torch.special.i1e,), {"rule": "relu"}, TypeError, "rule must be a function from an Operation to ids"),
        ((Gate(), nn.ReLU), {}, TypeError, r"not Gate\(\)"),
        ((3, torch.relu), {}, TypeError, "not 3"),
        ((nn.Linear, nn.ReLU), {}, ValueError, "Linear has channels of its own"),
        ((nn.BatchNorm2d, nn.ReLU), {}, ValueError, "BatchNorm2d has channels of its own"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        register_rule(*arguments, **options)


def test_an_operation_that_does_not_return_what_its_rule_says_is_found_out_before_a_cut() -> None:
    class Folded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 2, -1).sum(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.between, self.head = nn.Linear(4, 8), Folded(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.between(self.a(x)))

    register_rule(Folded, like=nn.ReLU)
    with pytest.raises(ValueError, match=r"head \(Linear\) fails: it reads 4 features"):
        NeuronPruner(model := Model(), torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 4), target=0.5)
