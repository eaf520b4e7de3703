"""APoZ counts zeros of what layers read, and neurons that are zero most often go first."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines import APoZPruner
from tests.baselines.nets import NETS, built


def pruner_of(model: nn.Module, x: Tensor) -> tuple[APoZPruner, SGD]:
    optimizer = SGD(model.parameters(), lr=0.05)
    return APoZPruner(model, optimizer, x[:1], target=0.1, start=1, every=1, events=1), optimizer


def per_neuron(pruner: APoZPruner) -> Tensor:
    scores = pruner._scores()
    assert scores is not None
    return torch.tensor(scores) / pruner._groups.neurons


def non_zeros(model: Any, x: Tensor, pooled: bool) -> dict[str, list[list[float]]]:
    """For each map and channel, 1 for each entry that is not zero, else 0, counted one by one."""
    found: dict[str, Any] = {name: [[] for _ in range(width)] for name, width in model.widths.items()}

    def count(name: str, z: Tensor) -> Tensor:
        seen = F.max_pool2d(z, 2) if pooled else z
        for n in range(len(z)):
            for c in range(z.shape[1]):
                found[name][c] += [float(v != 0) for v in seen[n, c].flatten().tolist()]
        return z

    with torch.no_grad():
        copy.deepcopy(model).again(x, count)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_the_shares_of_entries_that_are_not_zero(name: str, training: bool) -> None:
    model, x, y = built(name, training=training)
    pruner, optimizer = pruner_of(model, x)
    expected: dict[str, Any] = defaultdict(list)
    for inputs in (x, x[:2] + 1):
        counted = non_zeros(model, inputs, pooled=name == "ConvNet")
        F.cross_entropy(model(inputs), y[: len(inputs)]).backward()
        for where, channels in counted.items():
            expected[where] = [a + b for a, b in zip(expected[where] or [[]] * len(channels), channels, strict=True)]
        optimizer.step()
    shares = [sum(seen) / len(seen) for channels in expected.values() for seen in channels]
    torch.testing.assert_close(per_neuron(pruner), torch.tensor(shares))
    assert len(set(shares)) > 3


def test_dead_neurons_go_first_and_counting_starts_anew() -> None:
    model, x, y = built("Mlp")
    with torch.no_grad():
        model.a.bias[3] = -100
    pruner, optimizer = pruner_of(model, x)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert {name: gone.tolist() for name, gone in pruner.step().removed.items()} == {"a": [3]}
    assert pruner._scores() is None


def test_passes_without_gradients_are_not_counted() -> None:
    model, x, _ = built("Mlp")
    pruner, _ = pruner_of(model, x)
    with torch.no_grad():
        model(x)
    assert pruner._scores() is None


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(7)), st.floats(0.1, 10))
def test_scores_depend_neither_on_scale_nor_on_the_order_of_examples(seed: int, order: list[int], scale: float) -> None:
    found = []
    for places, factor in ((list(range(7)), 1.0), (order, scale)):
        model, x, y = built("Mlp", seed, count=7)
        with torch.no_grad():
            model.a.weight.copy_(factor * model.a.weight[places])
            model.a.bias.copy_(factor * model.a.bias[places])
            model.b.weight.copy_(model.b.weight[:, places] / factor)
        pruner, _ = pruner_of(model, x)
        F.cross_entropy(model(x[places]), y[places]).backward()
        found.append(per_neuron(pruner))
    assert torch.equal(found[1], torch.cat([found[0][:7][order], found[0][7:]]))


def test_counts_are_kept_in_a_checkpoint() -> None:
    model, x, y = built("Mlp")
    pruner, _ = pruner_of(model, x)
    F.cross_entropy(model(x), y).backward()
    again, _ = pruner_of(built("Mlp")[0], x)
    again.load_state_dict(pruner.state_dict())
    assert torch.equal(per_neuron(again), per_neuron(pruner))
