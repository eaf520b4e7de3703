"""Random pruning follows one order, drawn beforehand."""

from __future__ import annotations

import torch
from torch.optim import SGD

from baselines import RandomPruner
from tests.baselines.nets import built


def gone_in_turn(seed: int) -> list[tuple[str, int]]:
    """Which neuron of the ConvNet goes at each event, as the position in the original layer."""
    model, x, _ = built("ConvNet")
    options = {"target": 0.7, "start": 1, "neurons_per_event": 1, "max_share": 1.0, "seed": seed}
    pruner = RandomPruner(model, SGD(model.parameters(), lr=0.1), x[:1], **options)
    removed = []
    while not pruner.finished:
        planned, report = pruner.plan(), pruner.step()
        ((name, position),) = ((name, int(gone)) for name, gone in report.removed.items())
        assert planned.removed.keys() == {name}
        assert int(planned.removed[name]) == position
        removed.append((name, position))
    return removed


def test_the_order_depends_on_the_seed_alone() -> None:
    orders = [gone_in_turn(seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 5
    assert {name for order in orders for name, _ in order} == {"a", "b"}


def test_more_neurons_at_once_are_the_first_of_the_same_order() -> None:
    model, x, _ = built("ConvNet")
    state = torch.get_rng_state()
    options = {"target": 0.5, "start": 1, "events": 1, "max_share": 1.0, "seed": 3}
    pruner = RandomPruner(model, SGD(model.parameters(), lr=0.1), x[:1], **options)
    removed = {(name, int(i)) for name, gone in pruner.step().removed.items() for i in gone}
    assert torch.equal(torch.get_rng_state(), state)
    assert removed == set(gone_in_turn(3)[: len(removed)])
    assert len(removed) == 4


def test_tied_neurons_are_as_likely_to_go_as_others() -> None:
    tied = []
    for seed in range(60):
        model, x, _ = built("Residual")
        options = {"target": 0.4, "start": 1, "events": 1, "per": "neuron", "seed": seed}
        removed = RandomPruner(model, SGD(model.parameters(), lr=0.1), x[:1], **options).step().removed
        tied.append(len(removed.get("stem", [])))
    # 10 groups of 1.4 neurons on average, of which 6 neurons go: 43 % of the four that are tied
    assert 1.3 < sum(tied) / len(tied) < 2.2
