"""Whatever a model is called with: keywords, nested and several inputs, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    criterion_of,
    gradients,
    plain,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


class Named(nn.Module):
    """Takes keyword arguments, nested ones too, and a tensor that has no axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, inputs: dict[str, list[Tensor]], scale: Tensor) -> Tensor:
        return self.net(scale * inputs["x"][0])


def test_keyword_arguments_and_nested_inputs_are_repeated_and_cut() -> None:
    model, (x, y) = Named(), batch(8, 4)
    optimizer = plain(model, mu=0.3, batch_fraction=0.5)
    criterion_of(optimizer)(model(scale=torch.tensor(2.0), inputs={"x": [x]}), y).backward()
    optimizer.step()
    rho, _ = rho_and_gradient(model.net, cross_entropy_sum(y[:4]), 2 * x[:4])
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


class Mixing(nn.Module):
    """Needs the whole batch: the adjacency has an axis of examples on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(torch.tanh(adjacency @ self.a(x)))


def test_a_model_that_needs_its_whole_batch_gets_it_with_a_warning() -> None:
    model = Mixing()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4), torch.rand(6, 6)), torch.arange(6) % 3).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="does not run on a part of its batch.*batch_fraction=1"):
        run()
    run()  # and says it once
    assert optimizer.rho > 0


class Several(nn.Module):
    """Takes two tensors, a tuple, a dict, None and numbers; returns what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], options: dict[str, Any], nothing: None, factor: float = 1.0
    ) -> Any:
        result = self.net(factor * x + pair[0] * pair[1] + options["shift"])
        return {"classes": torch.zeros(3), "logits": result, "note": "a dict"} if options["as_dict"] else result


def several(x: Tensor, as_dict: bool = False) -> tuple[Any, ...]:
    return x, (0.5 * x, x.flip(1)), {"shift": 0.1 * x, "as_dict": as_dict}, None


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_several_inputs_are_repeated_and_all_cut_alike(fraction: float) -> None:
    model, (x, y) = Several(), batch(8, 4)
    examples = int(8 * fraction)
    part = x[:examples]
    whole = 3 * part + 0.5 * part * part.flip(1) + 0.1 * part
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y[:examples]), whole)
    optimizer = plain(model, mu=0.3, batch_fraction=fraction)
    criterion_of(optimizer)(model(*several(x), factor=3.0), y).backward()
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


@pytest.mark.parametrize("sizes", [[8], [3, 5]], ids=str)
def test_a_dict_as_output_is_read_by_a_likelihood_that_knows_it(sizes: list[int]) -> None:
    """How many examples there are is what it says, and not the length of whatever comes first in the dict."""
    model, (x, y) = Several(), batch(8, 4)
    whole = x + 0.5 * x * x.flip(1) + 0.1 * x
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y), whole)
    optimizer = plain(
        model, mu=0.3, fisher="sampled", likelihood=lambda o, _: F.cross_entropy(o["logits"], y, reduction="none")
    )
    for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
        F.cross_entropy(model(*several(part, as_dict=True))["logits"], target).backward()
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


def test_inputs_are_repeated_as_they_were_when_the_model_was_called() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    loss = criterion_of(optimizer)(model(x), y)
    loss.backward()
    own = gradients(model)
    given = x.clone()
    x.zero_()  # a loader that fills the same memory again
    optimizer.step()
    assert given.any()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


class Recurrent(nn.Module):
    """Reads packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(states.mean(1))


@pytest.mark.parametrize("accumulate", [False, True])
def test_packed_sequences_are_read_whole(accumulate: bool) -> None:
    """There is no cutting and joining them."""
    model, (x, y) = seeded(Recurrent), batch(6, 5, 4)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 4, 3, 1, 5]), batch_first=True, enforce_sorted=False)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), packed)
    optimizer = plain(model, mu=0.3)
    if accumulate:
        shorter = pack_padded_sequence(x[:2], torch.tensor([5, 5]), batch_first=True)
        criterion_of(optimizer)(model(shorter), y[:2]).backward()
    criterion_of(optimizer)(model(packed), y).backward()
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_of_packed_sequences_no_part_can_be_taken_which_is_said_once() -> None:
    model, (x, y) = seeded(Recurrent), batch(6, 5, 4)
    packed = pack_padded_sequence(x, torch.tensor([5, 2, 4, 3, 1, 5]), batch_first=True, enforce_sorted=False)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), packed)
    optimizer = plain(model, mu=0.3, batch_fraction=0.5)
    criterion_of(optimizer)(model(packed), y).backward()
    own = gradients(model)
    with pytest.warns(UserWarning, match="batch_fraction=1"):
        optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))
    optimizer.zero_grad()
    criterion_of(optimizer)(model(packed), y).backward()
    optimizer.step()


class Collecting(nn.Module):
    """Keeps its activations for the user to look at, in each way that one meets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.list: list[Tensor] = []
        self.dict: dict[str, list[Tensor]] = {"hidden": []}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](self.net[0](x))
        self.list.append(hidden)
        self.dict["hidden"].append(hidden)
        self.last = hidden
        return self.net[4](self.net[3](self.net[2](hidden)))


def test_what_a_model_collects_is_its_own_and_does_not_grow_out_of_sight() -> None:
    model = Collecting()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.3, every=1)
    x, y = batch(8, 4)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.list.clear()
        model.dict["hidden"].clear()

    run()
    model(x)
    assert len(model.list) == len(model.dict["hidden"]) == 1
    assert model.last is model.list[0]
    for _ in range(3):
        run()
    twin = optimizer._tracker._twin
    assert twin is not None
    assert len(twin.model.list) + len(twin.model.dict["hidden"]) <= 4
    assert not any(t.requires_grad for t in (*twin.model.list, *twin.model.dict["hidden"], twin.model.last))
