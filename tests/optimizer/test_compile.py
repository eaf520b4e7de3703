"""Compiled models: whatever is compiled, when and how, the penalty is that of the model as it was written."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC, spectral_radii
from tests.optimizer.loops import criterion_of, gradients, plain, times, train
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded

# inductor's code for the CPU has to be built by a C++ compiler, which not every machine has.
BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]


class Own(nn.Module):
    """A module of the user's own class, which torch.compile treats unlike torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"own class": Own, "torch's container": mlp}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Compile anew in every test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, in_place: bool, **options: Any) -> Any:
    if not in_place:
        return torch.compile(model, **options)
    model.compile(**options)
    return model


def expect_penalty(model: nn.Module, called: Any, optimizer: FlatKFAC, shape: tuple[int, ...] = (8, 4)) -> None:
    """What is added is the penalty of the bare model, at several steps on batches of their own."""
    for seed in range(3):
        x, y = batch(*shape, seed=seed)
        rho, gradient = rho_and_gradient(bare(model), cross_entropy_sum(y), x, reduction="sum")
        optimizer.zero_grad()
        criterion_of(optimizer)(called(x), y).backward()
        own = gradients(model)
        optimizer.step()
        added = [g - o for g, o in zip(gradients(model), own, strict=True)]
        assert_gradients_close(added, times(0.3, gradient), tolerance=1e-8)
        assert optimizer.rho == pytest.approx(float(rho), rel=1e-8)


def bare(model: nn.Module) -> nn.Module:
    """A copy that is not compiled."""
    other = copy.deepcopy(model)
    vars(other).pop("_compiled_call_impl", None)
    return other


@pytest.mark.parametrize("warm", [False, True], ids=["never called", "called before"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_module_given_to_the_optimizer(network: str, fullgraph: bool, warm: bool) -> None:
    """The usual line, ``model = torch.compile(model)``, before FlatKFAC."""
    model = NETWORKS[network]()
    called = torch.compile(model, backend="eager", fullgraph=fullgraph)
    if warm:
        called(batch(8, 4)[0]).sum().backward()
    expect_penalty(model, called, plain(called, mu=0.3, reduction="sum"))


@pytest.mark.parametrize("order", ["before", "called before", "after"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_the_module_inside_given_to_the_optimizer(in_place: bool, fullgraph: bool, order: str) -> None:
    """Compiled under another name, or in place, before or after FlatKFAC sees it."""
    model = Own()
    options = {"backend": "eager", "fullgraph": fullgraph}
    called = compiled(model, in_place, **options) if order != "after" else None
    if order == "called before":
        called(batch(8, 4)[0]).sum().backward()
    optimizer = plain(model, mu=0.3, reduction="sum")
    expect_penalty(model, compiled(model, in_place, **options) if called is None else called, optimizer)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_a_container_given_bare(in_place: bool, order: str) -> None:
    """torch traces its own containers from the outside, hooks included."""
    model = mlp()
    called = compiled(model, in_place, backend="eager") if order == "before" else None
    optimizer = plain(model, mu=0.3, reduction="sum")
    expect_penalty(model, compiled(model, in_place, backend="eager") if called is None else called, optimizer)


def test_a_bare_container_whose_compiled_calls_are_not_seen_is_refused_with_the_way_out() -> None:
    """Its code was compiled before there was a hook, and torch does not look again."""
    model = mlp()
    called = torch.compile(model, backend="eager")
    x, y = batch(8, 4)
    called(x).sum().backward()
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(called(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"give FlatKFAC what torch\.compile returned"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in inductor
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(backend: str) -> None:
    """BatchNorm, a residual connection and activations in place, through every stage of compilation."""
    model = seeded(lambda: Residual(inplace=True))
    called = torch.compile(model, backend=backend)
    expect_penalty(model, called, plain(called, mu=0.3, reduction="sum"), shape=(6, 2, 5, 5))


class Parts(nn.Module):
    """Some of its submodules, and a function that it calls, are compiled."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3)
        self.activation: Any = torch.tanh
        if backend is not None:
            self.activation = torch.compile(torch.tanh, backend=backend)
            self.second.compile(backend=backend)
            self.head = torch.compile(self.head, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.activation(self.first(x))))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of a compiled function's arguments
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_of_a_model_are_differentiated_twice(backend: str) -> None:
    """Compiled code has no second derivative, so the curvature is read on the parts as they were written."""
    model, other = seeded(lambda: Parts(backend)), seeded(lambda: Parts(None))
    other.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    optimizer = plain(model, mu=0.3, reduction="sum")
    x, y = batch(8, 4)
    rho, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, reduction="sum")
    criterion_of(optimizer)(model(x), y).backward()
    own = gradients(model)
    optimizer.step()
    added = [g - o for g, o in zip(gradients(model), own, strict=True)]
    assert_gradients_close(added, times(0.3, gradient), tolerance=1e-8)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-8)


def test_compiled_training_goes_on_as_plain_training() -> None:
    ends = []
    for backend in (None, "eager"):
        model = Own()
        called = model if backend is None else torch.compile(model, backend=backend)
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9), called, mu=0.1, every=2)
        train(called, optimizer, 6)
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=1e-9, atol=1e-12) for name in ends[0])


def test_radii_of_a_compiled_module_are_those_of_the_module() -> None:
    model, (x, _) = Own(), batch(8, 4)
    called = torch.compile(model, backend="eager")
    assert spectral_radii(called, x, exact=True) == spectral_radii(model, x, exact=True)
